"""VisDroneEvaluator: the toolkit's metrics, COCO's at 500 detections, and the files to submit."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from detectron2.config import CfgNode

from ..config import register_config
from ..config.key_table import add_rule
from ..config.rules import listed, one_of
from .detection_evaluator import DetectionEvaluator
from .evaluators import register_evaluator
from .visdrone_metrics import (
    LIMITS,
    READINGS,
    ImageResult,
    evaluate_images,
    ignored_pixels,
    outside_ignored,
)

# Digits behind the point in result files; the metrics are those of the written numbers.
BOX_DIGITS, SCORE_DIGITS = 3, 6

logger = logging.getLogger(__name__)


@register_config
def add_visdrone_config(cfg: CfgNode) -> None:
    """Add TEST.VISDRONE_READINGS."""
    # What is reported for VisDrone beside COCO's metrics: "toolkit" (task visdrone: classes weigh
    # by images, area under the curve, recall over ignored objects too), "coco" (visdrone_coco).
    cfg.TEST.VISDRONE_READINGS = ("toolkit", "coco")


add_rule("TEST.VISDRONE_READINGS", listed(one_of(*READINGS), 1))


class VisDroneEvaluator(DetectionEvaluator):
    """Evaluates the 500 detections with the highest scores of each image.

    Results, in percent:

    - ``visdrone``: the VisDrone2018-DET toolkit's numbers, see :mod:`.visdrone_metrics`;
    - ``visdrone_coco``: the same protocol, with COCO's interpolation and mean over classes;
    - ``bbox``: COCO's metrics at maxDets 500 with APs, APm, APl. Objects and detections in ignored
      regions are left out before, as the toolkit does; objects of score 0 are crowds.

    ``visdrone_submission/<image>.txt`` in the output folder holds the result files of the
    challenge, one for each image, sorted by score.

    Args:
        dataset_name: registered by :func:`~projects.kd.data.visdrone.register_visdrone_data`, or
            COCO data whose images may have ``ignored_regions`` (XYWH).
        readings: names in READINGS.
        **options: see :class:`~projects.kd.evaluation.DetectionEvaluator`.
    """

    def __init__(self, dataset_name: str, *, readings: Sequence[str] = tuple(READINGS), **options):
        super().__init__(dataset_name, tasks=("bbox",), max_dets_per_image=LIMITS[-1], **options)
        self._readings = {name: READINGS[name] for name in readings}
        coco = self._coco_api  # images and categories by the numbers of the ground truth
        self._images = {image["id"]: image for image in coco.dataset["images"]}
        self._truth: dict[int, list[dict]] = {image_id: [] for image_id in self._images}
        for annotation in coco.dataset.get("annotations", []):
            self._truth[annotation["image_id"]].append(annotation)
        if self._do_evaluation:
            kept = [a for i in self._images for a in self._outside(i, self._truth[i])]
            coco.dataset["annotations"] = kept
            with contextlib.redirect_stdout(io.StringIO()):
                coco.createIndex()

    def _outside(self, image_id: int, items: list[dict]) -> list[dict]:
        """The annotations or detections of an image that do not lie in its ignored regions."""
        image = self._images[image_id]
        regions = image.get("ignored_regions", [])
        if not items or not regions:
            return items
        counts = ignored_pixels(regions, image["height"], image["width"])
        kept = outside_ignored(np.array([item["bbox"] for item in items]), counts)
        return [item for item, keep in zip(items, kept, strict=True) if keep]

    def _eval_predictions(self, predictions, img_ids=None):
        best = []
        for prediction in predictions:
            items = sorted(prediction["instances"], key=lambda item: -item["score"])
            items = items[: LIMITS[-1]]
            best.append({**prediction, "instances": items})
        super()._eval_predictions(best, img_ids)  # from here on with the data set's categories
        found: dict[int, list[dict]] = {image_id: [] for image_id in self._images}
        for prediction in best:
            found[self._ground_truth.image_number(prediction["image_id"])] += prediction[
                "instances"
            ]
        numbers = self._ground_truth.category_numbers
        rows = {image_id: _rows(items, numbers) for image_id, items in found.items()}
        if self._output_dir:
            self._write_submission(rows)
        if not self._do_evaluation:
            return
        chosen = self._images
        if img_ids is not None:
            chosen = [self._ground_truth.image_number(own) for own in img_ids]
        images = [self._image_result(image_id, rows[image_id]) for image_id in chosen]
        names = {category["id"]: category["name"] for category in self._coco_api.cats.values()}
        for reading, metrics in evaluate_images(images, names, self._readings).items():
            task = "visdrone" if reading == "toolkit" else f"visdrone_{reading}"
            self._results[task] = metrics
            logger.info("%s: %s", task, ", ".join(f"{k} {v:.2f}" for k, v in metrics.items()))

    def _score(self, task: str, found: list[dict], img_ids):
        by_image: dict[int, list[dict]] = {}
        for item in found:
            number = self._ground_truth.image_number(item["image_id"])
            by_image.setdefault(number, []).append(item)
        kept = [item for key, items in by_image.items() for item in self._outside(key, items)]
        if not kept:
            return None
        return super()._score(task, kept, img_ids)

    def _image_result(self, image_id: int, rows: np.ndarray) -> ImageResult:
        image, truth = self._images[image_id], self._truth[image_id]
        return ImageResult(
            height=image["height"],
            width=image["width"],
            gt_boxes=np.array([a["bbox"] for a in truth], float).reshape(-1, 4),
            gt_classes=np.array([a["category_id"] for a in truth], int),
            gt_ignored=np.array([a.get("iscrowd", 0) for a in truth], bool),
            regions=np.array(image.get("ignored_regions", [])).reshape(-1, 4),
            boxes=rows[:, :4],
            scores=rows[:, 4],
            classes=rows[:, 5],
        )

    def _write_submission(self, rows: dict[int, np.ndarray]) -> None:
        folder = os.path.join(self._output_dir, "visdrone_submission")
        os.makedirs(folder, exist_ok=True)
        numbers = self._ground_truth.category_numbers
        own_ids = {number: own for own, number in numbers.items() if isinstance(own, int)}
        for image_id, lines in rows.items():
            name = os.path.basename(self._images[image_id]["file_name"])
            path = os.path.join(folder, os.path.splitext(name)[0] + ".txt")
            with open(path, "w") as stream:
                stream.write(format_lines(lines, own_ids))
        logger.info("%d result files for submission are in %s", len(rows), folder)


@register_evaluator("visdrone")
def build_visdrone_evaluator(cfg: CfgNode, dataset_name: str, folder: str) -> VisDroneEvaluator:
    """VisDroneEvaluator with TEST.VISDRONE_READINGS."""
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if limit < LIMITS[-1]:
        logger.warning(
            f"TEST.DETECTIONS_PER_IMAGE is {limit}; VisDrone counts {LIMITS[-1]} detections"
        )
    return VisDroneEvaluator(
        dataset_name, output_dir=folder, readings=tuple(cfg.TEST.VISDRONE_READINGS)
    )


def _rows(items: Sequence[dict], numbers: dict) -> np.ndarray:
    """(D, 6): box XYWH, score, number of the category, rounded as they are written."""
    table = [[*item["bbox"], item["score"], numbers[item["category_id"]]] for item in items]
    rows = np.array(table, float).reshape(-1, 6)
    rows[:, :4] = rows[:, :4].round(BOX_DIGITS)
    rows[:, 4] = rows[:, 4].round(SCORE_DIGITS)
    return rows


def format_lines(rows: np.ndarray, own_ids: Mapping[int, int] = MappingProxyType({})) -> str:
    """The text of a result file: box, score, category, and -1 for truncation and occlusion.

    Args:
        rows: (D, 6) XYWH, score, category (1 to 10), by descending score.
        own_ids: what is written for a category, where it is not its number.
    """
    box = ",".join([f"%.{BOX_DIGITS}f"] * 4)
    line = f"{box},%.{SCORE_DIGITS}f,%d,-1,-1\n"
    return "".join(line % (*row[:5], own_ids.get(int(row[5]), row[5])) for row in rows)
