"""Each rule of the VisDrone metrics, by hand."""

import dataclasses
import math

import numpy as np
import pytest
from visdrone_oracle import brute_ignored, image

from projects.kd.evaluation.visdrone_metrics import (
    READINGS,
    Reading,
    evaluate_images,
    ignored_pixels,
    match,
    outside_ignored,
    overlaps,
)

CLASSES = {1: "one", 2: "two"}


def toolkit(*images, classes=CLASSES):
    return evaluate_images(images, classes, {"toolkit": READINGS["toolkit"]})["toolkit"]


# --- rule 1: the union of the ignored regions ----------------------------------------------------


def test_half_of_the_area_in_the_union_drops_a_box():
    counts = ignored_pixels([[20, 20, 10, 60], [30, 20, 10, 60]], 100, 100)
    boxes = [
        [20, 30, 20, 20],  # inside of the two together
        [10, 30, 20, 20],  # columns 11..30 of which 20..30 are ignored: 11 of 20
        [9, 30, 20, 20],  # 10 of 20: exactly half is dropped
        [8, 30, 20, 20],  # 9 of 20 stays
        [25, 30, 10, 100],  # beyond the image: the area is that of the whole box, 51 of 100 rows
        [60, 60, 10, 10],
    ]
    assert outside_ignored(np.array(boxes), counts).tolist() == [
        *(False, False, False),
        *(True, False, True),
    ]


def test_regions_that_overlap_count_once():
    once = ignored_pixels([[20, 20, 9, 9]], 100, 100)
    twice = ignored_pixels([[20, 20, 9, 9], [20, 20, 9, 9]], 100, 100)
    assert (once == twice).all() and once[-1, -1] == 100  # w + 1 columns, h + 1 rows


def test_rounding_is_that_of_the_toolkit():
    counts = ignored_pixels([[1, 1, 10, 100]], 100, 100)  # columns 1 to 11
    # 1.5 rounds up to 2: columns 3..22 hold 9 of 20. 1.49 rounds to 1: 10 of 20.
    boxes = np.array([[1.5, 10, 20, 10], [1.49, 10, 20, 10], [0, 10, 20, 10], [-7, 10, 20, 10]])
    assert outside_ignored(boxes, counts).tolist() == [True, False, False, False]
    # widths and heights of 0.2 round to 1, not to 0
    assert outside_ignored(np.array([[5, 5, 0.2, 0.2]]), counts).tolist() == [False]


def test_against_a_loop_over_pixels():
    rng = np.random.default_rng(0)
    for _ in range(40):
        height, width = rng.integers(5, 30, 2)
        regions = np.concatenate([rng.integers(0, 30, (3, 2)), rng.integers(1, 15, (3, 2))], 1)
        boxes = np.concatenate([rng.uniform(-3, 30, (20, 2)), rng.uniform(0, 15, (20, 2))], 1)
        kept = outside_ignored(boxes, ignored_pixels(regions, height, width))
        wanted = [brute_ignored(box, regions.tolist(), height, width) for box in boxes]
        assert kept.tolist() == wanted


def test_dropped_objects_and_detections_leave_no_trace():
    clean = image([[60, 60, 10, 10, 1]], [[60, 60, 10, 10, 1, 0.5]])
    region = [[10, 10, 30, 30]]
    noisy = image(
        [[60, 60, 10, 10, 1], [12, 12, 10, 10, 1]],
        [[15, 15, 9, 9, 1, 0.9], [60, 60, 10, 10, 1, 0.5]],
        region,
    )
    assert toolkit(noisy) == pytest.approx(toolkit(clean), nan_ok=True)
    assert toolkit(noisy)["AP"] == 100
    # a dropped detection takes no place among the first: AR1 sees the other one
    assert toolkit(noisy)["AR1"] == 100
    without = dataclasses.replace(noisy, regions=np.zeros((0, 4), int))
    assert toolkit(without)["AP"] == pytest.approx(25)  # 1 of 2 found, at precision 1/2


# --- rule 2: ignored objects ---------------------------------------------------------------------


