"""Masked L2 between feature maps: the simplest imitation loss.

Shapes: N images, C channels, (H, W) cells.
"""

from __future__ import annotations

import torch

from .precision import full_precision


@full_precision
def mimic_loss(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared difference over channels and selected cells.

    ``sum_{cells in mask} sum_c (s - t)^2 / (C * number of selected cells)``; exactly 0 when no
    cell is selected. Source: ours (the control experiment; hints of FitNets without a regressor).

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W), no gradient.
        mask: (N, 1, H, W) bool, None = all cells.

    Returns:
        Scalar.
    """
    difference = student - teacher
    if mask is None:
        return difference.square().mean()
    # chosen before the square: a masked cell may hold inf or NaN, in the gradient as well
    squared = torch.where(mask, difference, 0.0).square()
    return squared.sum() / (mask.sum().clamp(min=1) * student.shape[1])
