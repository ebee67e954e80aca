"""Ground truth for COCO's evaluation with ids that evaluators can work with.

pycocotools and faster-coco-eval index arrays by ids and take an annotation id of 0 or below, or one
that is text, for "not matched": the score then depends on how a file counts. Here images,
categories and annotations are counted from 1; results are written with the file's own ids.
"""

from __future__ import annotations

import contextlib
import io
import json
from functools import cached_property

from detectron2.data.catalog import Metadata
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from ..errors import DataError
from .coco_json import read_coco
from .coco_tables import by_id
from .coco_values import number

FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


class GroundTruth:
    """Numbered ground truth of a data set.

    Images keep the order in which pycocotools takes them (by ascending id), where ids are whole
    numbers: it decides between equal scores. Other images keep the file's order.

    Args:
        metadata: of the data set; ``json_file``, and where it has
            ``thing_dataset_id_to_contiguous_id`` a category's number is its class index + 1.
        mended: take what :func:`~projects.kd.data.coco_json.read_coco` makes of the file, as
            training does, or the file as it is, with ``iscrowd`` and ``area`` where they lack.

    Attributes:
        api: pycocotools' COCO. Rows of images have their own id as ``own_id``.
        image_numbers, category_numbers: number by the file's own id.
        has_annotations: False for the file of a test set.

    Raises:
        DataError: see ``read_coco``.
    """

    def __init__(self, metadata: Metadata, mended: bool):
        self.path = metadata.json_file
        if mended:
            data = read_coco(self.path)
            images, categories = data.images, data.categories
            annotations, self.has_annotations = data.annotations, data.has_annotations
        else:
            with open(PathManager.get_local_path(self.path), encoding="utf-8-sig") as stream:
                content = json.load(stream)
            images, categories = content["images"], content["categories"]
            images = by_id(images) or images
            categories = by_id(categories) or categories
            self.has_annotations = "annotations" in content
            annotations = [_filled(row) for row in content.get("annotations", ())]
        indices = metadata.get("thing_dataset_id_to_contiguous_id")
        if indices is None:
            indices = {category["id"]: i for i, category in enumerate(categories)}
        self.image_numbers = {row["id"]: i for i, row in enumerate(images, start=1)}
        self.category_numbers = {own: index + 1 for own, index in indices.items()}
        self.api = _api(
            [{**row, "id": self.image_numbers[row["id"]], "own_id": row["id"]} for row in images],
            [
                {**row, "id": self.category_numbers[row["id"]]}
                for row in categories
                if row["id"] in indices
            ],
            [
                {
                    **row,
                    "id": i,
                    "image_id": self.image_numbers[row["image_id"]],
                    "category_id": self.category_numbers[row["category_id"]],
                }
                for i, row in enumerate(annotations, start=1)
                if row["category_id"] in indices and row["image_id"] in self.image_numbers
            ],
        )

    def image_number(self, own_id) -> int:
        """Number of an image; DataError if the file lacks it."""
        if own_id not in self.image_numbers:
            raise DataError(f"{self.path}: has no image {own_id}, for which there is a prediction")
        return self.image_numbers[own_id]

    def lacking(self, task: str) -> list[dict]:
        """Annotations without what a task of FIELDS compares."""
        return [row for row in self.api.dataset["annotations"] if not row.get(FIELDS[task])]

    def for_task(self, task: str) -> COCO:
        """The ground truth in which every annotation can be compared.

        One without a mask becomes a crowd of its box for the masks' score: what is detected there
        counts neither way. One without keypoints gets unlabelled ones, which COCO ignores.
        """
        if task == "segm" and self.lacking(task):
            return self._with_crowds
        if task == "keypoints" and self.lacking(task):
            return self._with_unlabelled
        return self.api

    @cached_property
    def _with_crowds(self) -> COCO:
        rows = []
        for row in self.api.dataset["annotations"]:
            if not row.get("segmentation"):
                x, y, w, h = row["bbox"]
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                row = {**row, "segmentation": [corners], "iscrowd": 1}
            rows.append(row)
        return _api(self.api.dataset["images"], self.api.dataset["categories"], rows)

    @cached_property
    def _with_unlabelled(self) -> COCO:
        rows = self.api.dataset["annotations"]
        length = max(len(row.get("keypoints") or ()) for row in rows)
        unlabelled = {"keypoints": [0] * length, "num_keypoints": 0}
        rows = [row if row.get("keypoints") else {**row, **unlabelled} for row in rows]
        return _api(self.api.dataset["images"], self.api.dataset["categories"], rows)


class ByOwnId:
    """The annotations of an image by its own id, for detectron2's evaluation of proposals."""

    def __init__(self, truth: GroundTruth):
        self.truth = truth
        self.loadAnns = truth.api.loadAnns

    def getAnnIds(self, imgIds):  # noqa: N802  pycocotools' name
        """See pycocotools."""
        return self.truth.api.getAnnIds(imgIds=self.truth.image_number(imgIds))


def _api(images: list[dict], categories: list[dict], annotations: list[dict]) -> COCO:
    api = COCO()
    api.dataset = {"images": images, "categories": categories, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def _filled(row: dict) -> dict:
    area = number(row.get("area"))
    if area is None and row.get("bbox"):
        area = row["bbox"][2] * row["bbox"][3]
    return {**row, "iscrowd": row.get("iscrowd") or 0, "area": area}
