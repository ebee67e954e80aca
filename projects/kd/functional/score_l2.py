"""ScoreL2: squared feature difference, weighted by the teacher's confidence.

Shapes: N images, C channels, (H, W) cells of a level.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .precision import full_precision

EPSILON = 1e-6  # least sum of weights


@full_precision
def score_l2_loss(
    student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """``sum_{n,x} w mean_c (S - T)^2 / max(sum w, 1e-6)``.

    That features are imitated by an L2 loss weighted with the teacher's confidence is public (the
    documentation of Ultralytics, 2026); the reduction is not, this one is ours: a weighted mean
    does not depend on the size of the image, of the batch, or on the number of objects. The sum of
    weights is that of the process's own batch.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W); gets no gradient.
        weight: w (N, 1, H, W) >= 0 without gradient. Where it is 0 the maps may hold anything.

    Returns:
        Scalar, 0 for equal maps and where no cell has weight.
    """
    return _WeightedSquares.apply(student, teacher, weight.to(student.dtype))


class _WeightedSquares(torch.autograd.Function):
    """Keeps the two maps and the weights."""

    @staticmethod
    def forward(ctx, student, teacher, weight):
        share = weight / (weight.sum().clamp(min=EPSILON) * student.shape[1])
        ctx.save_for_backward(student, teacher, share)
        cells = _difference(student, teacher, share).square_().sum(1, keepdim=True)
        return (cells * share).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, teacher, share = ctx.saved_tensors
        return _difference(student, teacher, share).mul_(2 * grad * share), None, None


def _difference(student, teacher, share):
    return (student - teacher).masked_fill_(share == 0, 0.0)
