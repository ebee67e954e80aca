"""CWD: channel-wise distillation (Shu et al., ICCV 2021).

Shapes: N images, C channels, (H, W) cells of a level.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .precision import full_precision

EPSILON = 1e-6  # added to variances


@full_precision
def cwd_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tau: float = 1.0,
    mask: torch.Tensor | None = None,
    standardize: bool = False,
) -> torch.Tensor:
    """KL divergence between channels read as distributions over positions.

    With ``phi(y)`` the softmax of ``y / tau`` over the H*W cells of each image and channel::

        tau^2 / (N C) * sum_{n, c} KL(phi(teacher_nc) || phi(student_nc))

    Normalised by N*C, not by H*W, and blind to a constant added to a channel. A 1x1 map gives 0.
    Source: the paper's loss with the true KL (published detection code keeps the teacher's entropy
    in it: the same gradient with a large constant added). The KL is evaluated as
    ``sum phi_t (t - s) / tau - lse(t / tau) + lse(s / tau)``, lse = log-sum-exp (ours).

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W); gets no gradient.
        tau: temperature.
        mask: (N, 1, H, W) bool, cells outside take no part in the softmax; None = all cells. Each
            image needs a cell inside. Ours: the paper includes padding.
        standardize: first bring every channel of either side to zero mean and unit deviation, see
            :func:`standardise` (ours): a softmax is as sharp as its channel is wide, so that of
            maps without a norm a few wide channels make most of the loss.

    Returns:
        Scalar >= 0 up to rounding, exactly 0 for equal inputs. Its gradient, for the student (as it
        enters the softmax), is ``tau / (N C) * (phi(student) - phi(teacher))``.
    """
    if standardize:
        student, teacher = standardise(student, mask), standardise(teacher.detach(), mask)
    return _SpatialKL.apply(student, teacher, float(tau), mask)


def standardise(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Every channel with mean 0 and deviation 1 over the cells of all images of the batch.

    ``(x - mean) / sqrt(variance + 1e-6)``, biased, as a batch norm without memory does: images keep
    their differences. Statistics are those of this process's batch, and carry the gradient.

    Args:
        values: (N, C, H, W).
        mask: (N, 1, H, W) bool, the cells that count, at least one; the result is 0 elsewhere.
            None = all.
    """
    if mask is None:
        variance, mean = torch.var_mean(values, (0, 2, 3), correction=0, keepdim=True)
        return (values - mean) * (variance + EPSILON).rsqrt()
    inside = torch.where(mask, values, 0.0)  # what lies outside may be infinite
    mean = inside.sum((0, 2, 3), keepdim=True) / mask.sum()
    centred = torch.where(mask, inside - mean, 0.0)
    variance = centred.square().sum((0, 2, 3), keepdim=True) / mask.sum()
    return centred * (variance + EPSILON).rsqrt()


class _SpatialKL(torch.autograd.Function):
    """Keeps the two maps and two (N, C, 1) vectors; backward computes the softmax again."""

    @staticmethod
    def forward(ctx, student, teacher, tau, mask):
        lse_student = _exp_total_lse(student, tau, mask)[2]
        weights, total, lse_teacher = _exp_total_lse(teacher, tau, mask)
        difference = (teacher - student).flatten(2)
        if mask is not None:  # what lies outside may be infinite
            difference.masked_fill_(~mask.flatten(2), 0.0)
        mean = weights.mul_(difference).sum(2, keepdim=True) / total
        ctx.save_for_backward(student, teacher, lse_student, lse_teacher, mask)
        ctx.tau = tau
        return (mean / tau - lse_teacher + lse_student).mean() * tau**2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, teacher, lse_student, lse_teacher, mask = ctx.saved_tensors
        result = _exp(_logits(student, ctx.tau, mask), lse_student)
        result.sub_(_exp(_logits(teacher, ctx.tau, mask), lse_teacher))
        result.mul_(grad * (ctx.tau / lse_student.numel()))
        return result.view(student.shape), None, None, None


def _logits(values, tau, mask):
    """(N, C, H*W), a new tensor; -inf outside of the mask."""
    logits = values.flatten(2) / tau
    return logits if mask is None else logits.masked_fill_(~mask.flatten(2), float("-inf"))


def _exp(logits, base):
    """exp(logits - base) in place, never below exp(-80): denormal numbers are 30 times slower."""
    return logits.sub_(base).clamp_(min=-80.0).exp_()


def _exp_total_lse(values, tau, mask):
    """exp(logits - peak) (N, C, H*W), its sum and the log-sum-exp of the logits (N, C, 1)."""
    logits = _logits(values, tau, mask)
    peak = logits.amax(2, keepdim=True)
    weights = _exp(logits, peak)
    total = weights.sum(2, keepdim=True)
    return weights, total, total.log() + peak
