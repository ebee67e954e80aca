"""Checks of COCO annotation files, made once a file, and repairs that stay in memory.

What cannot be used stops with a one-line :class:`~projects.kd.errors.DataError`; boxes that can be
mended or left out are counted in one warning. Files on disk are never changed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Iterable

from detectron2.data.datasets import load_coco_json

from ..errors import DataError

# Boxes may stick out of the image by this many pixels: rounding, common in published data sets.
TOLERANCE = 0.5

_logger = logging.getLogger(__name__)
_reports: dict[tuple, AnnotationReport] = {}
_complete: set[tuple] = set()  # (file stamp, image folder) whose images were all found


@dataclasses.dataclass(frozen=True)
class AnnotationReport:
    """What :func:`inspect_annotations` found.

    ``categories`` are the json's own, by ascending id. ``boxes`` maps the ids of annotations that
    need a change to their clipped box (XYWH, pixels), or to None if they are left out.
    """

    categories: list[dict]
    boxes: dict[int, list[float] | None]


def inspect_annotations(json_file: str) -> AnnotationReport:
    """Check a COCO annotation file; the answer is kept until the file changes.

    Boxes that leave their image by more than TOLERANCE are clipped to it. Boxes that lie outside,
    have no positive size, or hold a number that is not finite are left out. One warning counts
    both and shows the first.

    Raises:
        DataError: unreadable, not JSON, not COCO, ids that are missing or used twice, an annotation
            of an unknown image or category, or with a malformed box or keypoints.
    """
    stamp = _stamp(json_file)
    if stamp not in _reports:
        content = _read(json_file)
        images, categories = _check_tables(json_file, content)
        annotations = content.get("annotations", [])
        _check_annotations(json_file, annotations, images, categories)
        boxes = _check_boxes(json_file, annotations, images)
        _reports[stamp] = AnnotationReport([categories[i] for i in sorted(categories)], boxes)
    return _reports[stamp]


def load_checked(json_file: str, image_root: str, name: str) -> list[dict]:
    """detectron2's ``load_coco_json`` on checked annotations, with the repaired boxes.

    Raises:
        DataError: as :func:`inspect_annotations`, or an image file is missing.
    """
    report = inspect_annotations(json_file)
    dicts = load_coco_json(json_file, image_root, name, extra_annotation_keys=["id"])
    for entry in dicts:
        entry["annotations"] = _repaired(entry["annotations"], report)
        for annotation in entry["annotations"]:
            del annotation["id"]
    _require_images(json_file, image_root, dicts)
    return dicts


def repair_ground_truth(coco, json_file: str) -> None:
    """Bring a ``pycocotools.coco.COCO`` of a checked file to the ground truth used in training.

    Beside the repaired boxes, it fills what COCO's evaluation needs and home-made files often lack:
    ``iscrowd`` (0) and ``area`` (that of the box). An annotation id of 0 would never be matched by
    pycocotools, so ids are counted anew from 1 then.
    """
    report = inspect_annotations(json_file)
    annotations = _repaired(coco.dataset.get("annotations", []), report)
    start_anew = any(annotation["id"] == 0 for annotation in annotations)
    for number, annotation in enumerate(annotations, start=1):
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
        if start_anew:
            annotation["id"] = number
        if "keypoints" in annotation:
            seen = sum(flag > 0 for flag in annotation["keypoints"][2::3])
            annotation.setdefault("num_keypoints", seen)
    if "annotations" in coco.dataset:
        coco.dataset["annotations"] = annotations
        coco.createIndex()


def _repaired(annotations: list[dict], report: AnnotationReport) -> list[dict]:
    kept = []
    for annotation in annotations:
        box = report.boxes.get(annotation["id"], annotation["bbox"])
        if box is not None:
            annotation["bbox"] = list(box)
            kept.append(annotation)
    return kept


def _stamp(json_file: str) -> tuple:
    try:
        status = os.stat(json_file)
    except OSError as error:
        raise DataError(f"{json_file}: cannot be read: {error.strerror}") from error
    return os.path.abspath(json_file), status.st_mtime_ns, status.st_size


def _read(json_file: str) -> dict:
    try:
        with open(json_file, encoding="utf-8") as stream:
            content = json.load(stream)
    except OSError as error:
        raise DataError(f"{json_file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # bad JSON, or bytes that are not UTF-8
        raise DataError(f"{json_file}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{json_file}: is not in COCO format: the top level is not an object")
    for key in ("images", "categories", "annotations"):
        table = content.get(key, [] if key == "annotations" else None)
        if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
            raise DataError(f"{json_file}: is not in COCO format: no list '{key}' of objects")
    if not content["categories"]:
        raise DataError(f"{json_file}: is not in COCO format: 'categories' is empty")
    return content


def _check_tables(json_file: str, content: dict) -> tuple[dict, dict]:
    """Images and categories by id."""

    def lacks(*keys: str) -> Callable[[dict], bool]:
        return lambda row: any(row.get(key) is None for key in keys)

    def no_size(row: dict) -> bool:
        sizes = (row["width"], row["height"])
        return not all(isinstance(size, (int, float)) and size > 0 for size in sizes)

    images, categories = content["images"], content["categories"]
    needed = ("id", "file_name", "width", "height")
    _refuse(json_file, "image", images, lacks(*needed), f"lacks one of {', '.join(needed)}")
    _refuse(json_file, "image", images, no_size, "has a width or height that is not positive")
    _refuse(json_file, "image", images, _seen_before(), "has an id that is used twice")
    _refuse(json_file, "category", categories, lacks("id", "name"), "lacks id or name")
    _refuse(json_file, "category", categories, _seen_before(), "has an id that is used twice")
    return {row["id"]: row for row in images}, {row["id"]: row for row in categories}


def _check_annotations(json_file: str, annotations: list[dict], images, categories) -> None:
    def wrong_keypoints(row: dict) -> bool:
        names = categories[row["category_id"]].get("keypoints")
        points = row.get("keypoints")
        return bool(names and points) and len(points) != 3 * len(names)

    for is_wrong, what in (
        (lambda row: "id" not in row, "has no id"),
        (_seen_before(), "has an id that is used twice"),
        (lambda row: row.get("image_id") not in images, "has an image_id not in 'images'"),
        (
            lambda row: row.get("category_id") not in categories,
            "has a category_id not in 'categories'",
        ),
        (lambda row: not _is_box(row.get("bbox")), "has no bbox of four numbers"),
        (lambda row: row.get("ignore"), 'has "ignore": write "iscrowd": 1 instead'),
        (wrong_keypoints, "has keypoints that are not three numbers for each of its category's"),
    ):
        _refuse(json_file, "annotation", annotations, is_wrong, what)


def _seen_before() -> Callable[[dict], bool]:
    seen: set = set()
    return lambda row: row["id"] in seen or seen.add(row["id"]) is not None


def _refuse(json_file: str, kind: str, rows: Iterable[dict], is_wrong, what: str) -> None:
    wrong = [row for row in rows if is_wrong(row)]
    if wrong:
        row = wrong[0]
        name = f"{kind} {row['id']}" if row.get("id") is not None else f"{kind} {str(row)[:120]}"
        detail = f" ({row[key]})" if (key := _named_key(what)) in row else ""
        more = f"; so do {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DataError(f"{json_file}: {name} {what}{detail}{more}")


def _named_key(what: str) -> str:
    return next((key for key in ("image_id", "category_id", "bbox") if key in what.split()), "")


def _is_box(box) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in box)
    )


def _check_boxes(json_file: str, annotations: list[dict], images) -> dict:
    """Annotation id -> clipped box or None, for boxes that need it; warns once."""
    changes: dict[int, list[float] | None] = {}
    counts: dict[str, int] = {}
    first = ""
    for annotation in annotations:
        image = images[annotation["image_id"]]
        box, problem = _mend(annotation["bbox"], image["width"], image["height"])
        if problem:
            changes[annotation["id"]] = box
            counts[problem] = counts.get(problem, 0) + 1
            where = f"annotation {annotation['id']} of image {annotation['image_id']}"
            size = f"{image['width']}x{image['height']}"
            first = first or f"{where} ({size}): box {annotation['bbox']} {problem}"
    if changes:
        listed = ", ".join(f"{count} {problem}" for problem, count in counts.items())
        total = len(annotations)
        _logger.warning(
            f"{json_file}: {len(changes)} of {total} boxes changed: {listed}; first: {first}"
        )
    return changes


def _mend(box: list[float], width: int, height: int) -> tuple[list[float] | None, str]:
    """The box to use (XYWH, None = leave the annotation out), and what was wrong with it or ""."""
    x, y, w, h = box
    if not all(math.isfinite(value) for value in box):
        return None, "left out (not finite)"
    if w <= 0 or h <= 0:
        return None, "left out (no positive size)"
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if right <= left or bottom <= top:
        return None, "left out (outside of the image)"
    if max(left - x, top - y, x + w - right, y + h - bottom) > TOLERANCE:
        return [left, top, right - left, bottom - top], "clipped to the image"
    return box, ""


def _require_images(json_file: str, image_root: str, dicts: list[dict]) -> None:
    key = (*_stamp(json_file), image_root)
    if key in _complete:
        return
    missing = [entry for entry in dicts if not os.path.isfile(entry["file_name"])]
    if missing:
        more = f"; {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        name = f"image {missing[0]['image_id']} is missing: no file {missing[0]['file_name']}"
        raise DataError(f"{json_file}: {name}{more} of {len(dicts)}")
    _complete.add(key)
