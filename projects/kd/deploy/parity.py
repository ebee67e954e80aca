"""How far an exported detector is from the detector that it was made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from detectron2.structures import Instances
from torch import nn

# boxes further apart than this are not the same detection, in pixels of the image
SAME = 1.0


@dataclasses.dataclass
class Differences:
    """The largest differences over images, and what has no counterpart.

    Attributes:
        images: compared.
        detections: pairs of the same class whose boxes lie within SAME.
        boxes, scores: largest differences of pairs, in pixels of the image and of probability;
            scores are those of a pixel's classes as well.
        masks: largest share of a box's pixels with another mask, over pairs.
        keypoints: largest distance of a keypoint, in pixels.
        sem_seg: largest share of an image's pixels with another class.
        alone: detections of either side without a pair: equal scores at a limit, or an error.
        best_alone: highest score among these.
    """

    images: int = 0
    detections: int = 0
    boxes: float = 0.0
    scores: float = 0.0
    masks: float = 0.0
    keypoints: float = 0.0
    sem_seg: float = 0.0
    alone: int = 0
    best_alone: float = 0.0

    def raise_to(self, name: str, value: float) -> None:
        """Keep the larger value."""
        setattr(self, name, max(getattr(self, name), float(value)))


@torch.no_grad()
def differences(model: nn.Module, exported: nn.Module, items: Iterable[Mapping]) -> Differences:
    """Run both on each image.

    Args:
        model: the detector, in evaluation mode.
        exported: an ExportedDetector.
        items: detectron2's inputs, one image each.
    """
    total = Differences()
    for item in items:
        ours, theirs = model([item])[0], exported([item])[0]
        total.images += 1
        if "sem_seg" in ours:
            logits = [x["sem_seg"].cpu() for x in (ours, theirs)]
            labels = [x.argmax(0) for x in logits]
            total.raise_to("sem_seg", (labels[0] != labels[1]).float().mean())
            scores = [x.softmax(0) for x in logits]
            total.raise_to("scores", (scores[0] - scores[1]).abs().max())
        if "instances" in ours:
            _compare(total, ours["instances"].to("cpu"), theirs["instances"].to("cpu"))
    return total


def _compare(total: Differences, ours: Instances, theirs: Instances) -> None:
    rows, columns = pair(ours, theirs)
    total.detections += len(rows)
    total.alone += len(ours) + len(theirs) - 2 * len(rows)
    for found, paired in ((ours, rows), (theirs, columns)):
        rest = torch.ones(len(found), dtype=torch.bool)
        rest[paired] = False
        total.raise_to("best_alone", found.scores[rest].max() if rest.any() else 0.0)
    if not len(rows):
        return
    ours, theirs = ours[rows], theirs[columns]
    apart = (ours.pred_boxes.tensor - theirs.pred_boxes.tensor).abs()
    total.raise_to("boxes", apart.max())
    total.raise_to("scores", (ours.scores - theirs.scores).abs().max())
    if ours.has("pred_masks"):
        changed = (ours.pred_masks != theirs.pred_masks).flatten(1).sum(1)
        total.raise_to("masks", (changed / ours.pred_boxes.area().clamp(min=1)).max())
    if ours.has("pred_keypoints"):
        moved = (ours.pred_keypoints - theirs.pred_keypoints)[..., :2]
        total.raise_to("keypoints", moved.norm(dim=-1).max())


def pair(ours: Instances, theirs: Instances) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the same detections on both sides: equal classes, the nearest boxes first."""
    distance = torch.cdist(
        ours.pred_boxes.tensor, theirs.pred_boxes.tensor, p=float("inf")
    )  # largest difference of a coordinate
    distance[ours.pred_classes[:, None] != theirs.pred_classes[None]] = float("inf")
    distance += (ours.scores[:, None] - theirs.scores[None]).abs()  # between boxes at one place
    rows, columns = [], []
    for place in distance.flatten().argsort().tolist():
        row, column = divmod(place, distance.shape[1])
        if not distance[row, column] < SAME:
            break
        if row not in rows and column not in columns:
            rows.append(row)
            columns.append(column)
    return torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)