def test_ignored_objects_take_any_number_of_detections():
    truth = np.array([[0, 0, 40, 40], [60, 60, 10, 10]])
    ignored = np.array([True, False])
    boxes = np.array([[0, 0, 10, 10], [5, 5, 10, 10], [35, 0, 10, 40], [31, 0, 12, 40]])
    # inside, inside, half inside (neutral at 0.5 only), 3/4 inside (up to 0.75)
    wanted = [[-1] * 10, [-1] * 10, [-1] + [0] * 9, [-1] * 6 + [0] * 4]
    assert match(boxes, truth, ignored).tolist() == wanted


def test_an_evaluated_object_comes_before_an_ignored_one():
    truth = np.array([[0, 0, 20, 20], [0, 0, 10, 12]])
    ignored = np.array([True, False])
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10]])
    # IoU 100/120 = 0.833 with the object, 1 over its area with the ignored one
    assert match(boxes, truth, ignored).tolist() == [[1] * 7 + [-1] * 3, [-1] * 10]


# --- rule 3: greedy matching, IoU without + 1 ----------------------------------------------------


def test_overlaps_by_hand():
    boxes = np.array([[0, 0, 10, 10], [10, 0, 10, 10], [0, 0, 0, 5]])
    others = np.array([[5, 0, 10, 10], [0, 0, 10, 10]])
    assert overlaps(boxes, others) == pytest.approx(np.array([[1 / 3, 1], [1 / 3, 0], [0, 0]]))
    over = overlaps(boxes, others, over_boxes=True)
    assert over == pytest.approx(np.array([[1 / 2, 1], [1 / 2, 0], [0, 0]]))


def test_the_better_score_comes_first_and_takes_its_best_object():
    truth = np.array([[0, 0, 10, 10], [2, 0, 10, 10]])
    none = np.zeros(2, bool)
    # overlaps 9/11 with the first and 9/11 with the second: of equals the last is taken
    boxes = np.array([[1, 0, 10, 10], [2, 0, 10, 10]])
    found = match(boxes, truth, none)
    # the second detection is left with the first object: 8/12
    assert found[0].tolist() == [1] * 7 + [0] * 3
    # from 0.85 on its own object is free
    assert found[1].tolist() == [1] * 4 + [0] * 3 + [1] * 3


def test_a_duplicate_is_a_false_positive():
    boxes = np.array([[0, 0, 10, 10]] * 3)
    found = match(boxes, np.array([[0, 0, 10, 10]]), np.zeros(1, bool))
    assert found.tolist() == [[1] * 10, [0] * 10, [0] * 10]


def test_classes_are_matched_apart():
    result = toolkit(image([[0, 0, 10, 10, 1]], [[0, 0, 10, 10, 2, 0.9]]))
    assert result["AP"] == 0 and math.isnan(result["AP-two"]) and result["AP-one"] == 0


# --- rule 4: the first lines over all classes ----------------------------------------------------


def test_limits_count_lines_of_all_classes():
    gt = [[10 * i, 0, 10, 10, 1 + i % 2] for i in range(10)]
    gt += [[10 * i, 20, 10, 10, 1 + i % 2] for i in range(5)]
    found = [[*row, 0.9 - 0.01 * i] for i, row in enumerate(gt)]
    result = toolkit(image(gt, found))
    # class one has 8 objects, class two 7; the first line is of class one; both show in one image
    assert result["AR1"] == pytest.approx(100 * (1 / 8 + 0) / 2)
    assert result["AR10"] == pytest.approx(100 * (5 / 8 + 5 / 7) / 2)
    assert result["AR100"] == result["AR500"] == 100


def test_lines_are_not_sorted():
    gt = [[0, 0, 10, 10, 1], [50, 0, 10, 10, 1]]
    found = [[80, 80, 10, 10, 1, 0.1], [0, 0, 10, 10, 1, 0.9], [50, 0, 10, 10, 1, 0.8]]
    assert toolkit(image(gt, found))["AR1"] == 0
    assert toolkit(image(gt, found[1:] + found[:1]))["AR1"] == 50
    assert toolkit(image(gt, found))["AP"] == 100  # matching itself goes by score


def test_an_early_line_of_low_score_finds_its_object_at_a_small_limit():
    """Among all lines a later one of a higher score would take the object away."""
    gt = [[0, 0, 10, 10, 1]]
    found = [[0, 0, 10, 10, 1, 0.1], [0, 0, 10, 10, 1, 0.9]]
    assert toolkit(image(gt, found))["AR1"] == 100


