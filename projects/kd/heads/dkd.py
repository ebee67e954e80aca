"""DKD: decoupled distillation of region classes."""

from __future__ import annotations

import torch

from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import ConfigError
from ..functional.dkd import dkd_loss
from .base import IMITATION_HEAD_REGISTRY, ImitationHead
from .region_logits import RegionLogits


@register_config
def add_dkd_config(cfg) -> None:
    """Add KD.DKD."""
    # LEVELS and MASK_PADDING stay as they are: regions are compared, not maps
    cfg.KD.DKD = node = head_node(weight=1.0, mask_padding=True)
    # Factor of the divergence between "the assigned class" and "another".
    node.ALPHA = 1.0
    # Factor of the divergence between the other classes.
    node.BETA = 0.25
    node.TEMPERATURE = 1.0


@IMITATION_HEAD_REGISTRY.register()
class DKD(ImitationHead):
    """Decoupled distillation of an R-CNN's classes (Zhao et al., CVPR 2022).

    ``weight *`` :func:`~projects.kd.functional.dkd.dkd_loss` on the student's sampled proposals
    with their assigned classes, background among them; of a cascade the mean over stages (ours).
    Boxes are not compared. The student's logits are those of its own step (published code computes
    them a second time).

    Args:
        regions: reader of the logits.
        alpha, beta, temperature: of the loss.
        **base: see :class:`ImitationHead`.
    """

    needs_boxes = True
    compares = ("thing_classes",)
    requires_student = RegionLogits.taps

    def __init__(
        self, *, regions: RegionLogits, alpha: float, beta: float, temperature: float, **base
    ):
        super().__init__(**base)
        self.regions = regions
        self.factors = (alpha, beta, temperature)

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.DKD."""
        node = cfg.KD.DKD
        for key in ("ALPHA", "BETA"):
            if node[key] < 0:
                raise ConfigError(f"KD.DKD.{key} is {node[key]:g}, it must not be negative")
        if node.TEMPERATURE <= 0:
            raise ConfigError(f"KD.DKD.TEMPERATURE is {node.TEMPERATURE:g}, it must be positive")
        if not node.MASK_PADDING:
            raise ConfigError("KD.DKD.MASK_PADDING: regions have no padding; leave it True")
        return {
            "levels": [],
            "weight": node.WEIGHT,
            "mask_padding": node.MASK_PADDING,
            "regions": RegionLogits.build(cfg, student, teacher, "DKD"),
            "alpha": float(node.ALPHA),
            "beta": float(node.BETA),
            "temperature": float(node.TEMPERATURE),
        }

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_dkd``; 0 without regions."""
        stages = self.regions.read(ctx)
        total = sum(dkd_loss(*stage, *self.factors) for stage in stages)
        return {"loss_kd_dkd": self.weight * total / len(stages)}
