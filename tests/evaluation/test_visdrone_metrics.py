"""The VisDrone metrics against plain loops and pycocotools, and what they do not depend on."""

import dataclasses

import numpy as np
import pytest
from visdrone_oracle import coco_numbers, image, loop_evaluation, random_images

from projects.kd.errors import DataError
from projects.kd.evaluation.visdrone_metrics import evaluate_images

NAMES = {1: "a", 2: "b", 3: "c"}


def toolkit(*images):
    return evaluate_images(images, NAMES)["toolkit"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shuffled", [False, True])
def test_against_loops_over_everything(seed, shuffled):
    images = random_images(seed, images=4, detections=30)
    if shuffled:  # files that are not sorted
        rng = np.random.default_rng(seed)
        for i, one in enumerate(images):
            order = rng.permutation(len(one.scores))
            values = {key: getattr(one, key)[order] for key in ("boxes", "scores", "classes")}
            images[i] = dataclasses.replace(one, **values)
    wanted = loop_evaluation(images, (1, 2, 3))
    actual = toolkit(*images)
    assert {key: actual[key] for key in wanted} == pytest.approx(wanted, abs=1e-9)
    assert 1 < wanted["AP"] < 80


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_without_regions_cocos_reading_is_pycocotools(seed, ignored):
    images = random_images(seed, regions=False, ignored=ignored, detections=120)
    wanted = coco_numbers(images)
    actual = evaluate_images(images, NAMES)["coco"]
    assert {key: actual[key] for key in wanted} == pytest.approx(wanted, abs=1e-9)
    assert 5 < wanted["AP"] < 80


# --- properties ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distinct():
    """Images whose scores are all different."""
    rng = np.random.default_rng(5)
    images = random_images(5)
    total = sum(len(one.scores) for one in images)
    scores = rng.permutation(total) / total
    for i, one in enumerate(images):
        mine, scores = np.sort(scores[: len(one.scores)])[::-1], scores[len(one.scores) :]
        images[i] = dataclasses.replace(one, scores=mine)
    return images


def test_the_order_of_images_does_not_matter(distinct):
    expected = evaluate_images(distinct, NAMES)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(distinct))
        actual = evaluate_images([distinct[i] for i in order], NAMES)
        for reading, metrics in expected.items():
            assert actual[reading] == pytest.approx(metrics, abs=1e-9)


def test_scores_count_by_their_order_only(distinct):
    expected = evaluate_images(distinct, NAMES)
    squeezed = [dataclasses.replace(one, scores=one.scores**3 / 7) for one in distinct]
    assert evaluate_images(squeezed, NAMES) == expected


def test_ties_go_by_the_order_of_lines_and_images():
    right, wrong = [0, 0, 10, 10, 1, 0.5], [50, 50, 10, 10, 1, 0.5]
    gt = [[0, 0, 10, 10, 1]]
    assert toolkit(image(gt, [right, wrong]))["AP"] == 100
    assert toolkit(image(gt, [wrong, right]))["AP"] == 50
    assert toolkit(image(gt, [right]), image([], [wrong]))["AP"] == 100
    assert toolkit(image([], [wrong]), image(gt, [right]))["AP"] == 50


def test_duplicates_lower_precision_and_not_recall(distinct):
    doubled = []
    for one in distinct:
        values = {key: np.repeat(getattr(one, key), 2, 0) for key in ("boxes", "scores", "classes")}
        doubled.append(dataclasses.replace(one, **values))
    before, after = (evaluate_images(x, NAMES)["coco"] for x in (distinct, doubled))
    assert after["AR500"] >= before["AR500"] and after["AP"] < before["AP"]


def test_images_without_objects_or_detections(distinct):
    expected = evaluate_images(distinct, NAMES)
    more = [*distinct, image([], [], size=(50, 50)), image([], [], [[1, 1, 50, 50]])]
    assert evaluate_images(more, NAMES) == expected
    # a false positive in an empty image counts
    worse = [*distinct, image([], [[5, 5, 10, 10, 1, 1.1]])]
    assert evaluate_images(worse, NAMES)["toolkit"]["AP"] < expected["toolkit"]["AP"]
    # and one in an ignored region does not
    same = [*distinct, image([], [[5, 5, 10, 10, 1, 1.1]], [[1, 1, 50, 50]])]
    assert evaluate_images(same, NAMES) == expected


def test_a_result_file_with_a_category_that_does_not_exist_is_refused(tmp_path):
    from projects.kd.commands.evaluate.visdrone import read_results

    path = tmp_path / "a.txt"
    path.write_text("1,2,3,4,0.9,4,-1,-1\n1,2,3,4,0.5,11,-1,-1\n")
    assert read_results(str(path))[:, 5].tolist() == [4, 11]
    for category in ("12", "-1", "2.5"):
        path.write_text(f"1,2,3,4,0.9,4,-1,-1\n1,2,3,4,0.5,{category},-1,-1\n")
        with pytest.raises(DataError, match=f"a.txt:2: category {category} is none of 0 to 11"):
            read_results(str(path))
