"""PA: pair-wise similarity (Liu et al., "Structured knowledge distillation", CVPR 2019).

Shapes: N images, C channels, (H, W) cells of a level, P = H*W nodes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .precision import full_precision

EPS = 1e-8
CHUNK = 2**19  # numbers that are handled at a time


@full_precision
def pa_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    pool: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared difference of the cosine similarities of all pairs of nodes.

    With unit vectors ``f_i`` (the cell's vector divided by its length + 1e-8; the length counts as
    a constant in the gradient, as in the authors' code)::

        1/N sum_n 1/P^2 sum_ij (f_i . f_j of the teacher - f_i . f_j of the student)^2

    Source: the paper's pair-wise loss. It is computed exactly, without a P x P matrix (ours): with
    D = T - S and M = T + S, both (C, P), the inner sum is ``(<D D', M M'> + <M D', D M'>) / 2``,
    three C x C products, in which nothing large cancels when student and teacher nearly agree.
    Where the channels differ it is ``|T T'|^2 + |S S'|^2 - 2 |S T'|^2``, in float64.

    Args:
        student: (N, C, H, W).
        teacher: (N, C', H, W), no gradient; C' may differ from C.
        pool: 0 = every cell is a node; else nodes are the maxima of blocks of
            ``int(pool * H) x int(pool * W)`` cells (0.5 in the authors' code: four nodes).
        mask: (N, 1, H, W) bool, cells outside do not exist; None = all cells.

    Returns:
        Scalar.
    """
    if mask is not None:
        outside = float("-inf") if pool > 0 else 0.0
        student, teacher = (torch.where(mask, x, outside) for x in (student, teacher))
    if pool > 0:
        kernel = [max(1, int(pool * side)) for side in student.shape[-2:]]
        student, teacher = (
            F.max_pool2d(x, kernel, stride=kernel, ceil_mode=True) for x in (student, teacher)
        )
        if mask is not None:
            mask = F.max_pool2d(mask.to(student.dtype), kernel, stride=kernel, ceil_mode=True) > 0
            student, teacher = (torch.where(mask, x, 0.0) for x in (student, teacher))
    if mask is None:
        nodes = student.new_full((len(student),), student[0, 0].numel())
    else:
        nodes = mask.flatten(1).sum(1).clamp(min=1).to(student.dtype)
    return _Pairs.apply(student.flatten(2), teacher.flatten(2), nodes)


class _Pairs(torch.autograd.Function):
    """Keeps the two maps and three C x C matrices an image; nodes of value 0 add nothing."""

    @staticmethod
    def forward(ctx, student, teacher, nodes):
        same = student.shape[1] == teacher.shape[1]
        products = [_products(s, t, same) for s, t in zip(student, teacher, strict=True)]
        values = []
        for first, second, mixed in products:
            if same:
                values.append(((first * second).sum() + (mixed * mixed.T).sum()) / 2)
            else:
                values.append(
                    first.square().sum() + second.square().sum() - 2 * mixed.square().sum()
                )
        ctx.save_for_backward(student, teacher, nodes, *(m for three in products for m in three))
        return (torch.stack(values) / nodes.double().square()).mean().to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, teacher, nodes, *products = ctx.saved_tensors
        same = student.shape[1] == teacher.shape[1]
        result = torch.empty_like(student)
        scale = grad.double() / nodes.double().square() / len(student)
        for n, (s, t) in enumerate(zip(student, teacher, strict=True)):
            first, second, mixed = products[3 * n : 3 * n + 3]
            if same:  # d/dS = -(M D' - D D') M - (M M' - D M') D
                of_sum = mixed - first
                of_difference = second - mixed.T
            for part in _parts(s):
                ours, length = _unit(s[:, part])
                theirs = _unit(t[:, part])[0]
                if same:
                    work = student.dtype
                    change = of_sum.to(work) @ (theirs + ours).to(work)
                    change += of_difference.to(work) @ (theirs - ours).to(work)
                    change = change.neg_()
                else:
                    change = second @ ours
                    change -= mixed @ theirs
                    change *= 4
                result[n, :, part] = (change.double() * (scale[n] / length)).to(result.dtype)
        return result, None, None


def _products(student, teacher, same):
    """Of one image (C, P): D D', M M', M D', or with other channels T T', S S', S T' (float64)."""
    sums = [0.0, 0.0, 0.0]
    for part in _parts(student):
        ours, theirs = _unit(student[:, part])[0], _unit(teacher[:, part])[0]
        if same:
            work = student.dtype  # of differences, which need no more digits than the inputs
            a, b = (theirs - ours).to(work), theirs.add_(ours).to(work)
            pairs = (a, a), (b, b), (b, a)
        else:
            pairs = (theirs, theirs), (ours, ours), (ours, theirs)
        sums = [total + (x @ y.T).double() for total, (x, y) in zip(sums, pairs, strict=True)]
    return sums


def _unit(values):
    """Unit vectors (C, p) in float64, so that their difference keeps its digits; and lengths."""
    values = values.double()
    length = torch.linalg.vector_norm(values, dim=0).add_(EPS)
    return values / length, length


def _parts(values):
    step = max(1, CHUNK // values.shape[0])
    return [slice(start, start + step) for start in range(0, values.shape[1], step)]
