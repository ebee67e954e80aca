"""LD: distributions of box sides, at positives and in the valuable localisation region.

Source: Zheng et al., CVPR 2022 and TPAMI 2023 (arXiv 2102.12252, 2204.05957); forms as in the
authors' code, where they differ from the papers it is said.

Shapes: R locations, K classes, n + 1 bins a side, M boxes, A anchors of all levels joined. Boxes
are XYXY in input pixels. Targets get no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .atss import Candidates
from .precision import full_precision

DISTANCES = ("paper", "released")
LOWEST_SHARE = 0.25  # of the assignment's threshold, where the region begins


@full_precision
def side_divergence(
    student: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, temperature: float = 10.0
) -> torch.Tensor:
    """``sum_r w_r sum_sides T^2 mean_bins KL(softmax(t / T) || softmax(s / T))``.

    The mean over bins, not their sum, is the published code's. There the result is divided by 4 at
    positives and by 16 in the region, and by neither the number of locations nor the weights.

    Args:
        student, target: (R, 4, n + 1) logits of bins.
        weight: (R,), no gradient.
        temperature: T.

    Returns:
        Scalar >= 0; 0 in the graph without locations.
    """
    divergence = _divergence(student, target, temperature).mean(2).sum(1)
    return (divergence * weight.detach()).sum() * temperature**2


@full_precision
def class_divergence(
    student: torch.Tensor, target: torch.Tensor, temperature: float = 2.0
) -> torch.Tensor:
    """``sum_r T^2 mean_k KL(softmax(t / T) || softmax(s / T))`` of logits (R, K), over classes.

    Published: divided by the level's number of positives, levels summed.
    """
    return _divergence(student, target, temperature).mean(1).sum() * temperature**2


def _divergence(student, target, temperature):
    return F.kl_div(
        (student / temperature).log_softmax(-1),
        (target.detach() / temperature).log_softmax(-1),
        reduction="none",
        log_target=True,
    )


@torch.no_grad()
def valuable_region(
    anchors: torch.Tensor, boxes: torch.Tensor, candidates: Candidates, distance: str = "paper"
) -> torch.Tensor:
    """Weight of each anchor in the valuable localisation region (VLR): 0 outside of it.

    An anchor is in the region of a box where ``0.25 t <= D < t``, t the box's ATSS threshold,
    whether its centre lies in the box or not. Its weight is the largest IoU among the boxes in
    whose region it is. The region may hold positives, as released.

    Args:
        anchors: (A, 4).
        boxes: (M, 4); without any the weights are 0 (the release ends in an error).
        candidates: of these boxes and anchors.
        distance: D. "paper": DIoU = IoU - rho^2 / c^2, rho the distance of the centres and c the
            diagonal of the hull. "released": the overlap as a part of the anchor in place of IoU.

    Returns:
        (A,) in [0, 1].
    """
    if not len(boxes):
        return anchors.new_zeros(len(anchors))
    overlap = candidates.iou
    if distance == "released":
        own, others = ((x[:, 2:] - x[:, :2]).prod(1) for x in (anchors, boxes))
        # intersection = IoU (a + b) / (1 + IoU)
        overlap = overlap * (own + others[:, None]) / ((1 + overlap) * own)
    nearness = overlap - _centre_distance(boxes, anchors)
    threshold = candidates.threshold[:, None]
    inside = (nearness >= LOWEST_SHARE * threshold) & (nearness < threshold)
    return candidates.iou.masked_fill(~inside, 0.0).amax(0)


def _centre_distance(boxes, anchors):
    """rho^2 / c^2 (M, A)."""
    low = torch.minimum(boxes[:, None, :2], anchors[None, :, :2])
    high = torch.maximum(boxes[:, None, 2:], anchors[None, :, 2:])
    diagonal = (high - low).square_().sum(2).clamp_(min=torch.finfo(boxes.dtype).tiny)
    centres = [(x[:, :2] + x[:, 2:]) / 2 for x in (boxes, anchors)]
    return (centres[0][:, None] - centres[1][None]).square_().sum(2) / diagonal
