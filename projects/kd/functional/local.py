"""LOCAL: distances between neighbouring cells (after Xie et al., BMVC 2018).

Shapes: N images, C channels, (H, W) cells of a level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .precision import full_precision

# each unordered pair of 8-neighbours once: (rows down, columns right)
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
EPS = 1e-12


@full_precision
def local_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    normalize: bool = False,
) -> torch.Tensor:
    """Mean squared difference of the distances between neighbouring cells.

    With ``d(x, y) = sqrt(||f_x - f_y||^2 + 1e-12)`` for each cell x and its 8 neighbours y, the
    mean of ``(d_student - d_teacher)^2`` over all pairs inside the map, of all images together.
    Source: the local similarity that the CWD paper compares with; neither paper's code was found,
    so the reduction is ours.

    Args:
        student: (N, C, H, W).
        teacher: (N, C', H, W), no gradient; C' may differ from C.
        mask: (N, 1, H, W) bool, pairs with a cell outside do not exist; None = all cells.
        normalize: divide each cell's vector by its length first (ours).

    Returns:
        Scalar; 0 for a map of one cell.
    """
    if mask is not None:
        student, teacher = (torch.where(mask, x, 0.0) for x in (student, teacher))
    if normalize:
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    return _Neighbours.apply(student, teacher, mask)


class _Neighbours(torch.autograd.Function):
    """Keeps the student's map and one number a pair; backward forms the differences again."""

    @staticmethod
    def forward(ctx, student, teacher, mask):
        total, count, gaps = student.new_zeros(()), 0, []
        for shift in SHIFTS:
            ours = _distance(student, shift)
            gap = ours - _distance(teacher, shift)
            if mask is None:
                count += gap.numel()
            else:
                here, there = _views(mask, shift)
                both = (here & there)[:, 0]
                gap.masked_fill_(~both, 0.0)
                count = count + both.sum()
            total += gap.square().sum()
            gaps.append(gap.div_(ours))
        count = max(count, 1) if mask is None else count.clamp(min=1)
        ctx.save_for_backward(student, *gaps)
        ctx.count = count
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, *gaps = ctx.saved_tensors
        result = torch.zeros_like(student)
        factor = 2 * grad / ctx.count
        for shift, gap in zip(SHIFTS, gaps, strict=True):
            here, there = _views(student, shift)
            change = (here - there).mul_((gap * factor)[:, None])
            to_here, to_there = _views(result, shift)
            to_here.add_(change)
            to_there.sub_(change)
        return result, None, None


def _views(values, shift):
    """All cells that have the neighbour ``shift``, and those neighbours: (N, C, h, w) views."""
    down, right = shift
    rows, columns = values.shape[-2:]
    left, stop = max(-right, 0), columns - max(right, 0)
    here = values[..., : rows - down, left : max(stop, left)]
    there = values[..., down:, left + right : max(stop, left) + right]
    return here, there


def _distance(values, shift):
    here, there = _views(values, shift)
    return (here - there).square_().sum(1).add_(EPS).sqrt_()
