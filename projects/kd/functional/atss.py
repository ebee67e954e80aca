"""ATSS: which locations are responsible for a box (Zhang et al., CVPR 2020, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .set_prediction import matched_iou


class Candidates(NamedTuple):
    """What ATSS looks at for M boxes and A anchors of all levels joined.

    Attributes:
        iou: (M, A).
        index: (M, C) the boxes' candidates, places of anchors.
        threshold: (M,) mean + standard deviation (with n - 1; 0 for a single candidate) of their
            IoU.
    """

    iou: torch.Tensor
    index: torch.Tensor
    threshold: torch.Tensor


@torch.no_grad()
def atss_candidates(
    anchors: Sequence[torch.Tensor], boxes: torch.Tensor, topk: int = 9
) -> Candidates:
    """The ``topk`` anchors a level whose centres are nearest to a box's own.

    Args:
        anchors: a level's (A_l, 4) XYXY in pixels, one anchor a location.
        boxes: (M, 4) XYXY in pixels.
        topk: candidates a level.
    """
    every = torch.cat(list(anchors))
    iou = matched_iou(boxes[:, None], every[None])
    middles, centres = ((x[:, :2] + x[:, 2:]) / 2 for x in (boxes, every))
    # by differences: the faster form by products errs by some 0.05 pixels far from the origin
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(middles, centres, compute_mode=exact)
    chosen, start = [], 0
    for level in anchors:
        part = distance[:, start : start + len(level)]
        chosen.append(part.topk(min(topk, len(level)), dim=1, largest=False).indices + start)
        start += len(level)
    index = torch.cat(chosen, dim=1)
    found = iou.gather(1, index)
    several = len(boxes) and index.shape[1] > 1
    spread = found.std(1) if several else torch.zeros_like(found[:, 0])
    return Candidates(iou, index, found.mean(1) + spread)


@torch.no_grad()
def atss_assign(
    anchors: Sequence[torch.Tensor],
    boxes: torch.Tensor,
    topk: int = 9,
    candidates: Candidates | None = None,
) -> torch.Tensor:
    """Assign ground-truth boxes to anchors by statistics of the IoU.

    A candidate (see :func:`atss_candidates`) is positive where its IoU reaches the box's threshold
    and its centre lies inside of the box. An anchor that several boxes claim goes to the one of
    highest IoU.

    Args:
        anchors, boxes, topk: see :func:`atss_candidates`.
        candidates: what it gave, where it was called already.

    Returns:
        (A,) index of the box of each anchor, all levels joined; -1 = background.
    """
    every = torch.cat(list(anchors))
    if not len(boxes):
        return torch.full((len(every),), -1, dtype=torch.long, device=every.device)
    iou, index, threshold = candidates or atss_candidates(anchors, boxes, topk)
    centres = (every[:, :2] + every[:, 2:]) / 2
    inside = torch.cat([centres[None] - boxes[:, None, :2], boxes[:, None, 2:] - centres[None]], 2)
    found = iou.gather(1, index)
    good = (found >= threshold[:, None]) & (inside.amin(2) > 0).gather(1, index)
    claims = torch.full_like(iou, -1.0).scatter_(1, index, torch.where(good, found, -1.0))
    best, owner = claims.max(0)
    return torch.where(best >= 0, owner, -1)
