"""VisDrone's annotation lines, the records made of them, and the quadrants."""

import numpy as np
import pytest

from projects.kd.data import visdrone
from projects.kd.data.visdrone import Problems, clip_rows, parse_annotations, quadrants, to_record


def parse(text):
    problems = Problems()
    return parse_annotations(text, "a.txt", problems), problems


# --- lines ---------------------------------------------------------------------------------------

GOOD = [1, 2, 3, 4, 1, 4, 0, 2]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("1,2,3,4,1,4,0,2", []),
        ("1,2,3,4,1,4,0,2,9", [visdrone.MORE_FIELDS]),
        ("1,2,3,4,1,4,0,2,", [visdrone.TRAILING_COMMA]),
        ("1,2,3,4,1,4,0,2,,", [visdrone.TRAILING_COMMA]),
        (" 1, 2,3 ,4,1,4,0,2 ", [visdrone.SPACES]),
        ("1 2 3 4 1 4 0 2", [visdrone.SPACES]),
        ("1,2,3,4,1,4,0,2\r", [visdrone.WINDOWS]),
        ("1,2,3,4,1,4,0,2,\r", [visdrone.WINDOWS, visdrone.TRAILING_COMMA]),
        ("1.4,2,2.5,4,1,4,0,2", [visdrone.FRACTION]),
        ("\ufeff1,2,3,4,1,4,0,2", []),
    ],
)
def test_lines_that_are_mended(line, found):
    rows, problems = parse(line + "\n")
    assert rows == [GOOD]
    assert dict(problems.counts) == dict.fromkeys(found, 1)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1,2,3,4,1,4,0", visdrone.FEWER_FIELDS),
        ("1,2,,4,1,4,0,0", visdrone.NO_NUMBER),
        ("1,2,x,4,1,4,0,0", visdrone.NO_NUMBER),
        ("1,2,nan,4,1,4,0,0", visdrone.NO_NUMBER),
        ("1,2,inf,4,1,4,0,0", visdrone.NO_NUMBER),
        ("1,2,3,4,0.7,4,0,0", visdrone.BAD_SCORE),
        ("1,2,3,4,2,4,0,0", visdrone.BAD_SCORE),
        ("1,2,3,4,1,12,0,0", visdrone.BAD_CATEGORY),
        ("1,2,3,4,1,-1,0,0", visdrone.BAD_CATEGORY),
        ("   ", visdrone.BLANK),
    ],
)
def test_lines_that_are_left_out(line, problem):
    rows, problems = parse(f"{line}\n1,2,3,4,1,4,0,2\n")
    assert rows == [GOOD]
    assert dict(problems.counts) == {problem: 1}
    assert problems.first == {problem: "a.txt:1"}


def test_an_empty_file_has_no_lines():
    rows, problems = parse("")
    assert rows == [] and not problems.counts
    assert parse("1,2,3,4,1,4,0,2") == parse("1,2,3,4,1,4,0,2\n")


def test_boxes_are_clipped_or_left_out():
    rows = [
        [0, 0, 60, 40, 1, 1, 0, 0],  # the whole image
        [-5, 10, 10, 10, 1, 1, 0, 0],
        [55, 35, 10, 10, 1, 1, 0, 0],
        [60, 0, 5, 5, 1, 1, 0, 0],  # starts where the image ends
        [-5, 0, 5, 5, 1, 1, 0, 0],
        [10, 10, 0, 5, 1, 1, 0, 0],
        [10, 10, 5, -3, 1, 1, 0, 0],
    ]
    problems = Problems()
    kept = clip_rows(rows, 60, 40, "a.txt", problems)
    assert [row[:4] for row in kept] == [[0, 0, 60, 40], [0, 10, 5, 10], [55, 35, 5, 5]]
    assert problems.counts == {visdrone.CLIPPED: 2, visdrone.OUTSIDE: 2, visdrone.NO_SIZE: 2}
    assert problems.first[visdrone.NO_SIZE] == "a.txt: 10,10,0,5,1,1,0,0 in 60x40"


