"""The training loader: detectron2's samplers, batches and mapper, resumable to the bit.

The main process draws image indices from a seeded sampler, groups them by aspect ratio into
batches, and hands out (position, index) pairs, position counting the indices of this rank from the
start of training. The generators are seeded from the position before an image is augmented. So a
batch depends on (seed, rank, number of ranks, batch number) only: not on the number of workers, and
a resumed run skips to its place by drawing indices alone, without reading an image.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, get_detection_dataset_dicts
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..config import LazyNode
from ..detectors import reads_label_maps
from ..errors import ConfigError, DataError
from ..files import require_pickles
from ..seeding import UNLABELLED
from ..stopping import serve_on
from .cache import CachePlan
from .lazy_loader import TrainParts, lazy_train_mapper, lazy_train_parts, own_train_loader
from .mapper import build_train_mapper
from .streams import GroupedBatchSampler, JoinedBatches, SeededDataset, Streams, aspect_groups
from .unlabelled import KEY, WithoutLabels, load_unlabelled, unlabelled_in_a_process

logger = logging.getLogger(__name__)


def build_train_loader(
    cfg: CfgNode,
    start_iter: int = 0,
    *,
    seed: int | None = None,
    mapper: Callable[[dict], dict | None] | None = None,
) -> TrainLoader:
    """An endless loader of this rank's batches, each a list of mapped dicts.

    A batch holds SOLVER.IMS_PER_BATCH / number of ranks images, and behind them, marked by
    ``unlabeled``, KD.UNLABELED.IMAGES_PER_BATCH / number of ranks without labels.

    Args:
        cfg: the full config.
        start_iter: training iterations (of SOLVER.ACCUM_STEPS batches) to skip.
        seed: of shuffling and augmentation, equal on all ranks; None = cfg.SEED, or a random one
            when that is negative.
        mapper: data set dict -> example; None = :func:`build_train_mapper`, or a LazyConfig's.

    Raises:
        ConfigError: batch size not divisible by the ranks, unknown sampler, streamed data set.
    """
    ranks = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % ranks:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} must be divisible by the number of "
            f"processes, {ranks}"
        )
    if seed is None:
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    lazy = isinstance(cfg, LazyNode)
    own = own_train_loader(cfg, start_iter) if lazy else None
    if own is not None:
        return own
    skip = start_iter * cfg.SOLVER.ACCUM_STEPS
    parts, cache = [], CachePlan(cfg)
    if lazy or cfg.DATASETS.TRAIN or not cfg.KD.UNLABELED.DATASETS:
        size = cfg.SOLVER.IMS_PER_BATCH // ranks
        parts.append(_labelled(cfg, seed, size, skip, mapper, cache))
    if cfg.KD.UNLABELED.DATASETS:
        size = unlabelled_in_a_process(cfg, ranks)
        parts.append(_unlabelled(cfg, seed, size, skip, cache))
    cache.open()
    dataset, batches = parts[0] if len(parts) == 1 else _both(parts)
    return TrainLoader(
        DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            collate_fn=list,
            worker_init_fn=serve_on,
            pin_memory=torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu",
        )
    )


def _labelled(
    cfg: CfgNode, seed: int, size: int, skip: int, mapper, cache: CachePlan
) -> tuple[Dataset, Sampler]:
    """Images of DATASETS.TRAIN and their batches in this process."""
    lazy = isinstance(cfg, LazyNode)
    parts = lazy_train_parts(cfg, seed) if lazy else _train_parts(cfg, seed)
    images = parts.images
    batches = GroupedBatchSampler(
        parts.sampler, aspect_groups(images) if parts.grouping else None, size, skip=skip
    )
    if isinstance(images, list) and mapper is None and not lazy:
        images = without_unused(cfg, images)
    mapper = mapper or parts.make_mapper()
    images = cache.add(images, mapper)
    if isinstance(images, list):
        images = DatasetFromList(images, copy=False)
    return SeededDataset(images, mapper, seed, comm.get_rank()), batches


def _train_parts(cfg: CfgNode, seed: int) -> TrainParts:
    images = load_dataset_dicts(cfg, cfg.DATASETS.TRAIN)
    if isinstance(images, IterableDataset):
        raise ConfigError("DATASETS.TRAIN: a streamed (iterable) data set cannot be resumed")
    sampler = build_sampler(cfg, images, seed)
    make_mapper = functools.partial(build_train_mapper, cfg)
    return TrainParts(images, sampler, make_mapper, cfg.DATALOADER.ASPECT_RATIO_GROUPING)


def _unlabelled(
    cfg: CfgNode, seed: int, size: int, skip: int, cache: CachePlan
) -> tuple[Dataset, Sampler]:
    """The same of KD.UNLABELED.DATASETS, by random numbers of their own.

    So the labelled part of each batch is what it is without them.
    """
    images = load_unlabelled(cfg.KD.UNLABELED.DATASETS)
    own = int(np.random.SeedSequence((UNLABELLED, seed)).generate_state(1)[0])
    batches = GroupedBatchSampler(
        TrainingSampler(len(images), seed=own),
        aspect_groups(images, KEY) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
        size,
        skip=skip,
    )
    lazy = isinstance(cfg, LazyNode)
    mapper = lazy_train_mapper(cfg) if lazy else build_train_mapper(cfg, labelled=False)
    mapper = WithoutLabels(mapper)
    images = DatasetFromList(cache.add(images, mapper), copy=False)
    return SeededDataset(images, mapper, seed, comm.get_rank(), UNLABELLED), batches


def _both(parts: Sequence[tuple[Dataset, Sampler]]) -> tuple[Dataset, Sampler]:
    datasets, batches = zip(*parts, strict=True)
    return Streams(datasets), JoinedBatches(batches)


def without_unused(cfg: CfgNode, images: list[dict]) -> list[dict]:
    """Data set dicts without what :func:`build_train_mapper` would read, or copy, for nothing.

    That are label maps that the detector does not train on, and masks and keypoints where
    MODEL.MASK_ON and KEYPOINT_ON are off: a fifth of the time of loading shapes. A mapper of one's
    own gets all.
    """
    label_maps = reads_label_maps(cfg.MODEL.META_ARCHITECTURE)
    switches = {"segmentation": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    unused = {key for key, used in switches.items() if not used}
    lean = []
    for image in images:
        image = {k: v for k, v in image.items() if label_maps or k != "sem_seg_file_name"}
        if "annotations" in image:
            image["annotations"] = [
                {k: v for k, v in row.items() if k not in unused} for row in image["annotations"]
            ]
        lean.append(image)
    return lean


class TrainLoader:
    """Iterates a DataLoader over a :class:`SeededDataset` and raises the errors it carries."""

    def __init__(self, batches: DataLoader):
        self.batches = batches

    @property
    def images(self) -> int:
        """How many different ones there are."""
        return len(self.batches.dataset)

    def __iter__(self) -> Iterator[list[dict]]:
        """Batches from the place where the sampler starts; each call starts there again.

        The stream has no end, so its workers live as long as the iterator does.
        """
        stream = iter(self.batches)
        try:
            for batch in stream:
                for item in batch:
                    if isinstance(item, DataError):
                        raise item
                yield batch
        finally:
            del stream  # ends the workers; left to the garbage collector that takes 5 s for each


def load_dataset_dicts(cfg: CfgNode, names: Sequence[str]):
    """Training images of registered data sets, filtered as the config says."""
    proposals = None
    if cfg.MODEL.LOAD_PROPOSALS:
        allowed = cfg.KD.ALLOW_PICKLE
        require_pickles(cfg.DATASETS.PROPOSAL_FILES_TRAIN, "DATASETS.PROPOSAL_FILES_TRAIN", allowed)
        files = dict(zip(cfg.DATASETS.TRAIN, cfg.DATASETS.PROPOSAL_FILES_TRAIN, strict=True))
        proposals = [files[name] for name in names]
    try:
        images = get_detection_dataset_dicts(
            list(names),
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=(
                cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
            ),
            proposal_files=proposals,
        )
    except AssertionError as error:  # detectron2's word for a data set of which nothing is left
        raise DataError(
            f"DATASETS.TRAIN: {error} (DATALOADER.FILTER_EMPTY_ANNOTATIONS and "
            "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE leave images out)"
        ) from error
    if cfg.MODEL.MASK_ON and isinstance(images, list):
        return _with_masks(images, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    return images


def _with_masks(images: list[dict], filter_empty: bool) -> list[dict]:
    """Without the objects that have no mask; training would stop at them."""
    kept, left_out = [], 0
    for image in images:
        rows = image.get("annotations", ())
        usable = [row for row in rows if row.get("iscrowd", 0) or row.get("segmentation")]
        if len(usable) < len(rows):
            left_out += len(rows) - len(usable)
            image = {**image, "annotations": usable}
            if filter_empty and all(row.get("iscrowd", 0) for row in usable):
                continue
        kept.append(image)
    if left_out:
        logger.warning(
            f"DATASETS.TRAIN: {left_out} objects without a usable mask left out (MODEL.MASK_ON)"
        )
    if not kept:
        raise DataError("DATASETS.TRAIN: no object has a mask that can be used")
    return kept


def build_sampler(cfg: CfgNode, images: Sequence[dict], seed: int) -> Sampler:
    """The sampler that DATALOADER.SAMPLER_TRAIN names, with an explicit seed.

    Args:
        images: all training images, in the order of DATASETS.TRAIN.
        seed: equal on all ranks.
    """
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return TrainingSampler(len(images), seed=seed)
    if name == "RandomSubsetTrainingSampler":
        ratio = cfg.DATALOADER.get("RANDOM_SUBSET_RATIO", 1.0)
        return RandomSubsetTrainingSampler(len(images), ratio, seed_shuffle=seed, seed_subset=seed)
    if name == "RepeatFactorTrainingSampler":
        return RepeatFactorTrainingSampler(_rarity(cfg, images), seed=seed)
    if name == "WeightedTrainingSampler":
        return RepeatFactorTrainingSampler(_weights(cfg)[0], seed=seed)
    if name == "WeightedCategoryTrainingSampler":
        weights, datasets = _weights(cfg)
        factors = weights * torch.cat([_rarity(cfg, dataset) for dataset in datasets])
        return RepeatFactorTrainingSampler(factors / factors.min(), seed=seed)
    raise ConfigError(f"DATALOADER.SAMPLER_TRAIN: no sampler '{name}' in detectron2")


def _rarity(cfg: CfgNode, images: Sequence[dict]) -> torch.Tensor:
    return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        images, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
    )


def _weights(cfg: CfgNode) -> tuple[torch.Tensor, list]:
    """Per image the DATASETS.TRAIN_REPEAT_FACTOR of its data set, and the data sets."""
    # detectron2 reads this key and RANDOM_SUBSET_RATIO without having them in its defaults
    factors = dict(cfg.DATASETS.get("TRAIN_REPEAT_FACTOR", ()))
    unknown = set(factors) - set(cfg.DATASETS.TRAIN)
    if unknown:
        raise ConfigError(f"DATASETS.TRAIN_REPEAT_FACTOR: {sorted(unknown)} not in DATASETS.TRAIN")
    datasets = [load_dataset_dicts(cfg, [name]) for name in cfg.DATASETS.TRAIN]
    weights = [
        torch.full((len(dataset),), float(factors.get(name, 1.0)))
        for name, dataset in zip(cfg.DATASETS.TRAIN, datasets, strict=True)
    ]
    return torch.cat(weights), datasets
