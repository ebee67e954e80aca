"""Masks and keypoints: run lengths against pycocotools, and what can be used of the rest."""

import math

import numpy as np
import pycocotools.mask as mask_util
import pytest

from projects.kd.data import coco_fields
from projects.kd.data.coco_fields import usable_keypoints, usable_mask

TRIANGLE = [1, 2, 9, 2, 5, 8]


def test_run_lengths_are_read_as_pycocotools_writes_them():
    rng = np.random.default_rng(0)
    for number in range(200):
        height, width = rng.integers(1, 120, 2).tolist()
        mask = (rng.random((height, width)) < rng.random() ** 3).astype(np.uint8)
        if number % 5 == 0:
            mask[:] = number % 2
        packed = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
        runs = coco_fields._decoded(packed)
        pixels = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
        np.testing.assert_array_equal(pixels, mask)
        for counts in (packed, runs.tolist()):
            given = {"size": [height, width], "counts": counts}
            assert usable_mask(given, width, height) == (given, "")
        cut = {"size": [height, width], "counts": packed[:-1]}
        assert usable_mask(cut, width, height) == (None, coco_fields.BAD_RUNS)


@pytest.mark.parametrize("nothing", [None, [], [[]], [[], []], {}, ""])
def test_no_mask_is_no_problem(nothing):
    assert usable_mask(nothing, 20, 10) == (None, "")


@pytest.mark.parametrize(
    "form",
    [
        [TRIANGLE],
        TRIANGLE,
        [[1, 2], [9, 2], [5, 8]],
        [[[1, 2], [9, 2], [5, 8]]],
        [TRIANGLE, []],
    ],
)
def test_polygons_in_other_forms(form):
    assert usable_mask(form, 20, 10) == ([TRIANGLE], "")


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        ([[1, 2, 3, 4]], coco_fields.SHORT),
        ([1, 2, 3, 4], coco_fields.SHORT),
        ([[*TRIANGLE, 3]], coco_fields.SHORT),
        ([[[[1]]]], coco_fields.SHORT),
        ([[*TRIANGLE, math.nan, 1]], coco_fields.NOT_FINITE),
        ([[*TRIANGLE, "1", 1]], coco_fields.NOT_FINITE),
        ([[*TRIANGLE, None, 1]], coco_fields.NOT_FINITE),
        ([[*TRIANGLE, 1e308, 1e308]], coco_fields.NOT_FINITE),
        ([[*TRIANGLE, 10**400, 1.5]], coco_fields.NOT_FINITE),
        ([[*TRIANGLE, 41, 1]], coco_fields.FAR),
        ([[*TRIANGLE, 1, -21]], coco_fields.FAR),
        ("[[1, 2]]", coco_fields.NO_MASK),
        (7, coco_fields.NO_MASK),
        ([1, [2, 3]], coco_fields.NO_MASK),
        ({"counts": [200]}, coco_fields.NO_MASK),
        ({"size": [10, 20], "counts": 5}, coco_fields.NO_MASK),
        ({"size": [20, 10], "counts": [200]}, coco_fields.OTHER_SIZE),
        ({"size": [10, 20], "counts": [199]}, coco_fields.BAD_RUNS),
        ({"size": [10, 20], "counts": [-1, 201]}, coco_fields.BAD_RUNS),
        ({"size": [10, 20], "counts": ["a"]}, coco_fields.BAD_RUNS),
        ({"size": [10, 20], "counts": [10**30]}, coco_fields.BAD_RUNS),
        ({"size": [10, 20], "counts": ""}, coco_fields.BAD_RUNS),
        ({"size": [10, 20], "counts": "~" * 9}, coco_fields.BAD_RUNS),
        ({"size": [10, 20], "counts": "\u20ac"}, coco_fields.BAD_RUNS),
    ],
)
def test_what_is_no_usable_mask(mask, problem):
    assert usable_mask(mask, 20, 10) == (None, problem)


def test_good_polygons_stay_beside_bad_ones():
    assert usable_mask([[1], TRIANGLE, "x"], 20, 10) == (None, coco_fields.NO_MASK)
    assert usable_mask([[1], TRIANGLE], 20, 10) == ([TRIANGLE], coco_fields.PARTS)


@pytest.mark.parametrize(
    ("points", "count", "expected"),
    [
        ([1, 2, 2, 0, 0, 0], 2, ([1, 2, 2, 0, 0, 0], "")),
        ([1, 2, 2], None, ([1, 2, 2], "")),
        (None, 2, (None, "")),
        ([], 2, (None, "")),
        ([1, 2, 2], 2, (None, coco_fields.OTHER_NUMBER)),
        ([1, 2, 2, 3], None, (None, coco_fields.OTHER_NUMBER)),
        ("abc", 1, (None, coco_fields.NO_NUMBERS)),
        ([1, None, 2], 1, (None, coco_fields.NO_NUMBERS)),
        ([1, math.nan, 2], 1, (None, coco_fields.NO_NUMBERS)),
        ([1, 10**40, 2], 1, (None, coco_fields.NO_NUMBERS)),
        ([[1, 2, 2]] * 3, 1, (None, coco_fields.NO_NUMBERS)),
    ],
)
def test_keypoints(points, count, expected):
    assert usable_keypoints(points, count) == expected