def test_the_501st_line_does_not_count():
    gt = [[0, 0, 10, 10, 1]]
    wrong = [[50, 50, 10, 10, 1, 0.9]] * 499
    right = [[0, 0, 10, 10, 1, 0.5]]
    assert toolkit(image(gt, wrong + right))["AR500"] == 100
    late = toolkit(image(gt, wrong + wrong[:1] + right))
    assert late["AR500"] == late["AP"] == 0


# --- rule 5: the curve ---------------------------------------------------------------------------


def curve(reading):
    """Four objects; found, missed, found, missed: precision 1, 1/2, 2/3, 1/2."""
    gt = [[20 * i, 0, 10, 10, 1] for i in range(4)]
    far = [90, 90, 5, 5]
    found = [[*gt[0], 0.9], [*far, 1, 0.8], [*gt[1], 0.7], [*far, 1, 0.6]]
    return evaluate_images([image(gt, found)], CLASSES, {"it": reading})["it"]["AP"]


def test_area_and_101_points():
    assert curve(Reading()) == pytest.approx(100 * (0.25 * 1 + 0.25 * 2 / 3))
    # recalls 0 to 0.25 see 1, those to 0.5 see 2/3
    assert curve(READINGS["coco"]) == pytest.approx(100 * (26 * 1 + 25 * 2 / 3) / 101)


def test_ignored_objects_count_in_the_toolkits_recall():
    one = image([[0, 0, 10, 10, 1], [50, 50, 10, 10, 1, 1]], [[0, 0, 10, 10, 1, 0.9]])
    results = evaluate_images([one], CLASSES)
    assert results["toolkit"]["AP"] == results["toolkit"]["AR500"] == 50
    assert results["coco"]["AP"] == results["coco"]["AR500"] == 100


# --- rule 6: the mean over classes ---------------------------------------------------------------


def test_a_class_counts_once_for_each_image_that_shows_it():
    box, other = [0, 0, 10, 10], [50, 50, 10, 10]
    images = [
        image([[*box, 1], [*other, 2]], [[*box, 1, 0.9]]),
        image([[*box, 1]], [[*box, 1, 0.9]]),
        image([[*box, 1], [*other, 1]], [[*box, 1, 0.9], [*other, 1, 0.8]]),
    ]
    results = evaluate_images(images, CLASSES)
    assert results["toolkit"]["AP-one"] == results["coco"]["AP-one"] == pytest.approx(100)
    assert results["toolkit"]["AP-two"] == 0
    assert results["toolkit"]["AP"] == pytest.approx(100 * (3 * 1 + 1 * 0) / 4)
    assert results["coco"]["AP"] == pytest.approx(50)


def test_a_class_of_ignored_objects_only():
    one = image([[0, 0, 10, 10, 1], [50, 50, 10, 10, 2, 1]], [[0, 0, 10, 10, 1, 0.9]])
    results = evaluate_images([one], CLASSES)
    assert results["toolkit"]["AP"] == 50  # it counts there, with AP 0
    assert results["coco"]["AP"] == 100 and math.isnan(results["coco"]["AP-two"])


# --- rule 7: what comes out ----------------------------------------------------------------------


def test_the_metrics_and_their_thresholds():
    result = toolkit(image([[0, 0, 10, 10, 1]], [[0, 0, 10, 8.2, 1, 0.9]]))  # IoU 0.82
    assert list(result) == [
        *("AP", "AP50", "AP75", "AR1", "AR10", "AR100", "AR500"),
        *("AP-one", "AP-two"),
    ]
    assert (result["AP50"], result["AP75"]) == (100, 100)
    assert result["AP"] == result["AR1"] == pytest.approx(70)
    result = toolkit(image([[0, 0, 10, 10, 1]], [[0, 0, 10, 7, 1, 0.9]]))
    assert (result["AP50"], result["AP75"]) == (100, 0)


def test_nothing_at_all():
    for found in ([], [[0, 0, 10, 10, 1, 0.9]]):
        assert all(math.isnan(value) for value in toolkit(image([], found)).values())
    assert all(math.isnan(value) for value in toolkit().values())
    result = toolkit(image([[0, 0, 10, 10, 1]]))
    assert result["AP"] == result["AR500"] == 0


def test_unknown_readings_are_refused():
    with pytest.raises(ValueError, match="interpolation is '11_points', not one of"):
        Reading(interpolation="11_points")
