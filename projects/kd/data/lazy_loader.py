"""The loaders of a LazyConfig: its data set, mapper and sampler in the resumable loader."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch.utils.data import IterableDataset

from ..config import LazyNode
from ..config.lazy_files import built, select
from ..errors import ConfigError
from .mapper import NamedErrors

logger = logging.getLogger(__name__)

TRAIN, TEST = "dataloader.train", "dataloader.test"
# what build_detection_train_loader takes and this loader uses
_USED = ("_target_", "dataset", "mapper", "sampler", "total_batch_size", "num_workers")
_USED += ("aspect_ratio_grouping",)


@dataclass(frozen=True)
class TrainParts:
    """What a training loader is made of.

    Attributes:
        images: data set dicts, or a torch data set of them.
        sampler: endless indices of this process.
        make_mapper: gives the function from a dict to a training example, or to None to have
            another image tried.
        grouping: batches of images that are all wide, or all not.
    """

    images: Any
    sampler: Any
    make_mapper: Callable[[], Callable]
    grouping: bool


def own_train_loader(cfg: LazyNode, start_iter: int):
    """The loader of a file whose ``dataloader.train`` is not detectron2's own function.

    It is used as it is, and starts anew when a run is resumed, which is said.

    Args:
        cfg: of a LazyConfig.
        start_iter: 0, or where a resumed run goes on.

    Returns:
        The loader; None where detectron2's build_detection_train_loader is called, whose parts
        :func:`lazy_train_parts` gives.

    Raises:
        ConfigError: it cannot be made, or images without labels are to join it.
    """
    if _called(select(cfg.lazy, TRAIN)) is build_detection_train_loader:
        return None
    what = f"{cfg.path}: {TRAIN} is not detectron2's build_detection_train_loader"
    if cfg.KD.UNLABELED.DATASETS:
        raise ConfigError(f"KD.UNLABELED.DATASETS: {what}, which they could join")
    if start_iter:
        logger.warning(f"{what}, its stream starts anew: the resumed run is not exact")
    return built(cfg, TRAIN)


def lazy_train_parts(cfg: LazyNode, seed: int) -> TrainParts:
    """What ``dataloader.train`` of a file describes, so that seed and place decide its stream.

    Args:
        cfg: of a LazyConfig.
        seed: of shuffling; a sampler with seeds that the file leaves open gets it.

    Raises:
        ConfigError: a part that cannot be instantiated, or cannot be used.
    """
    node = select(cfg.lazy, TRAIN)
    rest = [name for name in node if name not in _USED and node[name] is not None]
    for name in ("collate_fn", "single_gpu_batch_size"):
        if name in rest:
            raise ConfigError(
                f"{cfg.path}: {TRAIN}.{name} cannot be used: batches are lists, their size is "
                "total_batch_size"
            )
    if rest:
        logger.warning(f"{cfg.path}: without effect on this loader: {TRAIN}.{', '.join(rest)}")
    images = built(cfg, f"{TRAIN}.dataset")
    if isinstance(images, IterableDataset):
        raise ConfigError(f"{cfg.path}: {TRAIN}.dataset is streamed and cannot be resumed")
    if node.get("sampler") is None:
        sampler = TrainingSampler(len(images), seed=seed)
    else:
        sampler = built(cfg, f"{TRAIN}.sampler", _seeded(cfg, seed))
    grouping = node.get("aspect_ratio_grouping", True)
    return TrainParts(images, sampler, functools.partial(lazy_train_mapper, cfg), grouping)


def lazy_train_mapper(cfg: LazyNode) -> NamedErrors:
    """The file's ``dataloader.train.mapper``; without one examples are the data set's dicts."""
    place = f"{TRAIN}.mapper"
    return NamedErrors(copy.copy if select(cfg.lazy, place) is None else built(cfg, place))


def _seeded(cfg: LazyNode, seed: int) -> DictConfig:
    """The sampler's node with the seeds that it leaves open."""
    lazy = copy.deepcopy(cfg.lazy)
    node = select(lazy, f"{TRAIN}.sampler")
    for name in inspect.signature(_called(node)).parameters:
        if name.startswith("seed") and node.get(name) is None:
            node[name] = seed
    return node


def _called(node: DictConfig) -> Callable:
    target = node["_target_"]
    return locate(target) if isinstance(target, str) else target


def lazy_test_loader(cfg: LazyNode):
    """``dataloader.test`` of a file; its images come in INPUT.FORMAT.

    Raises:
        ConfigError: the file has none, or it cannot be instantiated.
    """
    lazy = copy.deepcopy(cfg.lazy)
    node = select(lazy, TEST)
    if node is None:
        raise ConfigError(f"{cfg.path}: evaluation needs {TEST}")
    mapper = node.get("mapper")
    if isinstance(mapper, DictConfig) and "image_format" in mapper:
        mapper.image_format = cfg.INPUT.FORMAT
    if _called(node) is not build_detection_test_loader or mapper is None:
        return built(cfg, TEST, node)
    parts = {
        name: built(cfg, f"{TEST}.{name}", value)
        for name, value in node.items()
        if name != "_target_" and value is not None
    }
    return build_detection_test_loader(**{**parts, "mapper": NamedErrors(parts["mapper"])})
