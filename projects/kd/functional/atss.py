"""ATSS: which locations are responsible for a box (Zhang et al., CVPR 2020, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, pairwise_iou


@torch.no_grad()
def atss_assign(anchors: Sequence[torch.Tensor], boxes: torch.Tensor, topk: int = 9):
    """Assign ground-truth boxes to anchors by statistics of the IoU.

    Candidates of a box are the ``topk`` anchors a level whose centres are nearest to its own. A
    candidate is positive where its IoU reaches mean + standard deviation (with n - 1) of all the
    box's candidates and its centre lies inside of the box. An anchor that several boxes claim goes
    to the one of highest IoU.

    Args:
        anchors: a level's (A_l, 4) XYXY in pixels, one anchor a location.
        boxes: (M, 4) XYXY in pixels.
        topk: candidates a level.

    Returns:
        (A,) index of the box of each anchor, all levels joined; -1 = background.
    """
    every = torch.cat(list(anchors))
    if not len(boxes):
        return torch.full((len(every),), -1, dtype=torch.long, device=every.device)
    iou = pairwise_iou(Boxes(boxes), Boxes(every))
    centres = (every[:, :2] + every[:, 2:]) / 2
    # by differences: the faster form by products errs by some 0.05 pixels far from the origin
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(Boxes(boxes).get_centers(), centres, compute_mode=exact)
    chosen, start = [], 0
    for level in anchors:
        part = distance[:, start : start + len(level)]
        chosen.append(part.topk(min(topk, len(level)), dim=1, largest=False).indices + start)
        start += len(level)
    candidates = torch.cat(chosen, dim=1)
    found = iou.gather(1, candidates)
    spread = found.std(1) if candidates.shape[1] > 1 else torch.zeros_like(found[:, 0])
    threshold = found.mean(1) + spread
    inside = torch.cat([centres[None] - boxes[:, None, :2], boxes[:, None, 2:] - centres[None]], 2)
    good = found >= threshold[:, None]
    good &= (inside.amin(2) > 0).gather(1, candidates)
    claims = torch.full_like(iou, -1.0).scatter_(1, candidates, torch.where(good, found, -1.0))
    best, index = claims.max(0)
    return torch.where(best >= 0, index, -1)
