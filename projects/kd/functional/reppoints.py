"""RepPoints (Yang et al., ICCV 2019): boxes of point sets, and which locations learn which box.

Shapes: R locations, P points each, M ground-truth boxes. Boxes are XYXY. Point sets are stored as
(y, x) pairs, the order of the offsets of a deformable convolution.
"""

from __future__ import annotations

import torch

# under the root of a variance: the gradient of a root at 0 is infinite (ours)
VARIANCE_FLOOR = 1e-6


def minmax_boxes(points: torch.Tensor) -> torch.Tensor:
    """(R, P, 2) points (y, x) to the (R, 4) boxes XYXY around them."""
    low, high = points.amin(1), points.amax(1)
    return torch.stack([low[:, 1], low[:, 0], high[:, 1], high[:, 0]], dim=1)


def moment_boxes(points: torch.Tensor, transfer: torch.Tensor) -> torch.Tensor:
    """Boxes from first and second moments.

    The centre is the mean; half a side is the standard deviation (with P - 1) times
    ``exp(transfer)``.

    Args:
        points: (R, P, 2) as (y, x).
        transfer: (2,) logarithmic factors of half width and half height, learnt.

    Returns:
        (R, 4) XYXY.
    """
    centre = points.mean(1)
    half = (points.var(1) + VARIANCE_FLOOR).sqrt() * transfer.flip(0).exp()
    low, high = centre - half, centre + half
    return torch.stack([low[:, 1], low[:, 0], high[:, 1], high[:, 0]], dim=1)


@torch.no_grad()
def nearest_point(
    centres: torch.Tensor, strides: torch.Tensor, boxes: torch.Tensor, scale: float = 4.0
) -> torch.Tensor:
    """First stage: each box is learnt at the one location nearest to its centre.

    The level of a box is ``floor(log2(sqrt(w * h) / scale))``, cut to the levels there are; level
    l has stride 2^l. Distances are divided by the box's sides. Of boxes that claim the same
    location the nearest wins, the others are learnt nowhere (the paper's section 4.2, with the
    scale of the authors' code, recalled).

    Args:
        centres: (R, 2) locations XY in pixels.
        strides: (R,) of their levels, powers of two.
        boxes: (M, 4).
        scale: box sizes in strides that a level starts from.

    Returns:
        (R,) index of the box, -1 = background.
    """
    if not len(boxes):
        return torch.full((len(centres),), -1, dtype=torch.long, device=centres.device)
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
    wanted = ((sides / scale).log2().sum(1) / 2).floor()
    levels = strides.log2().round()
    wanted = wanted.clamp(levels.min(), levels.max())
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    distance = ((centres[None] - middle[:, None]) / sides[:, None]).norm(dim=2)
    distance = distance.masked_fill(levels[None] != wanted[:, None], float("inf"))
    nearest, place = distance.min(1)
    claims = torch.full_like(distance, float("inf")).scatter_(1, place[:, None], nearest[:, None])
    best, index = claims.min(0)
    return torch.where(best.isfinite(), index, -1)


@torch.no_grad()
def assign_by_iou(iou: torch.Tensor, low: float = 0.4, high: float = 0.5) -> torch.Tensor:
    """Second stage: the IoU of the first stage's boxes decides.

    At least ``high``: the box of highest IoU; below ``low``: background; between: ignored. Each
    ground-truth box also takes the locations of its highest IoU, if that is above 0.

    Args:
        iou: (M, R) of ground-truth boxes and first-stage boxes.
        low, high: thresholds.

    Returns:
        (R,) index of the box, -1 = background, -2 = ignored.
    """
    if not iou.shape[0]:
        return torch.full((iou.shape[1],), -1, dtype=torch.long, device=iou.device)
    best, index = iou.max(0)
    result = torch.where(best >= high, index, -2)
    result[best < low] = -1
    top = iou.amax(1, keepdim=True)
    own = (iou == top) & (top > 0)
    # of several boxes that have their highest IoU here, the one of highest IoU
    strongest = torch.where(own, iou, -1.0).argmax(0)
    return torch.where(own.any(0), strongest, result)
