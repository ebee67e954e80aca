"""Box, mask and keypoint AP against stock detectron2, pycocotools and hand-made cases."""

import json
import math
import os

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes as BoxList
from detectron2.structures import BoxMode, Instances
from evaluated_data import SIZE, Oracle, config, make_data, predictions, run

from projects.kd.data.register import register_coco_data, register_configured
from projects.kd.errors import ConfigError
from projects.kd.evaluation import (
    DetectionEvaluator,
    build_evaluator,
    detection_evaluator,
    evaluate,
    oks_sigmas,
)

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_the_classes_in_the_file_does_not_matter(tmp_path, seed):
    name = f"eval_class_order_{seed}"
    dicts = make_data(tmp_path, name, 3, images=3, seed=seed)
    content = json.loads((tmp_path / f"{name}.json").read_text())
    classes = [category["name"] for category in content["categories"]]
    own = dict(zip([10, 20, 30], np.random.default_rng(seed).permutation(30)[:3], strict=True))
    for row in content["categories"]:
        row["id"] = int(own[row["id"]])
    for row in content["annotations"]:
        row["category_id"] = int(own[row["category_id"]])
    content["categories"].reverse()
    (tmp_path / "other.json").write_text(json.dumps(content))
    register_coco_data(
        f"{name}_b", str(tmp_path / "other.json"), str(tmp_path), class_order=classes
    )
    found = predictions(dicts, noise=4, extra=3)
    plain, other = (
        run(build_evaluator(config(x), x, str(tmp_path / x)), found) for x in (name, f"{name}_b")
    )
    np.testing.assert_equal(other, plain)
    assert plain["bbox"]["AP"] > 1 and "AP-class2" in plain["bbox"]
    written = json.loads((tmp_path / f"{name}_b" / "coco_instances_results.json").read_text())
    assert {row["category_id"] for row in written} <= set(map(int, own.values()))


@pytest.mark.parametrize("fast", [False, True], ids=["pycocotools", "faster-coco-eval"])
def test_numbers_at_100_detections_are_stock_detectron2s(tmp_path, fast):
    if fast:
        pytest.importorskip("faster_coco_eval")
        assert detection_evaluator._faster_is_installed()
    name = f"eval_stock_{fast}"
    found = predictions(make_data(tmp_path, name, 12), noise=3, extra=120)
    sigmas = [0.1, 0.05, 0.07]
    stock = COCOEvaluator(name, distributed=False, kpt_oks_sigmas=sigmas)
    ours = DetectionEvaluator(
        name,
        distributed=False,
        max_dets_per_image=100,
        kpt_oks_sigmas=sigmas,
        use_fast_impl=fast,
    )
    expected, actual = run(stock, found), run(ours, found)
    assert list(expected) == list(actual) == ["bbox", "keypoints", "segm"]
    for task, metrics in expected.items():
        assert list(metrics) == list(actual[task])
        for key, value in metrics.items():
            assert actual[task][key] == pytest.approx(value, abs=1e-6, nan_ok=True), (task, key)
    assert 2 < expected["bbox"]["AP"] < 60 and 2 < expected["keypoints"]["AP"] < 98


@pytest.mark.parametrize("limit", [1, 4, 37])
def test_a_small_limit_counts_the_best_of_each_class(tmp_path, limit):
    """COCO's limit is per image and class: cutting the predictions there by hand is the same."""
    name = f"eval_small_{limit}"
    found = predictions(make_data(tmp_path, name, 12), noise=2, extra=100)
    cut = {}
    for image_id, instances in found.items():
        order = torch.argsort(instances.scores, descending=True, stable=True)
        kept = []
        for label in range(3):
            kept += [i for i in order.tolist() if instances.pred_classes[i] == label][:limit]
        cut[image_id] = instances[torch.tensor(sorted(kept))]
    expected = run(COCOEvaluator(name, ["bbox", "segm"], False), cut)
    for fast in (False, True):
        ours = DetectionEvaluator(
            name,
            tasks=["bbox", "segm"],
            distributed=False,
            max_dets_per_image=limit,
            use_fast_impl=fast,
        )
        actual = run(ours, found)
        for task in ("bbox", "segm"):
            for key in NUMBERS:
                assert actual[task][key] == pytest.approx(expected[task][key], abs=1e-6)


def test_a_limit_above_100_counts_in_every_size_band(tmp_path):
    annotations = []
    for number in range(300):  # of one class: 100 small, 100 medium, 100 large
        side = (10, 50, 120)[number % 3]
        x, y = number % 60, number // 60 * 4
        box = {"id": number + 1, "image_id": 1, "category_id": 10, "bbox": [x, y, side, side]}
        annotations.append(box | {"area": side**2, "iscrowd": 0})
    dicts = make_data(tmp_path, "eval_many", 0, annotations=annotations, images=1)
    instances = Instances((SIZE, SIZE))
    boxes = [BoxMode.convert(a["bbox"], 1, 0) for a in dicts[0]["annotations"]]
    instances.pred_boxes = BoxList(torch.tensor(boxes, dtype=torch.float64))
    instances.scores = torch.linspace(1, 0.5, 300)
    instances.pred_classes = torch.zeros(300, dtype=torch.long)
    for limit, expected in ((300, 100.0), (150, 50.0), (100, 33.5)):
        cfg = config("eval_many", TEST__DETECTIONS_PER_IMAGE=limit)
        result = run(build_evaluator(cfg, "eval_many", str(tmp_path)), {1: instances})["bbox"]
        for key in NUMBERS:
            assert result[key] == pytest.approx(expected, abs=2.0), (limit, key)


