"""Images without labels: KD.UNLABELED, their data sets, and batches that hold them as well."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import register_config
from ..config.key_table import add_rule
from ..config.rules import NAMES, whole
from ..config.teachers import config_of, teacher_names
from ..errors import ConfigError, DataError
from .images import IMAGE_SUFFIXES, image_size

KEY = "KD.UNLABELED.DATASETS"
COUNT_KEY = "KD.UNLABELED.IMAGES_PER_BATCH"
FLAG = "unlabeled"  # of an example: it has no ground truth
_KEPT = ("file_name", "height", "width", "image_id")
_THREADS = 16


@register_config
def add_unlabelled_config(cfg: CfgNode) -> None:
    """Add KD.UNLABELED."""
    cfg.KD.UNLABELED = node = CN()
    # Images that train imitation heads alone: names of data sets, whose annotations (if any) are
    # not read, or folders of images. Heads that need labels see the labelled images only.
    node.DATASETS = ()
    # So many of them in a batch of all processes, on top of SOLVER.IMS_PER_BATCH labelled ones.
    # Where DATASETS.TRAIN is () they are the whole batch.
    node.IMAGES_PER_BATCH = 0


add_rule(KEY, NAMES)
add_rule(COUNT_KEY, whole())


def check_unlabelled(cfg: CfgNode) -> None:
    """Refuse values of KD.UNLABELED that do not fit each other or the rest of the config.

    Raises:
        ConfigError: names the key to change.
    """
    names, count = cfg.KD.UNLABELED.DATASETS, cfg.KD.UNLABELED.IMAGES_PER_BATCH
    if not names:
        if count:
            raise ConfigError(f"{COUNT_KEY} is {count} and {KEY} is empty: set both")
        return
    if not count:
        raise ConfigError(f"{KEY} is set and {COUNT_KEY} is 0: set both")
    if not cfg.KD.META_ARCHITECTURE:
        raise ConfigError(
            f"{KEY}: without a teacher nothing is learnt from images without labels; set "
            "KD.META_ARCHITECTURE, or leave it empty"
        )
    if cfg.DATASETS.TRAIN:
        return
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise ConfigError("TEST.PRECISE_BN.ENABLED needs labelled images, DATASETS.TRAIN is empty")
    teachers = [config_of(cfg, name).KD for name in teacher_names(cfg)]
    shares = [kd.get(head.upper(), {}).get("SHARE", 0.0) for kd in teachers for head in kd.HEADS]
    if cfg.KD.BALANCE.TARGET > 0 or any(share > 0 for share in shares):
        raise ConfigError(
            "KD.BALANCE (or a head's SHARE) compares with the task losses, and there are none: "
            "DATASETS.TRAIN is empty"
        )


def scale_unlabelled(before: CfgNode, scaled: CfgNode) -> CfgNode:
    """KD.UNLABELED.IMAGES_PER_BATCH in proportion to SOLVER.IMS_PER_BATCH.

    Args:
        before: the config.
        scaled: that of detectron2's ``auto_scale_workers`` (SOLVER.REFERENCE_WORLD_SIZE).

    Returns:
        ``scaled``, or a copy.
    """
    old, new = before.SOLVER.IMS_PER_BATCH, scaled.SOLVER.IMS_PER_BATCH
    if old == new or not before.KD.UNLABELED.IMAGES_PER_BATCH:
        return scaled
    frozen, scaled = scaled.is_frozen(), scaled.clone()
    scaled.defrost()
    scaled.KD.UNLABELED.IMAGES_PER_BATCH = before.KD.UNLABELED.IMAGES_PER_BATCH * new // old
    if frozen:
        scaled.freeze()
    return scaled


def register_folder(name: str) -> None:
    """Register a folder of images under its path; does nothing for other names."""
    if name not in DatasetCatalog and os.path.isdir(os.path.expanduser(name)):
        folder = os.path.abspath(os.path.expanduser(name))
        DatasetCatalog.register(name, lambda: images_below(folder))
        MetadataCatalog.get(name).set(image_dir=folder)


def images_below(folder: str) -> list[dict]:
    """detectron2 dicts of all images of a folder and its subfolders, in the order of their names.

    ``image_id`` is the path below the folder. Sizes come from the files' headers.

    Raises:
        DataError: no image, or one that cannot be read.
    """
    paths = paths_below(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(image_size, paths))
    return [
        {
            "file_name": path,
            "image_id": os.path.relpath(path, folder),
            "width": width,
            "height": height,
        }
        for path, (width, height) in zip(paths, sizes, strict=True)
    ]


def paths_below(folder: str) -> list[str]:
    """The image files of a folder and its subfolders, in the order of their names.

    Raises:
        DataError: there is none.
    """
    paths = []
    for place, folders, files in os.walk(folder):
        folders.sort()
        names = (file for file in sorted(files) if file.lower().endswith(IMAGE_SUFFIXES))
        paths += [os.path.join(place, name) for name in names]
    if not paths:
        raise DataError(f"{folder}: no image ({', '.join(IMAGE_SUFFIXES)}) in it")
    return paths


def unlabelled_in_a_process(cfg: CfgNode, processes: int) -> int:
    """How many images without labels a batch of one process holds.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    count = cfg.KD.UNLABELED.IMAGES_PER_BATCH
    if count % processes:
        raise ConfigError(
            f"{COUNT_KEY} {count} must be divisible by the number of processes, {processes}"
        )
    return count // processes


def load_unlabelled(names: Sequence[str]) -> list[dict]:
    """The images of KD.UNLABELED.DATASETS, without any annotation.

    Raises:
        ConfigError: a streamed data set.
        DataError: no image.
    """
    sets = [DatasetCatalog.get(name) for name in names]
    for name, images in zip(names, sets, strict=True):
        if not isinstance(images, list):
            raise ConfigError(f"{KEY}: '{name}' is a streamed (iterable) data set")
        if not images:
            raise DataError(f"{KEY}: '{name}' has no image")
    return [
        {key: image[key] for key in _KEPT if key in image}
        for image in itertools.chain.from_iterable(sets)
    ]


class WithoutLabels:
    """Runs a mapper on an image without annotations and marks the example.

    Args:
        mapper: data set dict -> example.
    """

    def __init__(self, mapper: Callable[[dict], dict]):
        self.mapper = mapper

    def __call__(self, dataset_dict: dict) -> dict:
        """The example with ``unlabeled`` True."""
        return {**self.mapper(dataset_dict), FLAG: True}
