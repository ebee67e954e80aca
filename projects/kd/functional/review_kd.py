"""ReviewKD: the hierarchical context loss (Chen et al., CVPR 2021, arXiv 2104.09044).

Shapes: N images, C channels, (H, W) cells of a level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .precision import full_precision

POOLS = (4, 2, 1)  # sides of the pooled maps


@full_precision
def hcl_loss(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared difference of a level at full size and of its means over coarse grids.

    ``(e + sum_k 2^-k e_k) / (1 + sum_k 2^-k)``, e the mean square at full size and e_k that of both
    maps averaged over the bins of a grid of 4x4, 2x2 and 1x1 (adaptive pooling); k = 1, 2, ..
    counts those used. A grid is left out where its side is not below H (the width is not asked, as
    published). Formulas as in the released code, which was executed on the inputs of the tests.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W); gets no gradient.
        mask: (N, 1, H, W) bool (ours): means are over these cells, and over bins that hold any;
            None = all, as published.

    Returns:
        Scalar, 0 for equal maps.
    """
    difference = student - teacher.detach()
    if mask is not None:  # what lies outside may be infinite
        difference = difference.masked_fill(~mask, 0.0)
        mask = mask.to(difference.dtype)
    total, share, factor = _mean_square(difference, mask), 1.0, 1.0
    for side in POOLS:
        if side >= difference.shape[2]:
            continue
        factor = factor / 2
        # pooling is linear: the mean of differences is the difference of means
        pooled = F.adaptive_avg_pool2d(difference, side)
        part = None if mask is None else F.adaptive_avg_pool2d(mask, side)
        if part is not None:
            pooled = pooled / part.masked_fill(part == 0, 1.0)
            part = (part > 0).to(pooled.dtype)
        total = total + factor * _mean_square(pooled, part)
        share += factor
    return total / share


def _mean_square(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the elements inside of the mask, whose outside is 0 already."""
    if mask is None:
        return values.square().mean()
    return values.square().sum() / (mask.sum() * values.shape[1]).clamp(min=1)
