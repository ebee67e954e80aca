"""CWD: channel-wise distillation of features or classification logits."""

from __future__ import annotations

import torch

from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import ConfigError
from ..functional.cwd import cwd_loss
from .base import IMITATION_HEAD_REGISTRY
from .targets import MapImitation


@register_config
def add_cwd_config(cfg) -> None:
    """Add KD.CWD."""
    cfg.KD.CWD = node = head_node(weight=10.0, mask_padding=False)
    # Temperature of the softmax over positions.
    node.TAU = 1.0
    # "features" = backbone outputs; "dense" = classification logits of a one-stage head;
    # "sem_seg" = class logits of a segmentation head; "decoder" = what their last layer reads.
    node.TARGET = "features"


@IMITATION_HEAD_REGISTRY.register()
class CWD(MapImitation):
    """Channel-wise KL divergence, summed over levels (Shu et al., ICCV 2021).

    The weight is per level, as published.

    On logits both sides need the same classes in the same order (of a one-stage head also the same
    anchors); of these only the numbers can be checked.

    Args:
        tau: temperature.
        **base: see :class:`MapImitation`; adapters are linear (ours, the published one for
            segmentation adds a norm and ReLU).
    """

    by_channel = True

    def __init__(self, *, tau: float = 1.0, **base):
        super().__init__(**base)
        self.tau = tau

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.CWD."""
        tau = cfg.KD.CWD.TAU
        if tau <= 0:
            raise ConfigError(f"KD.CWD.TAU is {tau}, it must be positive")
        return {**super().from_config(cfg, student, teacher), "tau": tau}

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_cwd``: weight * sum over levels of the divergence."""
        total = sum(
            cwd_loss(student, teacher, self.tau, mask) for student, teacher, mask in self.maps(ctx)
        )
        return {"loss_kd_cwd": self.weight * total}
