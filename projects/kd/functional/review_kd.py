"""ReviewKD: the hierarchical context loss (Chen et al., CVPR 2021, arXiv 2104.09044).

Shapes: N images, C channels, (H, W) cells of a level.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .precision import full_precision

POOLS = (4, 2, 1)  # sides of the pooled maps


@full_precision
def hcl_loss(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared difference of a level at full size and of its means over coarse grids.

    ``(e + sum_k 2^-k e_k) / (1 + sum_k 2^-k)``, e the mean square at full size and e_k that of both
    maps averaged over the bins of a grid of 4x4, 2x2 and 1x1 (adaptive pooling); k = 1, 2, ..
    counts those used. A grid is left out where its side is not below H (the width is not asked, as
    published). Formulas as in the released code, which was executed on the inputs of the tests.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W); gets no gradient.
        mask: (N, 1, H, W) bool (ours): means are over these cells, and over bins that hold any;
            None = all, as published.

    Returns:
        Scalar, 0 for equal maps.
    """
    return _Hierarchy.apply(student, teacher.detach(), mask)


class _Hierarchy(torch.autograd.Function):
    """Keeps the two maps, and small ones: what each grid of bins asks for."""

    @staticmethod
    def forward(ctx, student, teacher, mask):
        difference = _difference(student, teacher, mask)
        channels, height, width = difference.shape[1:]
        part = None if mask is None else mask.to(difference.dtype)
        sides = [side for side in POOLS if side < height]
        factors = [0.5**k for k in range(len(sides) + 1)]
        factors = [factor / sum(factors) for factor in factors]
        total, slopes, bins = 0.0, [], []
        # pooling is linear: the mean of differences is the difference of means
        for side, factor in zip(sides, factors[1:], strict=True):
            rows, columns = (_bins(size, side, difference) for size in (height, width))
            means, count = rows @ difference @ columns.mT, difference[:, :, 0, 0].numel() * side**2
            inside = 1.0
            if part is not None:
                share = rows @ part @ columns.mT
                inside = torch.where(share > 0, 1 / share, 0.0)
                means, count = means * inside, _count(share > 0, channels, means)
            total = total + factor * means.square().sum() / count
            slopes.append(means * inside * (2 * factor / count))
            bins.append((rows, columns))
        count = difference.numel() if mask is None else _count(mask, channels, difference)
        ctx.scale, ctx.bins = 2 * factors[0] / count, bins
        ctx.save_for_backward(student, teacher, mask, *slopes)
        return total + factors[0] * difference.square_().sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, teacher, mask, *slopes = ctx.saved_tensors
        result = _difference(student, teacher, mask).mul_(ctx.scale)
        maps = result.view(-1, *result.shape[2:])
        for slope, (rows, columns) in zip(slopes, ctx.bins, strict=True):
            by_column = (rows.mT @ slope).flatten(0, 1)
            maps.baddbmm_(by_column, columns.expand(len(maps), *columns.shape))
        result = result if mask is None else result.masked_fill_(~mask, 0.0)
        return result.mul_(grad), None, None


def _difference(student, teacher, mask):
    """A new contiguous map, 0 outside of the mask, where the two may be infinite."""
    difference = (student - teacher).contiguous()
    return difference if mask is None else difference.masked_fill_(~mask, 0.0)


def _count(mask, channels, like):
    """Elements inside, at least 1, in the precision of a map."""
    return (mask.sum() * channels).clamp(min=1).to(like.dtype)


def _bins(size: int, side: int, like: torch.Tensor) -> torch.Tensor:
    """(side, size) whose rows take the means of adaptive pooling along one axis."""
    row = torch.arange(side, device=like.device)[:, None]
    cell = torch.arange(size, device=like.device)
    inside = (cell >= row * size // side) & (cell * side < (row + 1) * size)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)
