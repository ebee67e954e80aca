"""AT: attention transfer (Zagoruyko & Komodakis, ICLR 2017).

Shapes: N images, C channels, (H, W) cells of a level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .precision import full_precision

REDUCTIONS = ("sum", "mean")


@full_precision
def at_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    reduction: str = "sum",
) -> torch.Tensor:
    """Squared difference of normalised attention maps.

    The attention map of an image is ``a = mean_c F^2`` over its cells, divided by its L2 norm::

        "sum":  mean_n sum_i (a_s / ||a_s|| - a_t / ||a_t||)_i^2
        "mean": the same divided by the number of cells of the image (the authors' code)

    Source: the paper's activation-based transfer with the sum of squares over channels. The mean
    over cells shrinks with the resolution, so "sum" is the default (ours).

    Args:
        student: (N, C, H, W).
        teacher: (N, C', H, W), no gradient; C' may differ from C.
        mask: (N, 1, H, W) bool, cells outside do not exist; None = all cells.
        reduction: over cells.

    Returns:
        Scalar in [0, 2] for "sum".
    """
    difference = _attention(student, mask) - _attention(teacher, mask)
    squared = difference.square().sum(1)
    if reduction == "mean":
        cells = student[0, 0].numel() if mask is None else mask.flatten(1).sum(1).clamp(min=1)
        squared = squared / cells
    return squared.mean()


def _attention(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(N, H*W) of L2 norm 1, all 0 for a map of zeros."""
    if mask is not None:  # before the square: what lies outside may be infinite
        values = torch.where(mask, values, 0.0)
    return F.normalize(values.square().mean(1).flatten(1), dim=1)
