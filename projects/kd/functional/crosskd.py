"""CrossKD (Wang et al., CVPR 2024): the student's maps in the teacher's head, and its box terms.

Written from the mathematics of the paper; the authors' code is not under a free licence.

Shapes: N images, A predictions a cell, K classes, C channels, (H, W) cells of a level, n + 1 bins a
side. Boxes are XYXY in input pixels. Targets get no gradient. fp32; float64 stays. Classes are
compared by :func:`~projects.kd.functional.bckd.qfl_kd`, RetinaNet's boxes by
:func:`~projects.kd.functional.bckd.giou_kd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .bckd import has_area
from .precision import full_pair, full_precision
from .set_prediction import matched_iou

EPSILON = 1e-6  # added to the standard deviation, as published
LEAST_IOU = 1e-6  # where -log IoU ends, and the least sum of weights


class Statistics(NamedTuple):
    """Of a map's channels: mean and standard deviation, both (C,)."""

    mean: torch.Tensor
    deviation: torch.Tensor


@torch.no_grad()
@full_precision
def channel_statistics(maps: torch.Tensor, mask: torch.Tensor | None = None) -> Statistics:
    """Mean and unbiased standard deviation over images and cells.

    Those of this process's batch, never synchronised, as published. With a single cell the
    deviation is 0 (ours; published: NaN).

    Args:
        maps: (N, C, H, W).
        mask: (N, 1, H, W) bool of the cells that take part; None = all, as published.
    """
    mean, deviation, *_ = _statistics(maps, mask)
    return Statistics(mean, deviation)


def _statistics(maps, mask):
    if mask is None:
        cells = maps.new_tensor(maps.numel() // maps.shape[1])
    else:
        cells = mask.sum().clamp(min=1).to(maps.dtype)
        maps = torch.where(mask, maps, 0.0)
    mean = maps.sum((0, 2, 3)) / cells
    centred = maps - _wide(mean)
    if mask is not None:
        centred.masked_fill_(~mask, 0.0)
    freedom = (cells - 1).clamp(min=1)
    deviation = (centred.square().sum((0, 2, 3)) / freedom).sqrt()
    return mean, deviation, centred, cells, freedom


@full_precision
def align_channels(
    student: torch.Tensor, target: Statistics, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Give each channel of the student's map the mean and the deviation of the teacher's.

    ::

        (s - mean_s) / (deviation_s + 1e-6) * deviation_t + mean_t

    The student's statistics (see :func:`channel_statistics`) have a gradient, the target's none:
    with m cells and f = ``deviation_t / (deviation_s + 1e-6)`` the backward pass is ``f (g - mean g
    - (s - mean_s) sum(g (s - mean_s)) / ((m - 1) deviation_s (deviation_s + 1e-6)))``. Source: the
    alignment before the teacher's head in the authors' code, as a formula.

    Args:
        student: (N, C, H, W).
        target: of the teacher's map.
        mask: (N, 1, H, W) bool, statistics over these cells, and 0 everywhere else (ours); None =
            all.

    Returns:
        (N, C, H, W). A map of a single cell becomes ``mean_t`` and has no gradient (ours).
    """
    return _Align.apply(student, *(x.detach().to(student) for x in target), mask)


class _Align(torch.autograd.Function):
    """Keeps the student's map and (C,) vectors."""

    @staticmethod
    def forward(ctx, student, mean, deviation, mask):
        own_mean, own, aligned, cells, freedom = _statistics(student, mask)
        factor = deviation / (own + EPSILON)
        slope = 1 / (freedom * own.clamp(min=1e-12) * (own + EPSILON))
        ctx.save_for_backward(student, mask, own_mean, factor, slope, cells)
        aligned.mul_(_wide(factor)).add_(_wide(mean))
        return aligned if mask is None else aligned.masked_fill_(~mask, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, mask, mean, factor, slope, cells = ctx.saved_tensors
        centred = student - _wide(mean)
        if mask is not None:  # what lies outside may be infinite
            centred.masked_fill_(~mask, 0.0)
            grad = torch.where(mask, grad, 0.0)
        along = (grad * centred).sum((0, 2, 3)) * slope
        result = centred.mul_(_wide(-along)).add_(grad).sub_(_wide(grad.sum((0, 2, 3)) / cells))
        result.mul_(_wide(factor))
        if mask is not None:
            result.masked_fill_(~mask, 0.0)
        return result, None, None, None


def largest_gain(student: torch.Tensor, target: Statistics, mask=None) -> torch.Tensor:
    """Largest ``deviation_t / (deviation_s + 1e-6)`` of a level: how gradients are amplified."""
    own = channel_statistics(student.detach(), mask).deviation
    return (target.deviation.to(own) / (own + EPSILON)).amax()


def log_iou_kd(
    levels: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    normaliser: torch.Tensor | float,
) -> torch.Tensor:
    """``sum w * -log max(IoU(b_s, b_t), 1e-6) / normaliser``: the box term on FCOS.

    Args:
        levels: per level student boxes (N, A, H, W, 4), target boxes, and constant weights w
            (N, A, H, W). Targets without area count with weight 0 (ours).
        normaliser: scalar, published: the sum of the positives' centre-ness targets.

    Returns:
        Scalar >= 0. Boxes that hardly meet have no gradient, as published.
    """
    total = 0.0
    for student, target, weight in levels:
        student, target = full_pair(student, target)
        weight = weight * has_area(target)
        overlap = matched_iou(student, target).clamp(min=LEAST_IOU)
        total = total - (weight * overlap.log()).sum()
    return total / normaliser


def bins_kd(
    levels: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The box term on GFL, before its division by the sum of weights.

    ::

        sum w sum_sides KL(softmax b_t || softmax b_s) / 4

    over levels, the divergence summed over bins, temperature 1. The loss is this over ``sum w``
    (published: of the own process, which may be 0; here the mean over processes, at least 1e-6).

    Args:
        levels: per level logits of the student's bins (N, 4, n + 1, H, W), the target's, and
            constant weights w (N, H, W); what has weight 0 may be infinite.

    Returns:
        The sum above, and ``sum w``, scalars.
    """
    parts = [
        (_BinDivergence.apply(*full_pair(s, t), w.detach()), w.detach().sum()) for s, t, w in levels
    ]
    total, weight = (torch.stack(part).sum() for part in zip(*parts, strict=True))
    return total / 4, weight


class _BinDivergence(torch.autograd.Function):
    """Keeps the two maps of logits and the weights."""

    @staticmethod
    def forward(ctx, student, target, weight):
        ctx.save_for_backward(student, target, weight)
        target = target.log_softmax(2)
        divergence = (target - student.log_softmax(2)).mul_(target.exp_()).sum((1, 2))
        divergence.clamp_(min=0.0)  # but for rounding
        return divergence.masked_fill_(weight == 0, 0.0).mul_(weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, target, weight = ctx.saved_tensors
        result = student.softmax(2).sub_(target.softmax(2)).mul_(weight[:, None, None] * grad)
        return result.masked_fill_((weight == 0)[:, None, None], 0.0), None, None


def _wide(vector):
    return vector[:, None, None]
