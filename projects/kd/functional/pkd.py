"""PKD: distillation by Pearson correlation (Cao et al., NeurIPS 2022).

Shapes: N images, C channels, (H, W) cells of a level, m = cells that take part in a channel.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .precision import full_precision

EPSILON = 1e-6  # added to the standard deviation, as published


@full_precision
def pkd_loss(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Half the mean squared difference of channels standardised over images and positions.

    Each channel is reduced to zero mean and unit (unbiased) standard deviation over its
    ``m = N * H * W`` cells, both nets by their own statistics; then ``1/2 mean (s - t)^2`` over all
    elements. That is ``(m - 1) / m * (1 - mean_c r_c)`` with Pearson's r, up to the 1e-6 added to
    the standard deviation. Source: the paper's loss as in its public implementation. Statistics
    are those of this process's batch, never synchronised, as published.

    A channel of the student that is nearly constant gets a large gradient (1 / deviation).

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W); gets no gradient.
        mask: (N, 1, H, W) bool, statistics and mean over these cells only (ours); None = all.

    Returns:
        Scalar in [0, 2], exactly 0 for equal inputs, and 0 with gradient 0 when fewer than two
        cells take part (no unbiased deviation exists; ours).
    """
    return _Pearson.apply(student, teacher, mask)


class _Pearson(torch.autograd.Function):
    """Keeps the two maps and four (C,) vectors instead of the standardised maps."""

    @staticmethod
    def forward(ctx, student, teacher, mask):
        channels = student.shape[1]
        if mask is None:
            cells = student.new_tensor(student.numel() // channels)
        else:
            cells = mask.sum().clamp(min=1).to(student.dtype)
        a, mean_student = _centred(student, cells, mask)
        b, mean_teacher = _centred(teacher, cells, mask)
        # sums of centred products: no cancellation of large means
        aa, bb, ab = _dot(a, a), _dot(b, b), _dot(a, b)
        freedom = (cells - 1).clamp(min=1)
        deviation = (aa / freedom).sqrt()
        scale_student = deviation + EPSILON
        scale_teacher = (bb / freedom).sqrt() + EPSILON
        squared = (
            aa / scale_student.square()
            + bb / scale_teacher.square()
            - 2 * ab / (scale_student * scale_teacher)
        )
        # d loss / d s = slope_a * (s - mean) + slope_b * (t - mean) within a channel
        share = 1 / (channels * cells)
        along = aa / scale_student - ab / scale_teacher
        along = along / (scale_student * freedom * deviation.clamp(min=1e-12))
        slope_a = share * (1 / scale_student - along) / scale_student
        slope_b = -share / (scale_student * scale_teacher)
        ctx.save_for_backward(student, teacher, mask, mean_student, mean_teacher, slope_a, slope_b)
        return (0.5 * share * squared).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, teacher, mask, mean_student, mean_teacher, slope_a, slope_b = ctx.saved_tensors
        result = (student - _wide(mean_student)).mul_(_wide(slope_a * grad))
        result.addcmul_(teacher - _wide(mean_teacher), _wide(slope_b * grad))
        if mask is not None:  # what lies outside may be infinite
            result.masked_fill_(~mask, 0.0)
        return result, None, None


def _centred(values, cells, mask):
    inside = values if mask is None else torch.where(mask, values, 0.0)
    mean = inside.sum((0, 2, 3)) / cells
    centred = inside - _wide(mean)
    return centred if mask is None else centred.masked_fill_(~mask, 0.0), mean


def _dot(a, b):
    return (a * b).sum((0, 2, 3))


def _wide(vector):
    return vector[:, None, None]
