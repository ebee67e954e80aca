"""Mimic: masked L2 on FPN features. The teaching example of an imitation head."""

from __future__ import annotations

import torch
from torch import nn

from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import require_one_of
from ..functional.mimic import mimic_loss
from .base import IMITATION_HEAD_REGISTRY, ImitationHead, build_adapters

MASKS = ("valid", "gt_box")


@register_config
def add_mimic_config(cfg) -> None:
    """Add KD.MIMIC."""
    cfg.KD.MIMIC = node = head_node(weight=1.0, mask_padding=True)
    # "valid" = all cells of the unpadded image; "gt_box" = cells whose centre is in a ground-truth
    # box (padding is outside every box).
    node.MASK = "valid"


@IMITATION_HEAD_REGISTRY.register()
class Mimic(ImitationHead):
    """Mean squared feature difference, averaged over levels (ours; the control experiment).

    Args:
        adapters: level to a module that maps student channels to teacher channels.
        mask: "valid" (with ``mask_padding``: cells inside the image) or "gt_box" (cells whose
            centre lies in a ground-truth box).
        **base: see :class:`ImitationHead`.
    """

    def __init__(self, *, adapters: nn.ModuleDict, mask: str = "valid", **base):
        super().__init__(**base)
        self.adapters = adapters
        self.mask = mask
        self.needs_boxes = mask == "gt_box"

    def reads_of_teacher(self) -> tuple[str, ...]:
        """See the base class."""
        return self.levels

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.MIMIC."""
        kwargs = super().from_config(cfg, student, teacher)
        require_one_of("KD.MIMIC.MASK", cfg.KD.MIMIC.MASK, MASKS)
        kwargs["mask"] = cfg.KD.MIMIC.MASK
        kwargs["adapters"] = build_adapters(cfg.KD.ADAPTER.TYPE, kwargs["levels"], student, teacher)
        return kwargs

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_mimic``: weight * mean over levels of the masked mean squared difference."""
        total = 0.0
        for level in self.levels:
            student, teacher, mask = self.pair(ctx, level, self.adapters[level])
            if self.mask == "gt_box":
                boxes = box_mask(ctx, level)
                mask = boxes if mask is None else boxes & mask
            total = total + mimic_loss(student, teacher, mask)
        return {"loss_kd_mimic": self.weight * total / len(self.levels)}


def box_mask(ctx: DistillContext, level: str) -> torch.Tensor:
    """(N, 1, H, W) bool: cells of a level whose centre lies inside a ground-truth box."""
    feature = ctx.student_features[level]
    n, _, rows, columns = feature.shape
    stride = ctx.stride(level)
    y = (torch.arange(rows, device=feature.device) + 0.5) * stride
    x = (torch.arange(columns, device=feature.device) + 0.5) * stride
    mask = torch.zeros(n, 1, rows, columns, dtype=torch.bool, device=feature.device)
    for image, instances in enumerate(ctx.gt):
        x1, y1, x2, y2 = instances.gt_boxes.tensor.T[..., None]
        inside_y = (y >= y1) & (y < y2)
        inside_x = (x >= x1) & (x < x2)
        mask[image, 0] = (inside_y.float().T @ inside_x.float()) > 0
    return mask
