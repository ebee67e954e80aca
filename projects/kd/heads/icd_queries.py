"""The instances that ICD asks its decoder about: the objects of a batch, and fakes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..context import DistillContext
from ..errors import DataError
from ..functional.icd import Encoded, Priors, encode_instances, query_counts, sample_fakes


class Queries(NamedTuple):
    """The instances of a batch, image after image, in each image the real ones first.

    Attributes:
        encoded: all of them, see :class:`~projects.kd.functional.icd.Encoded`.
        real: (Q,) bool.
        counts: per image the numbers of real and fake instances.
    """

    encoded: Encoded
    real: torch.Tensor
    counts: list[tuple[int, int]]

    def only_real(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of (Q, ...) that belong to real instances (no mask: that would be a sync)."""
        images = x.split([sum(count) for count in self.counts])
        return torch.cat(
            [own[:number] for own, (number, _) in zip(images, self.counts, strict=True)]
        )


@torch.no_grad()
def draw_queries(
    ctx: DistillContext, priors: Priors, jitter: float, negatives: float, most: int
) -> Queries:
    """Encode the objects of every image and as many fakes as belong to them.

    Random numbers are drawn on the device of the priors, from its default generator, which training
    seeds every step; nothing is read back from the device.

    Args:
        ctx: with ground truth.
        priors: what fakes are drawn from.
        jitter: a; centres move by a uniform share in [-a, a] of the box's sides.
        negatives, most: see :func:`~projects.kd.functional.icd.query_counts`.

    Raises:
        DataError: the batch has no annotations.
    """
    if ctx.gt is None:
        raise DataError("KD.HEADS: ICD needs boxes, and this batch has no annotations")
    encoded, real, counts = [], [], []
    for size, instances in zip(ctx.image_sizes, ctx.gt, strict=True):
        count = query_counts(len(instances), negatives, most)
        classes, boxes = sample_fakes(count[1], priors, size)
        classes = torch.cat([instances.gt_classes, classes])
        boxes = torch.cat([instances.gt_boxes.tensor.to(boxes.dtype), boxes])
        shift = torch.rand(len(boxes), 2, device=boxes.device, dtype=boxes.dtype)
        shift = jitter * (2 * shift - 1)
        encoded.append(encode_instances(classes, boxes, size, shift, len(priors.classes)))
        real.append(torch.arange(len(boxes), device=boxes.device) < count[0])
        counts.append(count)
    packed = Encoded(*(torch.cat(parts) for parts in zip(*encoded, strict=True)))
    return Queries(packed, torch.cat(real), counts)
