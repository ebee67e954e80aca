"""ReviewKD: knowledge review of feature pyramids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import ConfigError
from ..functional.review_kd import hcl_loss
from ..predict.base import step_precision
from .base import IMITATION_HEAD_REGISTRY, ImitationHead, common_width


@register_config
def add_review_kd_config(cfg) -> None:
    """Add KD.REVIEWKD."""
    cfg.KD.REVIEWKD = head_node(weight=1.0, mask_padding=False)


class Fusion(nn.Module):
    """Attention-based fusion of a level with what came of the coarser ones.

    ::

        x = BN(W1 F);  z = sigmoid(A [x, r] + a);  x <- z_0 x + z_1 r;  out = BN(W2 * x)

    r is the x of the next coarser level, repeated to the grid of this one (nearest, index
    ``floor(i h' / h)``); the coarsest level has none. W1 is 1x1, W2 3x3, both without bias. A norm
    that sees a single value of each channel takes its running statistics (ours).

    Args:
        channels_in: of the student's level.
        channels: of the teacher's, those of x and out.
        coarsest: there is no r.
    """

    def __init__(self, channels_in: int, channels: int, coarsest: bool):
        super().__init__()
        self.reduce = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.reduce_norm = nn.BatchNorm2d(channels)
        self.gate = None if coarsest else nn.Conv2d(2 * channels, 2, 1)
        self.out = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.out_norm = nn.BatchNorm2d(channels)
        for convolution in (self.reduce, self.out):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, features, coarser=None, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
        """out and x, both (N, C, H, W).

        Args:
            features: (N, C_in, H, W).
            coarser: x of the next coarser level, (N, C, h', w'); None for the coarsest.
            mask: (N, 1, H, W) bool (ours): cells outside are 0 in x and have no part in the norms'
                statistics; None = all cells.
        """
        if mask is not None:  # what lies outside may be infinite
            features = torch.where(mask, features, 0.0)
        x = _norm(self.reduce_norm, self.reduce(features), mask)
        if self.gate is not None:
            coarser = F.interpolate(coarser, size=x.shape[-2:], mode="nearest")
            gates = self.gate(torch.cat([x, coarser], dim=1)).sigmoid()
            x = gates[:, :1] * x + gates[:, 1:] * coarser
            x = x if mask is None else torch.where(mask, x, 0.0)
        return _norm(self.out_norm, self.out(x), mask), x


def _norm(norm: nn.BatchNorm2d, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is not None:
        # rows of valid cells, as a batch of maps of one cell
        rows = values.permute(0, 2, 3, 1)[mask[:, 0]][..., None, None]
        result = values.new_zeros(values.permute(0, 2, 3, 1).shape)
        rows = _norm(norm, rows, None)[:, :, 0, 0].to(values.dtype)
        return result.masked_scatter(mask.permute(0, 2, 3, 1), rows).permute(0, 3, 1, 2)
    if values.numel() > values.shape[1]:
        return norm(values)
    state = norm.running_mean, norm.running_var, norm.weight, norm.bias
    return F.batch_norm(values, *state, training=False, eps=norm.eps)


@IMITATION_HEAD_REGISTRY.register()
class ReviewKD(ImitationHead):
    """The teacher's levels from all coarser ones of the student (Chen et al., CVPR 2021).

    ``weight * sum over levels of`` :func:`~projects.kd.functional.review_kd.hcl_loss` between what
    :class:`Fusion` makes of the student's levels, coarse to fine, and the teacher's. The fusions
    train with the student and are not part of it; their norms see the process's own batch, as
    published. They run in the precision of the step, the loss in fp32. Published for teachers of
    256 channels; here x has the teacher's width.

    Args:
        fusions: level to its :class:`Fusion`.
        **base: see :class:`ImitationHead`.
    """

    def __init__(self, *, fusions: nn.ModuleDict, **base):
        super().__init__(**base)
        self.fusions = fusions

    def reads_of_teacher(self) -> tuple[str, ...]:
        """See the base class."""
        return self.levels

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.REVIEWKD."""
        kwargs = super().from_config(cfg, student, teacher)
        levels = kwargs["levels"]
        key = "KD.REVIEWKD.LEVELS (or KD.LEVELS)"
        if len(levels) < 2:
            raise ConfigError(
                f"{key}: ReviewKD fuses a level with coarser ones and needs two at least, here is "
                f"{', '.join(levels)}"
            )
        width = common_width("teacher", teacher, levels, f"{key}: fused levels have one width")
        return {
            **kwargs,
            "fusions": nn.ModuleDict(
                {x: Fusion(student.shapes[x].channels, width, x == levels[-1]) for x in levels}
            ),
        }

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_reviewkd``."""
        total, coarser = 0.0, None
        for level in reversed(self.levels):
            student, teacher, mask = self.pair(ctx, level)
            with step_precision(ctx.student_features[level]):
                out, coarser = self.fusions[level](student, coarser, mask)
            total = total + hcl_loss(out, teacher, mask)
        return {"loss_kd_reviewkd": self.weight * total}
