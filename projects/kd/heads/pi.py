"""PI: pixel-wise distillation of class logits."""

from __future__ import annotations

import torch

from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import ConfigError, require_one_of
from ..functional.pi import REDUCTIONS, bernoulli_pi_loss, pi_loss, teacher_confidence
from ..functional.ranks import mean_over_ranks
from .base import IMITATION_HEAD_REGISTRY
from .targets import MapImitation


@register_config
def add_pi_config(cfg) -> None:
    """Add KD.PI."""
    cfg.KD.PI = node = head_node(weight=10.0, mask_padding=False)
    # "sem_seg" = class logits of a segmentation head; "dense" = those of a one-stage detector.
    node.TARGET = "sem_seg"
    # Temperature of the class probabilities.
    node.TAU = 1.0
    # sem_seg: divide by the number of "pixels", or of "elements" (pixels x classes).
    node.REDUCTION = "pixels"
    # dense: exponent of the quality focal factor; 0.0 = plain KL divergence.
    node.BETA = 1.0


@IMITATION_HEAD_REGISTRY.register()
class PI(MapImitation):
    """Class probabilities of each pixel (the baseline of Liu et al., CVPR 2019).

    Segmentation: KL divergence of softmax distributions. One-stage detectors: Bernoulli losses of
    all levels together, divided by the teacher's confidence (at least 1), in the mean over
    processes. Both sides need the same classes (and anchors) in the same order; of these only the
    numbers can be checked.

    Args:
        tau, reduction, beta: see :mod:`projects.kd.functional.pi`.
        **base: see :class:`MapImitation`.
    """

    targets = ("sem_seg", "dense")
    by_channel = True

    def __init__(self, *, tau: float = 1.0, reduction: str = "pixels", beta: float = 1.0, **base):
        super().__init__(**base)
        self.tau, self.reduction, self.beta = tau, reduction, beta

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.PI."""
        node = cfg.KD.PI
        if node.TAU <= 0:
            raise ConfigError(f"KD.PI.TAU is {node.TAU}, it must be positive")
        require_one_of("KD.PI.REDUCTION", node.REDUCTION, REDUCTIONS)
        if node.BETA != 0.0 and node.BETA < 1.0:
            raise ConfigError(f"KD.PI.BETA is {node.BETA}, it must be 0 or at least 1")
        kwargs = super().from_config(cfg, student, teacher)
        return {**kwargs, "tau": node.TAU, "reduction": node.REDUCTION, "beta": node.BETA}

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_pi``, weighted."""
        maps = list(self.maps(ctx))
        if self.target == "sem_seg":
            ((student, teacher, mask),) = maps
            loss = pi_loss(student, teacher, self.tau, mask, self.reduction)
        else:
            loss = sum(bernoulli_pi_loss(s, t, self.tau, self.beta, mask) for s, t, mask in maps)
            confidence = sum(teacher_confidence(t, mask) for _, t, mask in maps)
            loss = loss / mean_over_ranks(confidence).clamp(min=1.0)
        return {"loss_kd_pi": self.weight * loss}
