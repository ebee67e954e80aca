"""PI: pixel-wise distillation of class logits (the baseline of Liu et al., CVPR 2019).

Shapes: N images, C classes (or anchors x classes), (H, W) cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .precision import full_precision

REDUCTIONS = ("pixels", "elements")


@full_precision
def pi_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tau: float = 1.0,
    mask: torch.Tensor | None = None,
    reduction: str = "pixels",
) -> torch.Tensor:
    """KL divergence between the class distributions of each pixel.

    With ``p(z)`` the softmax of ``z / tau`` over classes::

        "pixels":   tau^2 / (N H W)   * sum over pixels of KL(p(teacher) || p(student))
        "elements": tau^2 / (N C H W) * the same sum

    Sources: Liu et al. name the loss; their code sums the cross entropy over the batch and divides
    by H*W only (the gradient of "pixels" times N); the code of IFVD and of CWD's authors takes the
    mean over all elements. ``tau`` is ours, theirs is 1.

    Args:
        student: (N, C, H, W) logits.
        teacher: (N, C, H, W) logits; no gradient.
        tau: temperature.
        mask: (N, 1, H, W) bool, pixels that count; None = all.
        reduction: normaliser; with a mask, H*W is the number of pixels inside.

    Returns:
        Scalar >= 0, 0 for equal distributions.
    """
    if mask is not None:
        student, teacher = (torch.where(mask, x, 0.0) for x in (student, teacher))
    log_student = F.log_softmax(student / tau, dim=1)
    log_teacher = F.log_softmax(teacher / tau, dim=1)
    total = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    pixels = _cells(student, mask)
    return total * tau**2 / (pixels * (student.shape[1] if reduction == "elements" else 1))


@full_precision
def bernoulli_pi_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tau: float = 1.0,
    beta: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over all logits of a detector that scores each class with a sigmoid.

    With ``p = sigmoid(z / tau)``, for beta = 0 the KL divergence of Bernoulli distributions, for
    beta >= 1 the quality focal form::

        tau^2 * sum |p_s - p_t|^beta * BCE(p_t, p_s)

    where the gradient flows through the factor too. Sources: the pixel-wise loss on detectors'
    class logits is Liu et al.'s (said in their repository); the factor is that of quality focal
    loss (Li et al., NeurIPS 2020), as CrossKD uses it: without it easy background decides.

    Args:
        student: (N, A * K, H, W) logits.
        teacher: the same shape; no gradient.
        tau: temperature.
        beta: exponent, 0 or at least 1.
        mask: (N, 1, H, W) bool, cells that count; None = all.

    Returns:
        Scalar >= 0, the sum; see :func:`teacher_confidence` for its normaliser.
    """
    if mask is not None:
        student, teacher = (torch.where(mask, x, 0.0) for x in (student, teacher))
    student, teacher = student / tau, teacher / tau
    p_teacher = teacher.sigmoid()
    loss = F.binary_cross_entropy_with_logits(student, p_teacher, reduction="none")
    if beta == 0.0:
        loss = loss - F.binary_cross_entropy_with_logits(teacher, p_teacher, reduction="none")
    else:
        factor = (student.sigmoid() - p_teacher).abs()
        loss = loss * (factor if beta == 1.0 else factor**beta)
    if mask is not None:
        loss = loss.masked_fill(~mask, 0.0)
    return loss.sum() * tau**2


@full_precision
def teacher_confidence(teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over cells of the highest class score: about the number of cells with an object.

    Ours: a normaliser that follows the teacher; papers divide by the number of positive anchors,
    which only the student's label assignment knows.

    Args:
        teacher: (N, A * K, H, W) logits.
        mask: (N, 1, H, W) bool; None = all cells.
    """
    best = teacher.amax(1, keepdim=True).sigmoid()
    return (best if mask is None else best.masked_fill(~mask, 0.0)).sum()


def _cells(values: torch.Tensor, mask: torch.Tensor | None):
    n, _, h, w = values.shape
    return n * h * w if mask is None else mask.sum().clamp(min=1)