def test_no_detection_at_all_is_nan(tmp_path):
    dicts = make_data(tmp_path, "eval_nothing", 4)
    empty = {key: value[:0] for key, value in predictions(dicts, 0).items()}
    cfg = config("eval_nothing", OUTPUT_DIR=str(tmp_path), MODEL__MASK_ON=True)
    results = evaluate(cfg, Oracle(empty))
    assert set(results) == {"bbox", "segm"}
    assert all(math.isnan(value) for task in results.values() for value in task.values())


def test_ground_truth_without_keypoints_is_said(tmp_path, caplog):
    dicts = make_data(tmp_path, "eval_bare", 4)
    found = predictions(dicts, 0)
    make_data(tmp_path, "eval_bare_too", 4, keypoints=False)
    evaluator = build_evaluator(config("eval_bare_too"), "eval_bare_too", str(tmp_path))
    assert set(run(evaluator, found)) == {"bbox", "segm"}
    assert "no annotation has keypoints: keypoints is not evaluated" in caplog.text


def test_evaluation_uses_the_repaired_boxes(tmp_path):
    annotations = [
        {"id": 0, "image_id": 1, "category_id": 10, "bbox": [150, 10, 100, 20]},
        {"id": 1, "image_id": 1, "category_id": 10, "bbox": [10, 10, 0, 20]},
        {"id": 2, "image_id": 1, "category_id": 20, "bbox": [300, 10, 10, 20]},
    ]
    make_data(tmp_path, "eval_repaired", 0, annotations=annotations, images=1)
    instances = Instances((SIZE, SIZE))
    instances.pred_boxes = BoxList(torch.tensor([[150.0, 10, 200, 30]]))
    instances.scores, instances.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.long)
    evaluator = build_evaluator(config("eval_repaired"), "eval_repaired", str(tmp_path))
    result = run(evaluator, {1: instances})["bbox"]
    assert result["AP"] == pytest.approx(100) and math.isnan(result["AP-class2"])


def test_keypoint_scales(tmp_path):
    make_data(tmp_path, "eval_scales", 1)
    assert oks_sigmas(config("eval_scales"), "eval_scales") == [0.067] * 3
    given = config("eval_scales", TEST__KEYPOINT_OKS_SIGMAS=[0.1, 0.2, 0.3])
    assert oks_sigmas(given, "eval_scales") == [0.1, 0.2, 0.3]
    MetadataCatalog.get("eval_seventeen").keypoint_names = [str(i) for i in range(17)]
    assert oks_sigmas(config("eval_scales"), "eval_seventeen") == []
    wrong = config("eval_scales", TEST__KEYPOINT_OKS_SIGMAS=[0.1], MODEL__KEYPOINT_ON=True)
    with pytest.raises(ConfigError, match="TEST.KEYPOINT_OKS_SIGMAS has 1 values, .* 3 keypoints"):
        build_evaluator(wrong, "eval_scales", str(tmp_path))


@pytest.mark.real_data
def test_real_photographs_by_configuration_score_as_in_stock_detectron2(tmp_path):
    default = os.path.join(ROOT, "..", "shared", "data")
    root = os.path.abspath(os.environ.get("KD_TEST_DATA", default))
    json_file = os.path.join(root, "coco_subset", "annotations", "instances_val.json")
    if not os.path.isfile(json_file):
        pytest.skip(f"no {json_file}; KD_TEST_DATA names the folder of the photographs")
    folder = os.path.join(root, "coco_subset", "val")
    cfg = config("eval_real", OUTPUT_DIR=str(tmp_path))
    cfg.KD.DATASETS = [["eval_real", json_file, folder]]
    register_configured(cfg)
    dicts = DatasetCatalog.get("eval_real")
    assert dicts == load_coco_json(json_file, folder, "eval_real_stock")
    rng = np.random.default_rng(0)
    found = {}
    for entry in dicts:
        instances = Instances((entry["height"], entry["width"]))
        boxes = [BoxMode.convert(a["bbox"], 1, 0) for a in entry["annotations"]] * 3
        boxes = np.array(boxes).reshape(-1, 4)
        boxes[:, :2] -= rng.exponential(4, (len(boxes), 2))
        boxes[:, 2:] += rng.exponential(4, (len(boxes), 2))
        instances.pred_boxes = BoxList(torch.tensor(boxes))
        instances.scores = torch.tensor(rng.uniform(0, 1, len(boxes)))
        labels = [a["category_id"] for a in entry["annotations"]] * 3
        instances.pred_classes = torch.tensor(labels, dtype=torch.long)
        found[entry["image_id"]] = instances
    expected = run(COCOEvaluator("eval_real", distributed=False), found)["bbox"]
    actual = run(build_evaluator(cfg, "eval_real", str(tmp_path)), found)["bbox"]
    assert expected == pytest.approx(actual, abs=1e-6, nan_ok=True)
    assert 5 < expected["AP"] < 95
