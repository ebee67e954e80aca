"""Loading of checked COCO data: detectron2's dicts of what :mod:`.coco_json` read."""

from __future__ import annotations

import logging
import os

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from ..errors import DataError
from .coco_json import CocoFile, file_stamp, read_coco

_logger = logging.getLogger(__name__)
_complete: set[tuple] = set()  # (file stamp, image folder) whose images were all found
_reported: set[tuple] = set()  # stamps of files of which it was said what they hold


def load_checked(json_file: str, image_root: str, name: str) -> list[dict]:
    """What detectron2's ``load_coco_json`` gives, of checked and mended annotations.

    One line, the first time, says what the file holds, and counts what was left out or mended. A
    mask or keypoints that cannot be used are left out of their annotation, the box stays; where
    some annotations have keypoints, the others get unlabelled ones (flag 0).

    Args:
        json_file, image_root: the file, and the folder that its file names are relative to.
        name: the data set, whose metadata gives the class index of each category id. Metadata that
            lack classes get those of the file.

    Raises:
        DataError: see :func:`~projects.kd.data.coco_json.read_coco`; categories that are not the
            data set's classes; or an image file is missing.
    """
    data = read_coco(json_file)
    classes = _class_indices(data, name)
    objects: dict = {image["id"]: [] for image in data.images}
    unlabelled = [0] * (3 * data.summary.keypoint_count) if data.summary.labelled.count else None
    for row in data.annotations:
        objects[row["image_id"]].append(_to_object(row, classes, unlabelled))
    dicts = [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": objects[image["id"]],
        }
        for image in data.images
    ]
    _report(data)
    _require_images(json_file, image_root, dicts)
    return dicts


def _class_indices(data: CocoFile, name: str) -> dict:
    """Class index by category id, as the metadata have it."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_dataset_id_to_contiguous_id") is None:
        metadata.set(
            thing_classes=[category["name"] for category in data.categories],
            thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(data.categories)},
        )
    classes, indices = metadata.thing_classes, metadata.thing_dataset_id_to_contiguous_id
    for category in data.categories:
        index = indices.get(category["id"])
        if index is None or classes[index] != category["name"]:
            raise DataError(
                f"{data.path}: category {category['id']} '{category['name']}' is no class of data "
                f"set '{name}': {', '.join(classes)}"
            )
    return indices


def _to_object(row: dict, classes: dict, unlabelled: list[int] | None) -> dict:
    made = {
        "iscrowd": row["iscrowd"],
        "bbox": list(row["bbox"]),
        "category_id": classes[row["category_id"]],
        "bbox_mode": BoxMode.XYWH_ABS,
    }
    mask = row.get("segmentation")
    if mask:
        if isinstance(mask, dict) and isinstance(mask["counts"], list):
            mask = mask_util.frPyObjects(mask, *mask["size"])
        made["segmentation"] = mask
    points = row.get("keypoints", unlabelled)
    if points:  # of pixels in the file, of their centres in detectron2
        made["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(points)]
    return made


def _report(data: CocoFile) -> None:
    stamp = file_stamp(data.path)
    if stamp in _reported:
        return
    _reported.add(stamp)
    held = data.summary
    line = (
        f"{data.path}: {held.images} images, {held.annotations} annotations "
        f"({held.annotations - held.objects.count} crowds), {len(held.categories)} classes"
    )
    if data.problems.counts:
        _logger.warning(f"{line}; {data.problems}")
    else:
        _logger.info(line)


def _require_images(json_file: str, image_root: str, dicts: list[dict]) -> None:
    key = (*file_stamp(json_file), image_root)
    if key in _complete:
        return
    missing = [entry for entry in dicts if not os.path.isfile(entry["file_name"])]
    if missing:
        more = f"; {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        name = f"image {missing[0]['image_id']} is missing: no file {missing[0]['file_name']}"
        raise DataError(f"{json_file}: {name}{more} of {len(dicts)}")
    _complete.add(key)
