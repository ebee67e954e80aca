"""CWD: channel-wise distillation (Shu et al., ICCV 2021).

Shapes: N images, C channels, (H, W) cells of a level.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .precision import full_precision


@full_precision
def cwd_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tau: float = 1.0,
    mask: torch.Tensor | None = None,
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
            image needs a cell inside. Ours: the paper lets padding take part.

    Returns:
        Scalar >= 0 up to rounding, exactly 0 for equal inputs. Its gradient, for the student, is
        ``tau / (N C) * (phi(student) - phi(teacher))``.
    """
    return _SpatialKL.apply(student, teacher, float(tau), mask)


class _SpatialKL(torch.autograd.Function):
    """Keeps the two maps and two (N, C, 1) vectors; the softmax is computed anew in backward."""

    @staticmethod
    def forward(ctx, student, teacher, tau, mask):
        lse_student = _log_sum_exp(student, tau, mask)
        lse_teacher = _log_sum_exp(teacher, tau, mask)
        difference = (teacher - student).flatten(2)
        if mask is not None:  # what lies outside may be infinite
            difference.masked_fill_(~mask.flatten(2), 0.0)
        difference.mul_(_softmax(teacher, lse_teacher, tau, mask))
        divergence = difference.sum(2, keepdim=True) / tau - lse_teacher + lse_student
        ctx.save_for_backward(student, teacher, lse_student, lse_teacher, mask)
        ctx.tau = tau
        return divergence.mean() * tau**2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, teacher, lse_student, lse_teacher, mask = ctx.saved_tensors
        result = _softmax(student, lse_student, ctx.tau, mask)
        result.sub_(_softmax(teacher, lse_teacher, ctx.tau, mask))
        result.mul_(grad * (ctx.tau / lse_student.numel()))
        return result.view(student.shape), None, None, None


def _log_sum_exp(values, tau, mask):
    return torch.logsumexp(_logits(values, tau, mask), dim=2, keepdim=True)


def _softmax(values, lse, tau, mask):
    return _logits(values, tau, mask).sub_(lse).exp_()


def _logits(values, tau, mask):
    """(N, C, H*W), a new tensor; -inf outside of the mask."""
    logits = values.flatten(2) / tau
    return logits if mask is None else logits.masked_fill_(~mask.flatten(2), float("-inf"))
