"""DIST (Huang et al., NeurIPS 2022): correlation of predictions within rows and within columns.

Shapes: R rows (cells or regions) and C columns (classes, or anchors times classes) of a matrix of
probabilities; N images, (H, W) cells of a level. Targets get no gradient.

``rho(a, b)`` is Pearson's correlation: the product of two centred vectors over the product of their
lengths plus 1e-8. ``inter = 1 - mean_rows rho`` and ``intra = 1 - mean_columns rho``; statistics
are those of this process's batch, as published.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .precision import full_pair, full_precision

EPSILON = 1e-8  # beside the product of the lengths, as published
SHORTEST = 1e-12  # below it a centred vector has no direction


@full_precision
def relation_losses(
    student: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``inter`` and ``intra`` of two matrices of probabilities (equations 9 and 10 as recalled).

    Args:
        student, target: (R, C), e.g. softmax probabilities of regions.

    Returns:
        Two scalars in [0, 2], 0 for equal matrices. ``intra`` is 0 with fewer than two rows and
        ``inter`` with fewer than two columns or no row (ours: there is nothing to correlate).
    """
    target = target.detach()
    rows, columns = student.shape
    nothing = student.sum() * 0.0
    inter = _one_less_correlation(student, target, 1) if rows and columns > 1 else nothing
    return inter, _one_less_correlation(student, target, 0) if rows > 1 else nothing


def _one_less_correlation(a, b, dim):
    a, b = (x - x.mean(dim, keepdim=True) for x in (a, b))
    # a length of 0 has no derivative
    lengths = [x.square().sum(dim).clamp(min=SHORTEST**2).sqrt() for x in (a, b)]
    return 1 - ((a * b).sum(dim) / (lengths[0] * lengths[1] + EPSILON)).mean()


def dense_relation_losses(
    student: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`relation_losses` of the sigmoids of a level's logits: a row a cell, a column a logit.

    Args:
        student, target: (N, A * K, H, W) logits.
        mask: (N, 1, H, W) bool, cells that are rows (ours); None = all, as published. The others
            may be infinite.

    Returns:
        ``inter`` and ``intra`` in fp32 (float64 stays). Between forward and backward only the two
        maps of logits are kept.
    """
    return _DenseRelations.apply(*full_pair(student, target), mask)


class _DenseRelations(torch.autograd.Function):
    """Both terms of sigmoids; the gradient is linear in the two maps of probabilities."""

    @staticmethod
    def forward(ctx, student, target, mask):
        p, q = (_probability(x, mask) for x in (student, target))
        columns = p.shape[1]
        rows = p.numel() // columns if mask is None else mask.sum()
        size = torch.as_tensor(rows, dtype=p.dtype, device=p.device)
        a, mean_p = _centred(p, mask, (1,), columns)
        b, mean_q = _centred(q, mask, (1,), columns)
        inter = _relation(a, b, (1,), size.clamp(min=1), (size > 0) & (columns > 1))
        by_row = (mean_p, mean_q, *inter[1:])
        del a, b
        p, mean_p = _centred(p, mask, (0, 2, 3), size.clamp(min=1), p)
        q, mean_q = _centred(q, mask, (0, 2, 3), size.clamp(min=1), q)
        intra = _relation(p, q, (0, 2, 3), columns, size > 1)
        ctx.save_for_backward(student, target, mask, *by_row, mean_p, mean_q, *intra[1:])
        return inter[0], intra[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_inter, grad_intra):
        student, target, mask, *rest = ctx.saved_tensors
        p, q = (_probability(x, mask) for x in (student, target))
        result = torch.zeros_like(p)
        for grad, (mean_p, mean_q, on_p, on_q) in ((grad_inter, rest[:4]), (grad_intra, rest[4:])):
            # on_p (p - mean_p) + on_q (q - mean_q)
            result.addcmul_(p, on_p * grad).addcmul_(q, on_q * grad)
            result.sub_((on_p * mean_p + on_q * mean_q) * grad)
        result.mul_(p).mul_(p.neg_().add_(1))
        if mask is not None:
            result.masked_fill_(~mask, 0.0)
        return result, None, None


def _probability(logits, mask):
    p = logits.sigmoid()
    return p if mask is None else p.masked_fill_(~mask, 0.0)


def _centred(values, mask, dims, count, out=None):
    """Less their mean over some dimensions, and that mean."""
    mean = values.sum(dims, keepdim=True) / count
    centred = torch.sub(values, mean, out=out)
    return (centred if mask is None else centred.masked_fill_(~mask, 0.0)), mean


def _relation(a, b, dims, count, defined):
    """``1 - mean rho``, and its slopes by ``a`` and ``b``; overwrites ``a``."""
    length_a, length_b = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (a, b))
    length_a = length_a.clamp_(min=SHORTEST)
    product = a.mul_(b).sum(dims, keepdim=True)
    scale = length_a * length_b + EPSILON
    defined = defined.to(a)
    share = defined / count
    on_b = -share / scale
    on_a = share * product * length_b / (scale.square() * length_a)
    return defined - (product / scale).sum() * share, on_a, on_b