def test_record_of_every_kind_of_object():
    rows = [
        [1, 1, 2, 3, 1, 1, 0, 2],
        [2, 2, 2, 2, 0, 10, 1, 0],  # ignored, of a class
        [3, 3, 4, 4, 0, 0, 0, 0],  # ignored region
        [5, 5, 2, 2, 0, 11, 0, 0],  # others
    ]
    record = to_record(rows, "a.jpg", 60, 40)
    first, second = record["annotations"]
    assert first == {
        **{"category_id": 1, "bbox": [1, 1, 2, 3], "area": 6, "iscrowd": 0},
        **{"truncation": 0, "occlusion": 2},
    }
    assert (second["category_id"], second["iscrowd"], second["truncation"]) == (10, 1, 1)
    assert record["ignored_regions"] == [[3, 3, 4, 4]]
    assert record["others"] == [[5, 5, 2, 2]]


# --- quadrants -----------------------------------------------------------------------------------


def test_quadrants_by_hand():
    """61x41 is cut at x 30, y 20; a box goes with its top left corner and is clipped."""
    rows = [
        [5, 5, 10, 10, 1, 1, 0, 0],  # inside of the first
        [25, 15, 10, 10, 1, 2, 0, 0],  # over the middle: first, 5x5
        [30, 19, 10, 10, 1, 3, 0, 0],  # second, 10x1
        [29, 20, 10, 10, 1, 4, 0, 0],  # third, 1x10
        [30, 20, 31, 21, 1, 5, 0, 0],  # all of the fourth
        [20, 10, 20, 20, 0, 0, 0, 0],  # a region, cut in four
    ]
    parts = quadrants(to_record(rows, "a.b.jpg", 61, 41))
    assert [frame for frame, _ in parts] == [
        (0, 0, 30, 20),
        (30, 0, 61, 20),
        (0, 20, 30, 41),
        (30, 20, 61, 41),
    ]
    records = [record for _, record in parts]
    assert [r["file_name"] for r in records] == [f"a.b_{i}.jpg" for i in range(4)]
    assert [(r["width"], r["height"]) for r in records] == [(30, 20), (31, 20), (30, 21), (31, 21)]
    boxes = [[(a["category_id"], a["bbox"]) for a in r["annotations"]] for r in records]
    assert boxes == [
        [(1, [5, 5, 10, 10]), (2, [25, 15, 5, 5])],
        [(3, [0, 19, 10, 1])],
        [(4, [29, 0, 1, 10])],
        [(5, [0, 0, 31, 21])],
    ]
    assert [a["area"] for r in records for a in r["annotations"]] == [100, 25, 10, 10, 651]
    assert [r["ignored_regions"] for r in records] == [
        [[20, 10, 10, 10]],
        [[0, 10, 10, 10]],
        [[20, 0, 10, 10]],
        [[0, 0, 10, 10]],
    ]


def test_quadrants_keep_every_box_once_and_all_of_the_regions():
    rng = np.random.default_rng(0)
    for _ in range(50):
        width, height = rng.integers(2, 60, 2).tolist()
        x, y = rng.integers(0, [width, height], (20, 2)).T
        w, h = rng.integers(1, 30, (20, 2)).T
        rows = np.stack([x, y, np.minimum(w, width - x), np.minimum(h, height - y)], 1).tolist()
        rows = [[*box, 1, int(rng.integers(0, 12)), 0, 0] for box in rows]
        record = to_record(rows, "a.jpg", width, height)
        parts = quadrants(record)
        assert sum(len(p["annotations"]) for _, p in parts) == len(record["annotations"])
        for key in ("ignored_regions", "others"):
            area = sum(w * h for _, p in parts for _, _, w, h in p[key])
            assert area == sum(w * h for _, _, w, h in record[key])
        for _, part in parts:
            for left, top, w, h in [a["bbox"] for a in part["annotations"]]:
                assert left >= 0 and top >= 0 and w > 0 and h > 0
                assert left + w <= part["width"] and top + h <= part["height"]
