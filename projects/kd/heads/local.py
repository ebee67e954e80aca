"""LOCAL: distances between neighbouring cells."""

from __future__ import annotations

import torch

from ..config import head_node, register_config
from ..context import DistillContext
from ..functional.local import local_loss
from .base import IMITATION_HEAD_REGISTRY
from .targets import MapImitation


@register_config
def add_local_config(cfg) -> None:
    """Add KD.LOCAL."""
    cfg.KD.LOCAL = node = head_node(weight=1.0, mask_padding=False)
    # As KD.CWD.TARGET.
    node.TARGET = "features"
    # True: divide each cell's vector by its length first.
    node.NORMALIZE = False


@IMITATION_HEAD_REGISTRY.register()
class LOCAL(MapImitation):
    """Local similarity, summed over levels (after Xie et al., BMVC 2018).

    Needs no adapters: distances have no channels.

    Args:
        normalize: see :func:`~projects.kd.functional.local.local_loss`.
        **base: see :class:`MapImitation`.
    """

    def __init__(self, *, normalize: bool = False, **base):
        super().__init__(**base)
        self.normalize = normalize

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.LOCAL."""
        kwargs = super().from_config(cfg, student, teacher)
        return {**kwargs, "normalize": cfg.KD.LOCAL.NORMALIZE}

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_local``: weight * sum over levels; a level of one cell gives 0."""
        total = sum(local_loss(*maps, self.normalize) for maps in self.maps(ctx))
        return {"loss_kd_local": self.weight * total}
