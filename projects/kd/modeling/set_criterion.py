"""Losses of a set prediction: Hungarian matching in each decoder layer, focal, L1 and GIoU loss.

Shapes: L decoder layers, N images, Q queries, K classes; boxes (centre x, centre y, width, height)
as shares of the unpadded image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Instances
from detectron2.utils import comm

from ..functional.set_prediction import (
    assign,
    box_cost,
    box_losses,
    focal_cost,
    sigmoid_focal_loss,
    xyxy_to_cxcywh,
)


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch.

    Attributes:
        boxes: (T, 4), all images' objects one after the other.
        classes: (T,) int64.
        counts: objects of each image.
    """

    boxes: torch.Tensor
    classes: torch.Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, instances: Sequence[Instances], device: torch.device) -> Targets:
        """From ``gt_boxes`` (XYXY in pixels of an image of ``image_size``) and ``gt_classes``."""
        boxes = [torch.zeros(0, 4, device=device)]
        classes = [torch.zeros(0, dtype=torch.int64, device=device)]
        for one in instances:
            height, width = one.image_size
            size = torch.tensor([width, height, width, height], dtype=torch.float32)
            boxes.append(xyxy_to_cxcywh(one.gt_boxes.tensor.to(device).float() / size.to(device)))
            classes.append(one.gt_classes.to(device))
        counts = tuple(len(one) for one in instances)
        return cls(torch.cat(boxes), torch.cat(classes), counts)

    @property
    def starts(self) -> list[int]:
        """Place of each image's first object."""
        return [0, *np.cumsum(self.counts).tolist()][:-1]


@dataclass(frozen=True)
class Matches:
    """Pairs of queries and objects of all layers, as indices on the device.

    Attributes:
        layer, image, query: (P,) int64 into predictions (L, N, Q, ...).
        target: (P,) int64 into :class:`Targets`.
    """

    layer: torch.Tensor
    image: torch.Tensor
    query: torch.Tensor
    target: torch.Tensor


class SetCriterion:
    """Matching and losses of Conditional DETR, the same in every decoder layer.

    Cost of a pair: ``class_weight * focal cost + l1_weight * |b - t|_1 - giou_weight * GIoU``; the
    losses are the focal loss of all queries and classes, L1 and 1 - GIoU of the matched pairs,
    each summed and divided by the number of objects (mean over processes, at least 1), with the
    same weights. Source: the paper and its public code.

    Args:
        class_weight, l1_weight, giou_weight: weights in the cost and in the loss.
    """

    def __init__(self, class_weight: float = 2.0, l1_weight: float = 5.0, giou_weight: float = 2.0):
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight

    @torch.no_grad()
    def costs(self, logits, boxes, targets: Targets) -> list[torch.Tensor]:
        """Cost matrices (Q, T_n) of each layer and image, the images of a layer in a row.

        Args:
            logits: (L, N, Q, K).
            boxes: (L, N, Q, 4).
            targets: of the batch.
        """
        logits, boxes = logits.float(), boxes.float()
        per_class = self.class_weight * focal_cost(logits)
        matrices = []
        for image, (start, count) in enumerate(zip(targets.starts, targets.counts, strict=True)):
            own = slice(start, start + count)
            cost = per_class[:, image][..., targets.classes[own]]
            place = box_cost(boxes[:, image], targets.boxes[own], self.l1_weight, self.giou_weight)
            matrices.append(cost + place)
        return [matrix[layer] for layer in range(len(logits)) for matrix in matrices]

    def match(self, logits, boxes, targets: Targets) -> Matches:
        """Hungarian matching of every layer and image; more objects than queries leave some out.

        One copy from the device and one to it. Raises TrainingError for a NaN in a cost.
        """
        return to_matches(assign(self.costs(logits, boxes, targets)), targets)

    def losses(self, logits, boxes, targets: Targets, matches: Matches) -> dict[str, torch.Tensor]:
        """Weighted losses ``class``, ``l1`` and ``giou``, each (L,), without autocast.

        Args:
            logits, boxes, targets: as in :meth:`costs`.
            matches: of :meth:`match`, or pairs found elsewhere.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits, boxes = logits.float(), boxes.float()
            pairs = (matches.layer, matches.image, matches.query)
            wanted = torch.zeros_like(logits)
            wanted[(*pairs, targets.classes[matches.target])] = 1.0
            number = mean_count(sum(targets.counts), logits.device)
            focal = sigmoid_focal_loss(logits, wanted).flatten(1).sum(1)
            distance, overlap = box_losses(boxes[pairs], targets.boxes[matches.target])
            zeros = boxes.flatten(1).sum(1) * 0.0  # a gradient for the boxes without objects too
            return {
                "class": self.class_weight * focal / number,
                "l1": self.l1_weight * zeros.index_add(0, matches.layer, distance) / number,
                "giou": self.giou_weight * zeros.index_add(0, matches.layer, overlap) / number,
            }

    def __call__(self, logits, boxes, targets: Targets) -> dict[str, torch.Tensor]:
        """Match, and give the losses."""
        return self.losses(logits, boxes, targets, self.match(logits, boxes, targets))


def to_matches(pairs: Sequence[np.ndarray], targets: Targets) -> Matches:
    """Indices on the device from assignments of each layer and image.

    Args:
        pairs: of :func:`assign`, (2, P) of queries and the image's objects; images of a layer in a
            row, layers ascending.
        targets: of the batch.
    """
    images = len(targets.counts)
    parts = [np.zeros((4, 0), dtype=np.int64)]
    for index, (query, target) in enumerate(pairs):
        layer, image = divmod(index, images)
        places = np.full_like(query, layer), np.full_like(query, image)
        parts.append(np.stack([*places, query, target + targets.starts[image]]))
    table = torch.from_numpy(np.concatenate(parts, axis=1))
    return Matches(*table.to(targets.boxes.device, non_blocking=True))


def mean_count(count: int, device: torch.device) -> torch.Tensor:
    """The mean of a number over all processes, at least 1."""
    total = torch.tensor(float(count), device=device)
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(total)
    return (total / comm.get_world_size()).clamp(min=1.0)


def named(losses: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalars ``loss_<name>`` of the last layer and ``loss_<name>_<k>`` of the others."""
    result = {}
    for name, values in losses.items():
        *early, last = values.unbind()
        result[f"loss_{name}"] = last
        result.update({f"loss_{name}_{k}": value for k, value in enumerate(early)})
    return result
