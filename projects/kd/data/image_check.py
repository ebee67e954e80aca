"""All images of a run, looked at before it starts: there, readable, of the size that is said.

Only headers are read, so that ten thousand take seconds; a JPEG or PNG whose end looks cut off is
read as a whole. What a header does not tell (damage in the middle of a file) still shows when the
image is drawn.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.utils import comm
from tqdm import tqdm

from ..config import LazyNode
from ..errors import ConfigError, DataError
from .coco_json import read_coco
from .images import ImageHeader, image_header, mode_problem, size_problem

THREADS = 16  # files may lie on a network, where each one is a wait

logger = logging.getLogger(__name__)


class ImageFile(NamedTuple):
    """An image of a data set: its path, the size that annotations give it (None where they do
    not), its label map or "", and the sizes (INPUT key, shortest edge, longest) it is resized to.
    """

    path: str
    size: tuple[int, int] | None
    labels: str
    resizes: tuple[tuple[str, int, int], ...]


class Finding(NamedTuple):
    """What is wrong with an image, or "", and whether an EXIF orientation turns it."""

    problem: str
    turned: bool


def check_images(cfg: CfgNode, training: bool) -> None:
    """Read the header of every image of DATASETS (and of KD.UNLABELED's), in parallel.

    Each process looks at its share, and all know what was found. It ends after
    DATALOADER.IMAGE_CHECK_SECONDS.

    Args:
        cfg: with KD.DATASETS registered.
        training: False leaves DATASETS.TRAIN and KD.UNLABELED out.

    Raises:
        DataError: names the first image that cannot be used, and counts the others.
    """
    limit = cfg.DATALOADER.IMAGE_CHECK_SECONDS
    if limit < 0:
        raise ConfigError(
            f"DATALOADER.IMAGE_CHECK_SECONDS is {limit}, it must be 0 (no check) or more"
        )
    if limit == 0:
        return
    files = images_of(cfg, training)
    rank, processes = comm.get_rank(), comm.get_world_size()
    start = time.monotonic()
    found = look_at(files[rank::processes], lambda x: find_problem(x, cfg.INPUT.WHITE), limit)
    places = {
        rank + i * processes: (finding.problem, finding.turned) for i, finding in enumerate(found)
    }
    known = dict(itertools.chain.from_iterable(x.items() for x in comm.all_gather(places)))
    logger.info(f"{len(known)} images looked at in {time.monotonic() - start:.1f} s")
    bad = [known[i][0] for i in sorted(known) if known[i][0]]
    if bad:
        more = f"; and {len(bad) - 1} more of {len(files)} images cannot be used" * (len(bad) > 1)
        raise DataError(f"{bad[0]}{more}")
    turned = [files[i].path for i in sorted(known) if known[i][1]]
    if turned:
        logger.warning(
            f"{len(turned)} of {len(files)} images are turned by their EXIF orientation when they "
            f"are read; their annotations have to be those of the turned image. First: {turned[0]}"
        )
    if len(known) < len(files):
        logger.warning(
            f"DATALOADER.IMAGE_CHECK_SECONDS {limit:g} are over: {len(files) - len(known)} of "
            f"{len(files)} images were not looked at"
        )


def images_of(cfg: CfgNode, training: bool) -> list[ImageFile]:
    """The images of all data sets of a run, each once."""
    keys = []
    if training:
        keys.append(((*cfg.DATASETS.TRAIN, *cfg.KD.UNLABELED.DATASETS), _train_sizes(cfg)))
    keys.append((cfg.DATASETS.TEST, _test_sizes(cfg)))
    files: dict[tuple, ImageFile] = {}
    for names, sizes in keys:
        for name in dict.fromkeys(names):
            for path, size, labels in _rows(name):
                known = files.get((path, size, labels))
                both = dict.fromkeys((*known.resizes, *sizes)) if known else sizes
                files[path, size, labels] = ImageFile(path, size, labels, tuple(both))
    return list(files.values())


def find_problem(file: ImageFile, white: float) -> Finding:
    """What keeps an image from being used, found without reading its pixels.

    Args:
        file: the image.
        white: see INPUT.WHITE.
    """
    try:
        header = image_header(file.path)
        problem = mode_problem(header.mode, header.deep, white)
        if not problem and file.size is not None:
            problem = size_problem(header, *file.size)
        problem = problem or _resize_problem(header, file.resizes)
        if problem:
            problem = f"{file.path}: {problem}"
        elif file.labels:
            problem = _label_problem(file, header)
    except DataError as error:
        return Finding(str(error), False)
    return Finding(problem, header.orientation != 1)


def look_at(
    files: list[ImageFile], find: Callable[[ImageFile], Finding], seconds: float
) -> list[Finding]:
    """What is found in the files, in their order, as far as the time allows; with progress."""
    end = time.monotonic() + seconds
    found: list[Finding] = []
    size = max(1, min(64, len(files) // THREADS))
    parts = [files[i : i + size] for i in range(0, len(files), size)]

    def look(part: list[ImageFile]) -> list[Finding]:
        return [find(file) for file in part if time.monotonic() < end]

    bar = tqdm(
        total=len(files),
        desc="images",
        unit="",
        delay=1.0,
        leave=False,
        disable=None if comm.is_main_process() else True,  # None: where there is no terminal
    )
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for part, result in zip(parts, pool.map(look, parts), strict=True):
            found += result
            bar.update(len(result))
            if len(result) < len(part):  # later parts may be ahead, but places have no gaps
                pool.shutdown(cancel_futures=True)
                break
    return found


def _rows(name: str) -> Iterator[tuple[str, tuple[int, int] | None, str]]:
    """Path, size and label map (or "") of a data set's images."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("checked_annotations"):
        for image in read_coco(metadata.json_file).images:
            path = os.path.join(metadata.image_root, image["file_name"])
            yield path, (image["width"], image["height"]), ""
        return
    entries = DatasetCatalog.get(name)
    if not isinstance(entries, list):  # a torch data set, whose items may be expensive
        return
    for entry in entries:
        if "file_name" in entry:
            size = (entry["width"], entry["height"]) if {"width", "height"} <= set(entry) else None
            yield entry["file_name"], size, entry.get("sem_seg_file_name", "")


def _train_sizes(cfg: CfgNode) -> tuple[tuple[str, int, int], ...]:
    own = isinstance(cfg, LazyNode)  # its mapper says the size
    if own or cfg.INPUT.CROP.ENABLED or cfg.INPUT.DETR_AUGMENTATION:  # a crop comes first
        return ()
    smallest = min(cfg.INPUT.MIN_SIZE_TRAIN, default=0)
    return (("TRAIN", smallest, cfg.INPUT.MAX_SIZE_TRAIN),)


def _test_sizes(cfg: CfgNode) -> tuple[tuple[str, int, int], ...]:
    return (("TEST", cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST),)


def _resize_problem(header: ImageHeader, resizes: tuple[tuple[str, int, int], ...]) -> str:
    for key, shortest, longest in resizes:
        if shortest > 0:
            size = ResizeShortestEdge.get_output_shape(
                header.height, header.width, shortest, longest
            )
            if min(size) < 1:
                return (
                    f"image of {header.width}x{header.height} pixels is too thin for "
                    f"INPUT.MIN_SIZE_{key} {shortest} and MAX_SIZE_{key} {longest}: it becomes "
                    f"{size[1]}x{size[0]}"
                )
    return ""


def _label_problem(file: ImageFile, header: ImageHeader) -> str:
    labels = image_header(file.labels)
    if labels.mode not in ("L", "P"):
        return f"{file.labels}: label map has mode {labels.mode}, it needs one byte a pixel"
    if (labels.width, labels.height) != (header.width, header.height):
        return (
            f"{file.labels}: the label map has {labels.width}x{labels.height} pixels, its image "
            f"{file.path} has {header.width}x{header.height}"
        )
    return ""
