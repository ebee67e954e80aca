"""DSI: the direction of feature vectors, cell by cell.

Shapes: N images, C channels, (H, W) cells of a level.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .precision import full_precision

EPSILON = 1e-6  # least length that a vector is divided by


@full_precision
def cosine_loss(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over cells of ``1 - <S, T> / (max(|S|, 1e-6) max(|T|, 1e-6))``, over their channels.

    Liao et al., RT-DETRv4 (arXiv 2510.25257), whose code normalises both sides and takes the mean
    of 1 - cosine. It divides by lengths of at least 1e-12 there; with ours the gradient of a cell
    that is almost zero stays finite.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W); gets no gradient.
        mask: (N, 1, H, W) bool, cells that count; outside the maps may hold anything. None = all.

    Returns:
        Scalar from 0 (equal directions) to 2; 0 where no cell counts.
    """
    return _Cosine.apply(student, teacher, mask)


class _Cosine(torch.autograd.Function):
    """Keeps the two maps and two numbers a cell."""

    @staticmethod
    def forward(ctx, student, teacher, mask):
        ours, theirs = (x.norm(dim=1, keepdim=True).clamp_(min=EPSILON) for x in (student, teacher))
        scale = (ours * theirs).reciprocal_()
        cosine = (student * teacher).sum(1, keepdim=True).mul_(scale)
        if mask is None:
            share = torch.full_like(scale, 1 / max(scale.numel(), 1))
        else:
            share = mask.to(scale.dtype) / mask.sum().clamp(min=1)
        # d cos / d S = scale T - bend S; a vector that is shorter than epsilon has a fixed divisor
        bend = (cosine / ours.square()).masked_fill_(ours <= EPSILON, 0.0)
        ctx.save_for_backward(student, teacher, scale * share, bend * share, mask)
        losses = (1 - cosine) * share
        return (losses if mask is None else losses.masked_fill(~mask, 0.0)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, teacher, scale, bend, mask = ctx.saved_tensors
        gradient = (student * bend).addcmul_(teacher, scale, value=-1).mul_(grad)
        return gradient if mask is None else gradient.masked_fill_(~mask, 0.0), None, None
