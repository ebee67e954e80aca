"""What a training loader draws from: examples seeded by their place, and batches of places.

A place is (position, index): the count of the indices that this process has drawn since the start
of training, and the image. See :mod:`.loader`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import Dataset, Sampler

from ..errors import ConfigError, DataError
from ..seeding import IMAGE, seed_generators

logger = logging.getLogger(__name__)


class SeededDataset(Dataset):
    """Maps (position, index) to a training example that depends on nothing else.

    Args:
        images: data set dicts by index.
        mapper: dict -> example, or None: then an image drawn by the position takes its place.
        seed, rank: of the run and the process.
        stream: first word of the seeds, other for every data set of a run.

    A :class:`DataError` is returned, not raised: raised in a worker process it would reach the
    user as a traceback in text form.
    """

    def __init__(
        self, images: Sequence[dict], mapper: Callable, seed: int, rank: int, stream: int = IMAGE
    ):
        self.images = images
        self.mapper = PicklableWrapper(mapper)
        self.seed = seed
        self.rank = rank
        self.stream = stream

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict | DataError:
        position, index = key
        refused: set[int] = set()
        while len(refused) < len(self.images):
            seed_generators(self.stream, self.seed, self.rank, position, len(refused))
            try:
                example = self.mapper(self.images[index])
            except DataError as error:
                return error
            if example is not None:
                return example
            refused.add(index)
            if len(refused) == 3:
                logger.warning(f"the mapper refused {len(refused)} images in a row, last {index}")
            choice = random.Random(f"{self.seed} {self.rank} {position} {len(refused)}")
            while index in refused and len(refused) < len(self.images):
                index = choice.randrange(len(self.images))
        return DataError("DATASETS.TRAIN: the mapper refuses the images (it returns None)")


class GroupedBatchSampler(Sampler):
    """Batches of (position, index) whose images are all wide, or all not.

    As in detectron2 an image joins the batch of its group that is being filled, and batches come
    in the order in which they fill up.

    Args:
        indices: this rank's endless image indices.
        groups: group number of every image; None = one group.
        size: images in a batch.
        skip: batches to leave out at the start.
    """

    def __init__(self, indices: Sampler, groups: Sequence[int] | None, size: int, skip: int = 0):
        self.indices = indices
        self.groups = groups
        self.size = size
        self.skip = skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        filling: dict[int, list] = {}
        batches = 0
        for position, index in enumerate(self.indices):
            group = 0 if self.groups is None else self.groups[index]
            batch = filling.setdefault(group, [])
            batch.append((position, index))
            if len(batch) == self.size:
                del filling[group]
                batches += 1
                if batches > self.skip:
                    yield batch


def aspect_groups(images: Sequence[dict], key: str = "DATASETS.TRAIN") -> bytes:
    """One byte an image: 1 if it is wider than high, else 0."""
    try:
        return bytes(int(image["width"] > image["height"]) for image in images)
    except KeyError as error:
        raise ConfigError(
            f"DATALOADER.ASPECT_RATIO_GROUPING needs {error} of every image in {key}; "
            "give it or set the key to False"
        ) from error


class Streams(Dataset):
    """Several data sets as one, whose keys are (place of the data set, its own key)."""

    def __init__(self, parts: Sequence[Dataset]):
        self.parts = list(parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, key: tuple[int, Any]):
        part, own = key
        return self.parts[part][own]


class JoinedBatches(Sampler):
    """A batch of each of several samplers in one, with keys of :class:`Streams`."""

    def __init__(self, parts: Sequence[Sampler]):
        self.parts = list(parts)

    def __iter__(self) -> Iterator[list[tuple[int, Any]]]:
        for batches in zip(*self.parts, strict=False):
            yield [(part, key) for part, batch in enumerate(batches) for key in batch]
