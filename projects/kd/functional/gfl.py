"""Generalised focal loss (Li et al., NeurIPS 2020): quality, distributions of box sides, boxes.

Shapes: R locations, K classes, n + 1 bins a side. Boxes are XYXY in pixels; sides are distances
from a point to left, top, right and bottom in strides of its level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def quality_focal_loss(
    logits: torch.Tensor, labels: torch.Tensor, quality: torch.Tensor, beta: float = 2.0
) -> torch.Tensor:
    """Equation 5: ``|y - p|^beta * BCE(p, y)``, where y is the box's IoU at the label, else 0.

    Args:
        logits: (R, K).
        labels: (R,) class, K = background.
        quality: (R,) in [0, 1], read for foreground only, no gradient.
        beta: exponent.

    Returns:
        (R,) sums over classes.
    """
    target = F.one_hot(labels, logits.shape[1] + 1)[:, :-1] * quality.detach()[:, None]
    factor = (target - logits.sigmoid()).abs().pow(beta)
    loss = F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none")
    return (loss * factor).sum(1)


def distribution_focal_loss(bins: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Equation 6: cross-entropy with the two bins beside the target, weighted by nearness.

    Args:
        bins: (R, n + 1) logits of the side lengths 0, 1, ..., n.
        target: (R,) side lengths, cut to [0, n - 0.1] as the authors' code does (recalled).

    Returns:
        (R,).
    """
    target = target.clamp(0, bins.shape[1] - 1 - 0.1)
    low = target.long()
    share = target - low
    below = F.cross_entropy(bins, low, reduction="none")
    above = F.cross_entropy(bins, low + 1, reduction="none")
    return below * (1 - share) + above * share


def integral(bins: torch.Tensor) -> torch.Tensor:
    """(..., 4 * (n + 1)) logits to (..., 4) expected side lengths (equation 4)."""
    # the number in full: of no locations, an exported graph could not tell it
    probability = bins.unflatten(-1, (4, int(bins.shape[-1]) // 4)).softmax(-1)
    lengths = torch.arange(probability.shape[-1], device=bins.device, dtype=bins.dtype)
    return probability @ lengths


def sides_to_boxes(points: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """(R, 2) points XY and (R, 4) sides in pixels to (R, 4) boxes."""
    return torch.cat([points - sides[:, :2], points + sides[:, 2:]], dim=1)


def boxes_to_sides(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`sides_to_boxes`; negative for a point outside of its box."""
    return torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], dim=1)
