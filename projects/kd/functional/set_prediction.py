"""Boxes, matching costs and losses of detectors that predict a set (DETR and its relatives).

Shapes: N images, Q queries, T targets, K classes; boxes are (centre x, centre y, width, height) as
shares of the unpadded image unless a name says XYXY.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from ..errors import TrainingError


def cxcywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) centre and size to corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) corners to centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def matched_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """IoU (...) of boxes (..., 4) XYXY whose shapes broadcast; 0 where neither has an area."""
    overlap, union = _overlap_and_union(a, b)
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny)


def _overlap_and_union(a, b):
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.unbind(-1), b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    overlap = width * height
    return overlap, (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap


def generalized_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of boxes whose shapes broadcast.

    Args:
        a, b: (..., 4) XYXY with x1 <= x2 and y1 <= y2.

    Returns:
        (...) in [-1, 1]; -1 where both boxes and their hull are without area.
    """
    overlap, union = _overlap_and_union(a, b)
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.unbind(-1), b.unbind(-1)
    hull = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    hull = hull * (torch.maximum(ay2, by2) - torch.minimum(ay1, by1))
    smallest = torch.finfo(union.dtype).tiny
    return overlap / union.clamp(min=smallest) + union / hull.clamp(min=smallest) - 1


@torch.no_grad()
def box_cost(
    boxes: torch.Tensor, targets: torch.Tensor, l1_weight: float, giou_weight: float
) -> torch.Tensor:
    """``l1_weight * |b - t|_1 - giou_weight * GIoU(b, t)`` of all pairs.

    Args:
        boxes: (..., Q, 4).
        targets: (..., T, 4), leading dimensions broadcast.

    Returns:
        (..., Q, T) without gradient.
    """
    # generalized_iou one coordinate at a time and in place: a third of the time on a CPU
    rows, columns = (cxcywh_to_xyxy(x).movedim(-1, 0).contiguous() for x in (boxes, targets))
    ax1, ay1, ax2, ay2 = rows.unsqueeze(-1)
    bx1, by1, bx2, by2 = columns.unsqueeze(-2)
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    overlap = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0).mul_(width)
    hull = torch.maximum(ax2, bx2).sub_(torch.minimum(ax1, bx1))
    hull.mul_(torch.maximum(ay2, by2).sub_(torch.minimum(ay1, by1)))
    smallest = torch.finfo(hull.dtype).tiny
    union = ((ax2 - ax1) * (ay2 - ay1)).add((bx2 - bx1) * (by2 - by1)).sub_(overlap)
    giou = overlap.div_(union.clamp(min=smallest)).add_(union.div_(hull.clamp_(min=smallest)))
    return torch.cdist(boxes, targets, p=1.0).mul_(l1_weight).sub_(giou.sub_(1), alpha=giou_weight)


def focal_cost(logits: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0) -> torch.Tensor:
    """Focal loss of saying "yes" minus that of saying "no", for each class.

    Source: the matching cost of Deformable and Conditional DETR.

    Args:
        logits: (..., K).

    Returns:
        (..., K); the cost of a target of class c is column c.
    """
    p = logits.sigmoid()
    yes = alpha * (1 - p).pow(gamma) * F.softplus(-logits)
    no = (1 - alpha) * p.pow(gamma) * F.softplus(logits)
    return yes - no


def sigmoid_focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> torch.Tensor:
    """Focal loss (Lin et al., ICCV 2017) of each logit against 0 or 1; no reduction."""
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    wrong = p + targets - 2 * p * targets
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return balance * entropy * wrong.pow(gamma)


def box_losses(boxes: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 distance and 1 - GIoU of pairs of boxes: two tensors of shape (...) for (..., 4) boxes."""
    overlap = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))
    return (boxes - targets).abs().sum(-1), 1 - overlap


def assign(costs: Sequence[torch.Tensor], what: str = "Hungarian matching") -> list[np.ndarray]:
    """Minimum-cost assignments of all matrices, with one copy from the device for all of them.

    Args:
        costs: matrices (Q_i, T_i) on one device; Q_i and T_i may differ, and may be 0.
        what: for the error.

    Returns:
        Per matrix (2, min(Q_i, T_i)) int64, rows and columns of the pairs, rows ascending.

    Raises:
        TrainingError: a cost is NaN or infinite.
    """
    if not costs:
        return []
    flat = torch.cat([cost.detach().flatten().float() for cost in costs]).cpu().numpy()
    if not np.isfinite(flat).all():
        raise TrainingError(
            f"{what}: the cost matrix holds {np.count_nonzero(~np.isfinite(flat))} entries that "
            "are not finite; the predictions have become NaN or infinite."
        )
    pairs, start = [], 0
    for cost in costs:
        matrix = flat[start : start + cost.numel()].reshape(cost.shape)
        start += cost.numel()
        pairs.append(np.stack(linear_sum_assignment(matrix)).astype(np.int64))
    return pairs
