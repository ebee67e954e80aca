"""Masks and keypoints of COCO annotations: their usable form, or what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MAX_COORDINATE = 10**9  # pixels; keypoints beyond are no places

# problems of a mask
NO_MASK = "masks left out (neither polygons nor run lengths)"
SHORT = "masks left out (a polygon needs three points, an x and a y for each)"
NOT_FINITE = "masks left out (coordinates that are no finite numbers)"
FAR = "masks left out (points further outside of the image than its longer side)"
OTHER_SIZE = "masks left out (run lengths of another size than the image)"
BAD_RUNS = "masks left out (run lengths that do not add up to the image)"
PARTS = "masks without some of their polygons, which cannot be used"
# problems of keypoints
OTHER_NUMBER = "keypoints left out (not three numbers for each name)"
NO_NUMBERS = "keypoints left out (not a list of finite numbers)"


def usable_mask(segmentation, width: int, height: int) -> tuple[list | dict | None, str]:
    """A mask in one of COCO's two forms, and what was wrong with it or "".

    Args:
        segmentation: as a file has it: a list of polygons ``[x, y, x, y, ...]``, one polygon
            without the outer list, or with its points as pairs; run lengths as ``{"size": [height,
            width], "counts": list or text}``. None, ``[]``, ``[[]]`` and ``{}`` are no mask.
        width, height: of the image, in pixels.

    Returns:
        A list of polygons, a dict of run lengths of the image's size, or None.
    """
    if not segmentation:
        return None, ""
    if isinstance(segmentation, dict):
        return _usable_runs(segmentation, width, height)
    if not isinstance(segmentation, list):
        return None, NO_MASK
    if all(part == [] for part in segmentation):
        return None, ""
    polygons = _polygons(segmentation)
    if polygons is None:
        return None, NO_MASK
    far = max(width, height)
    problems = [_problem_of_polygon(polygon, -far, 2 * far) for polygon in polygons]
    if not any(problems):
        return polygons, ""
    usable = [p for p, problem in zip(polygons, problems, strict=True) if not problem]
    return (usable, PARTS) if usable else (None, next(filter(None, problems)))


def usable_keypoints(points, count: int | None) -> tuple[list[float] | None, str]:
    """Keypoints that can be used, and what was wrong with them or "".

    Args:
        points: as a file has them; None and ``[]`` are no keypoints.
        count: how many there have to be; None = any number.

    Returns:
        x, y, flag of each, in pixels, or None.
    """
    if not points:
        return None, ""
    if not isinstance(points, list):
        return None, NO_NUMBERS
    if len(points) % 3 or (count and len(points) != 3 * count):
        return None, OTHER_NUMBER
    if not _are_finite(points) or max(map(abs, points)) > MAX_COORDINATE:
        return None, NO_NUMBERS
    return points, ""


def keypoint_names(category: dict) -> list[str]:
    """The names of a category's keypoints; none where they are no list of names."""
    names = category.get("keypoints")
    if not isinstance(names, list) or not all(
        isinstance(name, (str, int)) and not isinstance(name, bool) for name in names
    ):
        return []
    return [str(name) for name in names]


def skeleton(category: dict) -> list[tuple[int, int]]:
    """The pairs of a category's skeleton, counted from 1; other entries are left out."""
    pairs = category.get("skeleton")
    return [
        tuple(pair)
        for pair in (pairs if isinstance(pairs, list) else ())
        if isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair)
    ]


def _polygons(segmentation: list) -> list[list[float]] | None:
    if all(type(value) in (int, float) for value in segmentation):
        return [segmentation]
    if not all(isinstance(part, list) for part in segmentation):
        return None
    if len(segmentation) > 2 and all(_is_point(part) for part in segmentation):
        return [_flat(segmentation)]
    parts = [part for part in segmentation if part]
    return [_flat(part) if all(_is_point(point) for point in part) else part for part in parts]


def _is_point(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) in (int, float)


def _flat(points: Sequence[Sequence[float]]) -> list[float]:
    return [value for point in points for value in point]


def _problem_of_polygon(polygon: list, low: float, high: float) -> str:
    if len(polygon) < 6 or len(polygon) % 2:
        return SHORT
    if not _are_finite(polygon):
        return NOT_FINITE
    return "" if low <= min(polygon) and max(polygon) <= high else FAR


def _are_finite(values: list) -> bool:
    try:
        return math.isfinite(sum(values))  # NaN and infinity stay in a sum
    except (TypeError, OverflowError):  # no number; an int that no float can hold
        return False


def _usable_runs(mask: dict, width: int, height: int) -> tuple[dict | None, str]:
    counts = mask.get("counts")
    if not isinstance(counts, (list, str)) or not isinstance(mask.get("size"), list):
        return None, NO_MASK
    if mask["size"] != [height, width]:
        return None, OTHER_SIZE
    try:
        runs = np.array(counts, np.int64) if isinstance(counts, list) else _decoded(counts)
    except (ValueError, TypeError, OverflowError):
        return None, BAD_RUNS
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        return None, BAD_RUNS
    return {
        "size": [height, width],
        "counts": runs.tolist() if isinstance(counts, list) else counts,
    }, ""


def _decoded(text: str) -> np.ndarray:
    """Run lengths of COCO's compressed text.

    Each number is a run of characters of 5 bits, from the lowest, with the sixth bit set in all
    but its last one; the highest bit of that one is the sign. From the fourth number on, what was
    written is the difference to the number two places before (pycocotools' maskApi.c).
    """
    values = np.frombuffer(text.encode("latin-1"), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((values & 32) == 0)
    if not len(values) or ((values < 0) | (values > 63)).any() or values[-1] & 32:
        raise ValueError("no run lengths")
    first = np.concatenate([[0], last[:-1] + 1])
    places = np.arange(len(values)) - np.repeat(first, last - first + 1)
    if places.max() > 10:
        raise ValueError("a run length that is too long")
    numbers = np.add.reduceat((values & 31) << (5 * places), first)
    numbers -= np.where(values[last] & 16, 1 << (5 * (places[last] + 1)), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
