"""PKD: distillation by Pearson correlation."""

from __future__ import annotations

import torch
from torch import nn

from ..config import head_node, register_config
from ..context import DistillContext
from ..functional.pkd import pkd_loss
from .base import IMITATION_HEAD_REGISTRY, ImitationHead, build_adapters


@register_config
def add_pkd_config(cfg) -> None:
    """Add KD.PKD."""
    cfg.KD.PKD = head_node(weight=6.0, mask_padding=False)


@IMITATION_HEAD_REGISTRY.register()
class PKD(ImitationHead):
    """Difference of standardised channels, summed over levels (Cao et al., NeurIPS 2022).

    Statistics are those of the process's own batch, as published. Where grids differ the teacher
    is resized (published: the student).

    Args:
        adapters: level to a module that maps student channels to teacher channels (ours: the paper
            needs equal channels).
        **base: see :class:`ImitationHead`.
    """

    def __init__(self, *, adapters: nn.ModuleDict, **base):
        super().__init__(**base)
        self.adapters = adapters

    def reads_of_teacher(self) -> tuple[str, ...]:
        """See the base class."""
        return self.levels

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.PKD."""
        kwargs = super().from_config(cfg, student, teacher)
        kwargs["adapters"] = build_adapters(cfg.KD.ADAPTER.TYPE, kwargs["levels"], student, teacher)
        return kwargs

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_pkd``: weight * sum over levels; a level of one cell gives 0."""
        total = sum(pkd_loss(*self.pair(ctx, level, self.adapters[level])) for level in self.levels)
        return {"loss_kd_pkd": self.weight * total}
