"""Losses between dense sigmoid predictions that BCKD (Yang et al., ICCV 2023) is made of.

CrossKD (Wang et al., CVPR 2024) compares classes by the same function.

Shapes: N images, A predictions a cell, K classes, (H, W) cells of a level. Boxes are XYXY in input
pixels. Targets get no gradient. Losses sum over all levels before they are divided, and are
computed in fp32 (float64 stays).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .precision import full_pair
from .set_prediction import generalized_iou


def qfl_kd(
    levels: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    normaliser: torch.Tensor | float,
) -> torch.Tensor:
    """Quality focal loss with a target's probabilities in place of box qualities, exponent 1.

    ::

        sum |p_s - p_t| (softplus(s) - p_t s) / normaliser,   p = sigmoid

    over levels, counted predictions and classes. The factor ``|p_s - p_t|`` has a gradient too.
    With ``d = p_s - p_t`` and the cross entropy ``b = softplus(s) - p_t s`` the gradient by a logit
    is ``sign(d) p_s (1 - p_s) b + |d| d``: at s = t the loss is 0 and has a cusp, an L1-like pull
    (0 at the very point), where that of
    :func:`~projects.kd.functional.output_kd.dense_class_loss` vanishes with the difference.
    Source: the published code of BCKD and CrossKD, as a formula.

    Args:
        levels: per level student logits (N, A, K, H, W), target logits of this shape, and
            (N, A, H, W) bool of those that count, None = all; what does not count may be infinite.
        normaliser: scalar, published: the number of positives, at least 1 an image.

    Returns:
        Scalar >= 0.
    """
    return sum(_QualityFocal.apply(*full_pair(s, t), counted) for s, t, counted in levels) / (
        normaliser
    )


class _QualityFocal(torch.autograd.Function):
    """Sum of |p_s - p_t| b; keeps the two logit maps and computes sigmoids again."""

    @staticmethod
    def forward(ctx, student, target, counted):
        ctx.save_for_backward(student, target, counted)
        entropy, difference = _cross_entropy(student, target)
        value = entropy.mul_(difference.abs_())
        if counted is not None:
            value.masked_fill_(~counted[:, :, None], 0.0)
        return value.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, target, counted = ctx.saved_tensors
        entropy, difference = _cross_entropy(student, target)
        probability = student.sigmoid()
        slope = entropy.mul_(difference.sign()).mul_(probability)
        # sign(d) b p (1 - p) + |d| d, the factor 1 - p as a difference
        result = torch.addcmul(slope, slope, probability, value=-1.0)
        result.addcmul_(difference.abs(), difference).mul_(grad)
        if counted is not None:
            result.masked_fill_(~counted[:, :, None], 0.0)
        return result, None, None


def _cross_entropy(student, target):
    """``softplus(s) - p_t s`` and ``p_s - p_t``, two new maps."""
    target = target.sigmoid()
    entropy = F.softplus(student).addcmul_(target, student, value=-1.0)
    return entropy, torch.sub(student.sigmoid(), target, out=target)


def giou_kd(
    levels: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    normaliser: torch.Tensor | float,
) -> torch.Tensor:
    """``sum w (1 - GIoU(b_s, b_t)) / normaliser`` over levels and predictions.

    Source: the box terms of BCKD and (on RetinaNet) CrossKD. GIoU has no unit, so that pixels here
    and strides there give the same value.

    Args:
        levels: per level student boxes (N, A, H, W, 4), target boxes, and constant weights w
            (N, A, H, W). Boxes of weight 0 must be finite. A target without area counts with
            weight 0 (ours: detectors that regress distances linearly can give one).
        normaliser: scalar, see :func:`qfl_kd`.

    Returns:
        Scalar >= 0.
    """
    total = 0.0
    for student, target, weight in levels:
        student, target = full_pair(student, target)
        weight = weight * has_area(target)
        total = total + (weight * (1 - generalized_iou(student, target))).sum()
    return total / normaliser


def has_area(boxes: torch.Tensor) -> torch.Tensor:
    """(...) bool of boxes (..., 4) XYXY: both sides are longer than 0."""
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


@torch.no_grad()
def disagreement(
    student: torch.Tensor, target: torch.Tensor, counted: torch.Tensor | None
) -> torch.Tensor:
    """BCKD's weight of a box: ``max_k |p_s - p_t|``, 0 where a prediction does not count.

    Args:
        student, target: logits (N, A, K, H, W).
        counted: (N, A, H, W) bool, None = all.

    Returns:
        (N, A, H, W) without gradient.
    """
    student, target = full_pair(student, target)
    weight = student.sigmoid().sub_(target.sigmoid()).abs_().amax(2)
    return weight if counted is None else weight.masked_fill_(~counted, 0.0)


@torch.no_grad()
def confidence(target: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """CrossKD's weight of a box: ``max_k p_t``, 0 where a prediction does not count.

    Shapes as in :func:`disagreement`.
    """
    weight = target.float() if target.dtype is not torch.float64 else target
    weight = weight.amax(2).sigmoid()
    return weight if counted is None else weight.masked_fill(~counted, 0.0)
