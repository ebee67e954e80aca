"""The detection metrics of the VisDrone2018-DET toolkit.

Follows the MATLAB code of the toolkit (dropObjectsInIgr, evalRes, compOas, calcAccuracy, VOCap),
point by point:

1. Objects and detections of which at least half lies in the union of the image's ignored regions
   are dropped, counted in pixels (:func:`outside_ignored`).
2. Objects of score 0 are ignored: what matches nothing better may match them, by intersection over
   the detection's area at the current threshold, any number of times, and then counts neither way.
3. Classes are matched one by one, at IoU 0.50 to 0.95, greedily by score (:func:`match`).
4. The limits 1, 10, 100 and 500 take the first lines of an image's result file, over all classes,
   in the order of the file: files have to be sorted by score. Lines dropped by 1. do not count.
5. AP is the area under the interpolated curve at every point, at 500 detections an image; the
   denominator of the recall counts the ignored objects too.
6. The mean over classes counts a class once for every image that shows it, so that frequent
   classes weigh more.
7. The results are AP, AP50, AP75, AR1, AR10, AR100 and AR500, in percent.

A :class:`Reading` chooses between the toolkit's ways in 5. and 6. and COCO's. With COCO's, no
ignored regions and at most 500 detections an image, AP and AR500 equal pycocotools' at maxDets 500
(``iscrowd`` for objects of score 0). AR1 to AR100 do not: COCO limits each class by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
LIMITS = (1, 10, 100, 500)
RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Reading:
    """How curves become numbers.

    Attributes:
        class_average: "images" = a class counts once for every image with an object of it
            (ignored ones too); "classes" = every class that is evaluated counts once.
        interpolation: "all_points" (PASCAL VOC 2010) or "101_points" (COCO).
        recall_over: "all" objects, or only the "evaluated" ones.
    """

    class_average: str = "images"
    interpolation: str = "all_points"
    recall_over: str = "all"

    def __post_init__(self):
        allowed = {
            "class_average": ("images", "classes"),
            "interpolation": ("all_points", "101_points"),
            "recall_over": ("all", "evaluated"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {values}")


READINGS = {
    "toolkit": Reading(),
    "coco": Reading("classes", "101_points", "evaluated"),
}


@dataclass(frozen=True)
class ImageResult:
    """Ground truth and detections of one image; boxes XYWH in pixels of the stored image.

    Attributes:
        height, width: of the image.
        gt_boxes, gt_classes: (G, 4) and (G,) objects, in the order of the annotation file.
        gt_ignored: (G,) bool, True for score 0.
        regions: (R, 4) ignored regions, whole numbers.
        boxes, scores, classes: (D, 4), (D,) and (D,), in the order of the result file.
    """

    height: int
    width: int
    gt_boxes: np.ndarray
    gt_classes: np.ndarray
    gt_ignored: np.ndarray
    regions: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


def evaluate_images(
    images: Sequence[ImageResult],
    classes: Mapping[int, str],
    readings: Mapping[str, Reading] = READINGS,
) -> dict[str, dict[str, float]]:
    """Metrics in percent.

    Args:
        images: all images of the split, those without objects or detections too.
        classes: the categories that are evaluated, with their names.
        readings: by name.

    Returns:
        Reading to ``{"AP", "AP50", "AP75", "AR1", "AR10", "AR100", "AR500", "AP-<class>"...}``;
        NaN for a class without objects, and for all if there is no object at all.
    """
    parts: dict[int, _ClassMatches] = {label: _ClassMatches() for label in classes}
    for image in images:
        _add_image(parts, image)
    results = {}
    for name, reading in readings.items():
        curves = [parts[label].metrics(reading) for label in classes]
        ap, ar, weights = (np.stack([curve[i] for curve in curves]) for i in range(3))
        numbers = {"AP": _weighted(ap.mean(1), weights)}
        for percent in (50, 75):
            column = int(np.flatnonzero(np.isclose(THRESHOLDS, percent / 100))[0])
            numbers[f"AP{percent}"] = _weighted(ap[:, column], weights)
        for column, limit in enumerate(LIMITS):
            numbers[f"AR{limit}"] = _weighted(ar[..., column].mean(1), weights)
        for row, label in enumerate(classes):
            own = 100 * ap[row].mean() if weights[row] else math.nan
            numbers[f"AP-{classes[label]}"] = float(own)
        results[name] = numbers
    return results


def _weighted(values: np.ndarray, weights: np.ndarray) -> float:
    return float(100 * np.average(values, weights=weights)) if weights.any() else math.nan


# --- rule 1 --------------------------------------------------------------------------------------


def ignored_pixels(regions: np.ndarray, height: int, width: int) -> np.ndarray | None:
    """Counts of ignored pixels above and left of each pixel, itself included: (height, width).

    None if there are no regions. As in the toolkit a region of width w from column x on covers the
    columns x to x + w, counted from 1, where box coordinates count from 0 and 0 is taken for 1.
    """
    if not len(regions):
        return None
    ignored = np.zeros((height, width), np.uint8)
    for x, y, w, h in np.maximum(1, np.asarray(regions)).astype(int):
        ignored[y - 1 : y + h, x - 1 : x + w] = 1
    return cv2.integral(ignored)[1:, 1:]


def outside_ignored(boxes: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
    """Which boxes stay: those with less than half of their area in ignored regions.

    Args:
        boxes: (N, 4) XYWH. They are rounded to whole pixels, halves up, to 1 at least.
        counts: see :func:`ignored_pixels`.

    Returns:
        (N,) bool. The pixels counted are x + 1 to x + w, counted from 1, as in the toolkit.
    """
    if counts is None or not len(boxes):
        return np.ones(len(boxes), bool)
    height, width = counts.shape
    x, y, w, h = np.maximum(1, np.floor(np.asarray(boxes, float) + 0.5)).T
    left, top = np.minimum(x, width), np.minimum(y, height)
    right, bottom = np.minimum(left + w, width), np.minimum(top + h, height)
    left, top, right, bottom = (v.astype(int) - 1 for v in (left, top, right, bottom))
    inside = counts[top, left] + counts[bottom, right] - counts[top, right] - counts[bottom, left]
    return inside / (w * h) < 0.5


# --- rules 2 to 4 --------------------------------------------------------------------------------


def overlaps(boxes: np.ndarray, others: np.ndarray, over_boxes: bool = False) -> np.ndarray:
    """(D, G) intersection over union of XYWH boxes, or over the area of ``boxes``; no +1."""
    a, b = boxes[:, None], others[None]
    low = np.maximum(a[..., :2], b[..., :2])
    side = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:]) - low
    shared = np.where((side > 0).all(-1), side[..., 0] * side[..., 1], 0.0)
    area = a[..., 2] * a[..., 3]
    whole = area if over_boxes else area + b[..., 2] * b[..., 3] - shared
    return np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)


def match(boxes: np.ndarray, gt_boxes: np.ndarray, gt_ignored: np.ndarray) -> np.ndarray:
    """Match the detections of one class in one image.

    Args:
        boxes: (D, 4) XYWH by descending score.
        gt_boxes: (G, 4) XYWH; gt_ignored: (G,) bool.

    Returns:
        (D, 10) int8 for THRESHOLDS: 1 = true positive, 0 = false positive, -1 = neutral. A
        detection takes the free object that it overlaps most, of equals the last; only if there is
        none, an ignored one.
    """
    neutral = overlaps(boxes, gt_boxes[gt_ignored], over_boxes=True).max(1, initial=0.0)
    result = -(neutral[:, None] >= THRESHOLDS).astype(np.int8)
    iou = overlaps(boxes, gt_boxes[~gt_ignored])
    free = np.ones((len(THRESHOLDS), iou.shape[1]), bool)
    rows = np.arange(len(THRESHOLDS))
    for detection in np.flatnonzero(iou.max(1, initial=0.0) >= THRESHOLDS[0]):
        left = np.where(free, iou[detection], 0.0)
        best = left.shape[1] - 1 - left[:, ::-1].argmax(1)
        hit = left[rows, best] >= THRESHOLDS
        free[rows[hit], best[hit]] = False
        result[detection, hit] = 1
    return result


class _ClassMatches:
    """What all images have of one class."""

    def __init__(self):
        self.images = self.objects = self.evaluated = 0
        self.scores: list[np.ndarray] = []
        self.matches: list[np.ndarray] = []
        self.found = np.zeros((len(THRESHOLDS), len(LIMITS)), int)

    def metrics(self, reading: Reading) -> tuple[np.ndarray, np.ndarray, float]:
        """AP (thresholds), AR (thresholds, limits) and weight of the class."""
        objects = self.objects if reading.recall_over == "all" else self.evaluated
        counted = self.images if reading.class_average == "images" else int(objects > 0)
        average = _area if reading.interpolation == "all_points" else _mean_of_101
        ap = np.zeros(len(THRESHOLDS))
        if self.scores and objects:
            order = np.argsort(-np.concatenate(self.scores), kind="stable")
            matches = np.concatenate(self.matches)[order]
            true, false = (matches == 1).cumsum(0), (matches == 0).cumsum(0)
            precision = true / np.maximum(true + false, 1)
            for i in range(len(THRESHOLDS)):
                ap[i] = average(true[:, i] / objects, precision[:, i])
        return ap, self.found / max(objects, 1), float(counted)


def _add_image(parts: dict[int, _ClassMatches], image: ImageResult) -> None:
    counts = ignored_pixels(image.regions, image.height, image.width)
    kept = outside_ignored(image.gt_boxes, counts)
    gt_boxes = np.asarray(image.gt_boxes, float)[kept]
    gt_classes, gt_ignored = image.gt_classes[kept], image.gt_ignored[kept]
    kept = np.flatnonzero(outside_ignored(image.boxes, counts))[: LIMITS[-1]]
    boxes = np.asarray(image.boxes, float)[kept]
    scores, labels = image.scores[kept], image.classes[kept]
    is_sorted = bool((scores[1:] <= scores[:-1]).all())
    for label, part in parts.items():
        mine = gt_classes == label
        truth = gt_boxes[mine], gt_ignored[mine]
        part.images += int(mine.any())
        part.objects += int(mine.sum())
        part.evaluated += int((~truth[1]).sum())
        lines = np.flatnonzero(labels == label)
        if not len(lines):
            continue
        lines = lines[np.argsort(-scores[lines], kind="stable")]
        matches = match(boxes[lines], *truth)
        part.scores.append(scores[lines])
        part.matches.append(matches)
        for column, limit in enumerate(LIMITS):
            first = lines < limit
            # later lines take no object away from earlier ones, unless they have higher scores
            known = matches[first] if is_sorted else match(boxes[lines[first]], *truth)
            part.found[:, column] += (known == 1).sum(0)


# --- rule 5 --------------------------------------------------------------------------------------


def _area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the curve whose precision is the highest at this or a higher recall."""
    ceiling = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * ceiling).sum())


def _mean_of_101(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean of that precision at recall 0, 0.01, ..., 1; 0 where the recall is not reached."""
    ceiling = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(ceiling[np.searchsorted(recall, RECALLS, side="left")].mean())
