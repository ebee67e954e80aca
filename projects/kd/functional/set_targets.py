"""Ground truth of a set prediction, and its pairs with queries.

Shapes: L decoder layers, N images, Q queries; boxes (centre x, centre y, width, height) as shares
of the unpadded image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Instances

from .set_prediction import xyxy_to_cxcywh


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
