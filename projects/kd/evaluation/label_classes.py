"""The classes of pseudo-labels: a detector's, or those of another file, by name."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Mapping, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from ..arguments import number
from ..data.coco_json import inspect_annotations
from ..data.slices import register_slice
from ..errors import ConfigError, did_you_mean
from .pseudo_labels import LabelRules, least_score

logger = logging.getLogger(__name__)


def label_rules(
    model: nn.Module,
    names: Mapping[str, Sequence[str]],
    keypoints: bool,
    *,
    threshold: float,
    class_threshold: Sequence[str] = (),
    classes_of: str = "",
    class_map: Sequence[str] = (),
    keypoint_threshold: float = 0.05,
) -> LabelRules:
    """Categories of the file, and which class of the detector becomes which.

    Args:
        model: the detector.
        names: what it learnt to find, see :func:`~projects.kd.data.register.names_by_kind`.
        keypoints: it finds keypoints.
        threshold, class_threshold, classes_of, class_map, keypoint_threshold: the flags of
            ``kd-pseudo-label``.

    Raises:
        ConfigError: unknown classes or names, nothing in common, or a score below the detector's.
    """
    own = names.get("thing_classes")
    if not own:
        raise ConfigError(
            "--config-file: the classes of the detector are not known: its DATASETS.TRAIN has to "
            "name its data set, and KD.DATASETS where that is"
        )
    categories = _categories_of(classes_of) if classes_of else _numbered(own)
    if keypoints:
        categories = _with_keypoints(categories, list(names.get("keypoint_names", ())))
    ids = {category["name"]: category["id"] for category in categories}
    renamed = _pairs("--class-map", class_map, own, ids)
    found = {i: ids[renamed.get(x, x)] for i, x in enumerate(own) if renamed.get(x, x) in ids}
    if not found:
        raise ConfigError(
            f"--classes-of: none of the detector's classes ({', '.join(own[:8])}) is one of "
            f"{', '.join(list(ids)[:8])}; --class-map DETECTOR=FILE says which ones are the same"
        )
    never = [name for name, identity in ids.items() if identity not in found.values()]
    if never:
        logger.warning(
            f"the detector does not know {', '.join(never)}: training takes such objects in the "
            "labelled images as background"
        )
    thresholds = dict.fromkeys(ids.values(), threshold)
    for name, text in _pairs("--class-threshold", class_threshold, ids).items():
        thresholds[ids[name]] = _score("--class-threshold", text)
    least = least_score(model)
    if min(thresholds.values()) < least:
        raise ConfigError(
            f"--threshold {min(thresholds.values()):g}: the detector gives nothing below "
            f"{least:g}, its SCORE_THRESH_TEST (KD.TEACHER.OPTS)"
        )
    return LabelRules(categories, found, thresholds, keypoint_threshold)


def _pairs(flag: str, texts: Sequence[str], left, right=None) -> dict[str, str]:
    """NAME=VALUE of a flag; ConfigError unless the names are among those given."""
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"{flag}: '{text}' is not NAME=VALUE")
        for word, known in ((name, left), (value, right)):
            if known is not None and word not in known:
                raise ConfigError(
                    f"{flag} {text}: '{word}' is none of {', '.join(list(known)[:8])}"
                    f"{did_you_mean(word, known)}"
                )
        found[name] = value
    return found


def _score(flag: str, text: str) -> float:
    try:
        return number(0, 1)(text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{flag}: {error}") from error


def _numbered(names: Iterable[str]) -> list[dict]:
    """COCO categories, counted from 1."""
    return [{"id": i, "name": name} for i, name in enumerate(names, start=1)]


def _categories_of(name: str) -> list[dict]:
    """Categories of a COCO json, or of a registered data set."""
    if os.path.isfile(name):
        return inspect_annotations(name).categories
    register_slice(name)
    if name not in DatasetCatalog:
        raise ConfigError(f"--classes-of: '{name}' is neither a file nor a registered data set")
    metadata = MetadataCatalog.get(name)
    places = metadata.get("thing_dataset_id_to_contiguous_id", {})
    rows = _numbered(metadata.get("thing_classes", ()))
    for identity, index in places.items():
        rows[index]["id"] = identity
    if metadata.get("keypoint_names"):
        rows = [{**row, "keypoints": list(metadata.keypoint_names)} for row in rows]
    return rows


def _with_keypoints(categories: list[dict], names: list[str]) -> list[dict]:
    """Categories with the names of the detector's keypoints, where they have none."""
    named = [{"skeleton": [], "keypoints": names, **category} for category in categories]
    if not names and any(not x["keypoints"] for x in named):
        raise ConfigError(
            "--classes-of: the detector's keypoints have no names: name a json that has them"
        )
    if any(names and list(x["keypoints"]) != names for x in named):
        raise ConfigError(
            f"--classes-of: its keypoints are not those of the detector: {', '.join(names)}"
        )
    return named
