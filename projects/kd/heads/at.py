"""AT: attention transfer."""

from __future__ import annotations

import torch

from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import require_one_of
from ..functional.at import REDUCTIONS, at_loss
from .base import IMITATION_HEAD_REGISTRY
from .targets import MapImitation


@register_config
def add_at_config(cfg) -> None:
    """Add KD.AT."""
    cfg.KD.AT = node = head_node(weight=10.0, mask_padding=False)
    # As KD.CWD.TARGET.
    node.TARGET = "features"
    # Over the cells of a map: "sum", or "mean" as in the authors' code.
    node.REDUCTION = "sum"


@IMITATION_HEAD_REGISTRY.register()
class AT(MapImitation):
    """Difference of normalised attention maps (Zagoruyko & Komodakis, ICLR 2017).

    Summed over levels. Needs no adapters: the maps have no channels.

    Args:
        reduction: see :func:`~projects.kd.functional.at.at_loss`.
        **base: see :class:`MapImitation`.
    """

    def __init__(self, *, reduction: str = "sum", **base):
        super().__init__(**base)
        self.reduction = reduction

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.AT."""
        reduction = cfg.KD.AT.REDUCTION
        require_one_of("KD.AT.REDUCTION", reduction, REDUCTIONS)
        return {**super().from_config(cfg, student, teacher), "reduction": reduction}

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_at``: weight * sum over levels."""
        total = sum(at_loss(*maps, self.reduction) for maps in self.maps(ctx))
        return {"loss_kd_at": self.weight * total}
