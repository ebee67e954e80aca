"""How often classes occur in the training set and how large their boxes are, measured once.

ICD draws its fake instances from these numbers. They are kept in one small JSON file a data set,
``$DETECTRON2_DATASETS/icd_priors/<name>.json`` (default: ``./datasets``), with a fingerprint of the
annotations they belong to. A data set that is no annotation file (``json_file`` in its metadata) is
measured at every start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..errors import ConfigError, DataError

VERSION = 1  # of the files; count up when what is measured changes
UNIFORM_SIZE = 0.2  # mean and deviation of the uniform rule, read in ICD's code

_logger = logging.getLogger(__name__)


class BoxPriors(NamedTuple):
    """Statistics of K classes.

    Attributes:
        frequency: (K,) share of the boxes, sum 1.
        mean, std: (K, 2) width and height of the boxes in widths and heights of their image.
    """

    frequency: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def uniform_priors(num_classes: int) -> BoxPriors:
    """All classes alike, sides 0.2 of the image with deviation 0.2.

    The rule that ICD's code has for data sets other than COCO.
    """
    sizes = np.full((num_classes, 2), UNIFORM_SIZE)
    return BoxPriors(np.full(num_classes, 1 / num_classes), sizes, sizes.copy())


def dataset_priors(names: Sequence[str], num_classes: int, folder: str | None = None) -> BoxPriors:
    """Statistics of the boxes of training sets; crowd regions and boxes without area are left out.

    A class without boxes has frequency 0 and the sizes of all boxes together.

    Args:
        names: registered data sets.
        num_classes: K.
        folder: where the files lie; None = see the module.

    Raises:
        DataError: no box at all, or an image without a size.
        ConfigError: a class index of K or above.
    """
    folder = folder or os.path.join(
        os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "icd_priors"
    )
    total = np.zeros((num_classes, 5))  # a class: count, sums of w and h, sums of squares
    for name in names:
        moments = _stored_moments(name, folder)
        if len(moments) > num_classes:
            raise ConfigError(
                f"DATASETS.TRAIN: '{name}' has boxes of class {len(moments) - 1} (counted from 0), "
                f"the student is set to {num_classes} classes"
            )
        total[: len(moments)] += moments
    if total[:, 0].sum() == 0:
        raise DataError(
            f"DATASETS.TRAIN: {', '.join(names)} holds no boxes, from which ICD could learn"
        )
    missing = total[:, 0] == 0
    filled = np.where(missing[:, None], total.sum(0), total)
    mean = filled[:, 1:3] / filled[:, :1]
    variance = filled[:, 3:5] / filled[:, :1] - mean**2
    return BoxPriors(total[:, 0] / total[:, 0].sum(), mean, np.sqrt(variance.clip(min=0)))


def _stored_moments(name: str, folder: str) -> np.ndarray:
    """(k, 5) moments of a data set from its file, or measured and stored."""
    path = os.path.join(folder, re.sub(r"[^\w.-]", "_", name) + ".json")
    fingerprint = _fingerprint(name)
    stored = _read(path) if fingerprint else None
    if stored is not None:
        if stored.get("version") == VERSION and stored.get("fingerprint") == fingerprint:
            return np.array(stored["moments"], np.float64).reshape(-1, 5)
        _logger.warning(f"{path} is not of the annotations that '{name}' has now: measuring again")
    try:
        dicts = DatasetCatalog.get(name)
    except (OSError, KeyError) as error:
        raise ConfigError(
            f"DATASETS.TRAIN: '{name}' cannot be loaded to measure the priors of ICD ({error}); "
            "KD.ICD.PRIORS 'uniform' needs no data"
        ) from error
    moments = box_moments(name, dicts)
    fingerprint = fingerprint or _fingerprint(name)  # a built-in data set is made when loaded
    if fingerprint:
        content = {"version": VERSION, "fingerprint": fingerprint, "moments": moments.tolist()}
        _write(path, content)
    return moments


def box_moments(name: str, dicts: Sequence[dict]) -> np.ndarray:
    """Per class: count, sums of relative width and height, and sums of their squares.

    Args:
        name: for messages.
        dicts: detectron2's data set dicts.

    Returns:
        (k, 5), k = the largest class index + 1.
    """
    by_mode: dict[int, list] = {}
    for entry in dicts:
        annotations = [a for a in entry.get("annotations", ()) if not a.get("iscrowd", 0)]
        if annotations and not (entry.get("width") and entry.get("height")):
            raise DataError(
                f"DATASETS.TRAIN: '{name}' gives no width and height of "
                f"{entry.get('file_name', 'an image')}"
            )
        for a in annotations:
            row = (a["category_id"], entry["width"], entry["height"], *a["bbox"])
            by_mode.setdefault(a["bbox_mode"], []).append(row)
    classes, sizes = [np.zeros(0, np.int64)], [np.zeros((0, 2))]
    for mode, rows in by_mode.items():
        table = np.array(rows, np.float64)
        boxes = BoxMode.convert(table[:, 3:], BoxMode(mode), BoxMode.XYXY_ABS)
        classes.append(table[:, 0].astype(np.int64))
        sizes.append((boxes[:, 2:] - boxes[:, :2]) / table[:, 1:3])
    classes, sizes = np.concatenate(classes), np.concatenate(sizes)
    keep = (sizes > 0).all(1)
    classes, sizes = classes[keep], sizes[keep]
    moments = np.zeros((classes.max(initial=-1) + 1, 5))
    values = np.concatenate([np.ones((len(sizes), 1)), sizes, sizes**2], axis=1)
    np.add.at(moments, classes, values)
    return moments


def _fingerprint(name: str) -> str:
    """Hash of a data set's annotation file; "" if it has none."""
    json_file = MetadataCatalog.get(name).get("json_file", "")
    if not json_file or not os.path.isfile(json_file):
        return ""
    digest = hashlib.blake2b(digest_size=16)
    with open(json_file, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _read(path: str) -> dict | None:
    try:
        with open(path) as file:
            content = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        content = None
    return content if isinstance(content, dict) else {}


def _write(path: str, content: dict) -> None:
    """Store a file that is complete as soon as it exists; not being able to costs time only."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=".icd-", dir=folder)
        with os.fdopen(handle, "w") as file:
            json.dump(content, file)
        os.replace(partial, path)
    except OSError as error:
        _logger.warning(f"{path} cannot be written: {error.strerror}; next time is measured again")
