"""Distillation of class and box predictions, of a teacher or of an assistant.

Public material on ScaleKD (Zhu et al., CVPR 2023) names a class and a box term between predictions
and gives no form for them. The forms here are ours, reasons stand at each function.

Shapes: N images, A predictions a cell, K classes, (H, W) cells of a level, R regions. Boxes are
XYXY in input pixels. Targets get no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .precision import full_pair, full_precision

EPSILON = 1e-6  # least denominator of the weighted means
LEAST_PROBABILITY = 0.05  # boxes of predictions below it are noise; detectron2's test threshold


def dense_class_loss(
    levels: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
) -> torch.Tensor:
    """Divergence of sigmoid classes where student and target disagree.

    ::

        sum w KL(p_t || p_s) / max(sum w, 1e-6),   w = (p_t - p_s)^2

    over all cells, predictions and classes of all levels together; KL is that of two Bernoulli
    variables, p the sigmoids, and w a constant. The weight (as in quality focal loss) takes away
    the background, on which both agree. KL is cross entropy less the target's entropy: the same
    gradient, and 0 where both agree. There w is 0 as well, hence the least denominator: at its
    start an assistant says exactly what the student says.

    Args:
        levels: per level student logits (N, A, K, H, W), target logits of this shape, and
            (N, A, H, W) bool of those that count, None = all.

    Returns:
        Scalar >= 0 in fp32. Differences of less than some 1e-3 between logits drown in rounding;
        the gradient, ``w (p_s - p_t)`` over the denominator, does not.
    """
    parts = [_WeightedKL.apply(*full_pair(s, t), counted) for s, t, counted in levels]
    total, weight = (torch.stack(part).sum() for part in zip(*parts, strict=True))
    return total / weight.clamp(min=EPSILON)


class _WeightedKL(torch.autograd.Function):
    """Sum of w KL and sum of w; keeps the two logit maps and computes sigmoids again."""

    @staticmethod
    def forward(ctx, student, target, counted):
        probability = target.sigmoid()
        weight = _weight(student, probability, counted)
        divergence = F.softplus(student).sub_(F.softplus(target))
        divergence.sub_(probability.mul_(student - target)).clamp_(min=0.0)  # but for rounding
        if counted is not None:  # what does not count may be infinite
            divergence.masked_fill_(~counted[:, :, None], 0.0)
        ctx.save_for_backward(student, target, counted)
        total = weight.sum()
        ctx.mark_non_differentiable(total)
        return divergence.mul_(weight).sum(), total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        student, target, counted = ctx.saved_tensors
        difference = student.sigmoid().sub_(target.sigmoid())
        # w (p_s - p_t) = (p_s - p_t)^3
        result = difference.pow(3).mul_(grad)
        if counted is not None:
            result.masked_fill_(~counted[:, :, None], 0.0)
        return result, None, None


def _weight(student, probability, counted):
    weight = student.sigmoid().sub_(probability).square_()
    return weight if counted is None else weight.masked_fill_(~counted[:, :, None], 0.0)


def dense_box_loss(
    levels: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Smooth L1 of decoded boxes in units of the target's sides.

    ::

        sum w smooth_l1((b_s - b_t) / (W_t, H_t, W_t, H_t)) / max(sum w, 1e-6)

    over all levels together, summed over the four coordinates, quadratic below a tenth of a side
    (beta = 0.1). Its gradient vanishes with the difference. That of a GIoU loss does not: it has
    the same size however little two boxes differ. An assistant predicts through the student's own
    features and head, so that a constant pull towards it never closes the difference; measured, it
    drove the student's own box loss from 0.4 to 1.0.

    Args:
        levels: per level student boxes (N, A, H, W, 4), target boxes, and weights w (N, A, H, W),
            see :func:`box_weight`. Boxes of weight 0 must be finite. Target sides below a pixel
            count as one.

    Returns:
        Scalar >= 0 in fp32.
    """
    parts = []
    for student, target, weight in levels:
        student, target = full_pair(student, target)
        sides = (target[..., 2:] - target[..., :2]).clamp(min=1.0)
        units = torch.cat([sides, sides], dim=-1)
        loss = F.smooth_l1_loss(student / units, target / units, beta=0.1, reduction="none")
        parts.append(((loss.sum(-1) * weight).sum(), weight.sum()))
    total, weight = (torch.stack(part).sum() for part in zip(*parts, strict=True))
    return total / weight.clamp(min=EPSILON)


@torch.no_grad()
def box_weight(
    target: torch.Tensor,
    counted: torch.Tensor | None,
    positive: torch.Tensor | None,
    confident: bool = True,
) -> torch.Tensor:
    """Weight of a predicted box: the target's largest class probability.

    0 where it is below 0.05 and ground truth assigns no object either.

    Args:
        target: logits (N, A, K, H, W).
        counted, positive: (N, A, H, W) bool, None = all and none.
        confident: False: 0 wherever ground truth assigns no object.

    Returns:
        (N, A, H, W).
    """
    best = target.float().amax(2).sigmoid()
    use = (best >= LEAST_PROBABILITY) & confident
    if positive is not None:
        use = use | positive
    if counted is not None:
        use = use & counted
    return best.masked_fill(~use, 0.0)


@full_precision
def region_class_loss(
    student: torch.Tensor, target: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """``T^2 mean_r KL(softmax(z_t / T) || softmax(z_s / T))``; 0 without regions.

    Args:
        student, target: (R, K + 1) logits.
        temperature: T.
    """
    divergence = F.kl_div(
        (student / temperature).log_softmax(1),
        (target.detach() / temperature).log_softmax(1),
        reduction="sum",
        log_target=True,
    )
    return divergence * (temperature**2 / max(len(student), 1))


@full_precision
def region_box_loss(
    student: torch.Tensor, target: torch.Tensor, foreground: torch.Tensor
) -> torch.Tensor:
    """Smooth L1 (beta 1, as in Fast R-CNN) summed over the four deltas, mean over the foreground.

    Args:
        student, target: (R, 4) box deltas.
        foreground: (R,) bool.

    Returns:
        Scalar, 0 without foreground.
    """
    loss = F.smooth_l1_loss(student, target.detach(), reduction="none").sum(1)
    return loss.masked_fill(~foreground, 0.0).sum() / foreground.sum().clamp(min=1)


def jitter_boxes(boxes: torch.Tensor, distance: float) -> torch.Tensor:
    """Boxes moved by ``distance`` pixels along the image's diagonal, each forward or back.

    Source: the experiment of ScaleKD's Table 1 (teacher boxes off by 6 or 12 pixels). That noise
    moves boxes along the diagonal is public; that its sign is drawn for each box, and that the
    pixels are counted along the diagonal (dx = dy = distance / sqrt 2), is ours: a shift common to
    all boxes would be a bias that the student can learn, not noise.

    Args:
        boxes: (..., 4).
        distance: in input pixels.
    """
    if not distance:
        return boxes
    sign = torch.randint(0, 2, boxes.shape[:-1], device=boxes.device) * 2 - 1
    return boxes + (sign * (distance / math.sqrt(2)))[..., None]
