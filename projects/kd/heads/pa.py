"""PA: pair-wise similarity."""

from __future__ import annotations

import torch

from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import ConfigError
from ..functional.pa import pa_loss
from .base import IMITATION_HEAD_REGISTRY
from .targets import MapImitation


@register_config
def add_pa_config(cfg) -> None:
    """Add KD.PA."""
    cfg.KD.PA = node = head_node(weight=1.0, mask_padding=False)
    # As KD.CWD.TARGET.
    node.TARGET = "features"
    # Nodes are maxima of blocks with this share of the map's rows and columns (the authors' code
    # takes 0.5, four nodes); 0.0 = every cell is a node.
    node.POOL = 0.0


@IMITATION_HEAD_REGISTRY.register()
class PA(MapImitation):
    """Similarities of all pairs of cells, summed over levels (Liu et al., CVPR 2019).

    Needs no adapters: similarities have no channels.

    Args:
        pool: see :func:`~projects.kd.functional.pa.pa_loss`.
        **base: see :class:`MapImitation`.
    """

    def __init__(self, *, pool: float = 0.0, **base):
        super().__init__(**base)
        self.pool = pool

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.PA."""
        pool = cfg.KD.PA.POOL
        if not 0.0 <= pool <= 1.0:
            raise ConfigError(f"KD.PA.POOL is {pool}, it must lie in [0, 1]")
        return {**super().from_config(cfg, student, teacher), "pool": pool}

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_pa``: weight * sum over levels."""
        total = sum(pa_loss(s, t, self.pool, mask) for s, t, mask in self.maps(ctx))
        return {"loss_kd_pa": self.weight * total}
