"""Losses of a set prediction: Hungarian matching in each decoder layer, focal, L1 and GIoU loss.

Shapes: L decoder layers, N images, Q queries, K classes; boxes (centre x, centre y, width, height)
as shares of the unpadded image.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..functional.ranks import mean_over_ranks
from ..functional.set_prediction import (
    assign,
    box_cost,
    box_losses,
    focal_cost,
    sigmoid_focal_loss,
)
from ..functional.set_targets import Matches, Targets, to_matches


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
            count = logits.new_tensor(float(sum(targets.counts)))
            number = mean_over_ranks(count).clamp(min=1.0)
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


def named(losses: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalars ``loss_<name>`` of the last layer and ``loss_<name>_<k>`` of the others."""
    result = {}
    for name, values in losses.items():
        *early, last = values.unbind()
        result[f"loss_{name}"] = last
        result.update({f"loss_{name}_{k}": value for k, value in enumerate(early)})
    return result
