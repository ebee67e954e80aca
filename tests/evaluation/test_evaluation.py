"""Evaluators against stock detectron2, pycocotools and hand-made cases."""

import copy
import json
import math
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators
from detectron2.structures import Boxes as BoxList
from detectron2.structures import BoxMode, Instances
from PIL import Image

from projects.kd.config import add_kd_config, get_cfg
from projects.kd.data.register import register_coco_data, register_configured
from projects.kd.errors import ConfigError, DataError
from projects.kd.evaluation import (
    DetectionEvaluator,
    build_evaluator,
    check_evaluation,
    detection_evaluator,
    evaluate,
    oks_sigmas,
)

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SIZE = 200
KEYPOINTS = ["top", "left", "right"]
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def config(name, **options):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TEST = (name,) if isinstance(name, str) else name
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TEST = 0
    for key, value in options.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def make_data(folder, name, boxes_per_image, keypoints=True, annotations=None, images=6, seed=0):
    """Register random boxes of three classes with polygons and keypoints."""
    rng = np.random.default_rng(seed)
    made = []
    for image in range(1, images + 1):
        Image.new("RGB", (SIZE, SIZE)).save(folder / f"{image}.png")
        for _ in range(boxes_per_image):
            w, h = np.exp(rng.uniform(np.log(6), np.log(150), 2))
            x, y = rng.uniform(0, SIZE - w), rng.uniform(0, SIZE - h)
            points = [x + w / 2, y, 2, x, y + h, 1, x + w, y + h, 2]
            made.append(
                {
                    "id": len(made) + 1,
                    "image_id": image,
                    "category_id": int(rng.integers(1, 4)) * 10,
                    "bbox": [x, y, w, h],
                    "area": w * h / 2,
                    "iscrowd": int(rng.random() < 0.08),
                    "segmentation": [[x, y + h, x + w / 2, y, x + w, y + h]],
                }
            )
            if keypoints:
                made[-1] |= {"keypoints": points, "num_keypoints": 3}
    categories = [{"id": 10 * i, "name": f"class{i}", "keypoints": KEYPOINTS} for i in (1, 2, 3)]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE}
            for i in range(1, images + 1)
        ],
        "annotations": made if annotations is None else annotations,
        "categories": categories,
    }
    (folder / f"{name}.json").write_text(json.dumps(content))
    register_coco_data(name, str(folder / f"{name}.json"), str(folder))
    return DatasetCatalog.get(name)


def predictions(dicts, noise, extra=0, seed=1, exact_scores=False):
    """{image id: Instances}: the ground truth with noise, and false positives; scores have ties."""
    rng = np.random.default_rng(seed)
    found = {}
    for entry in dicts:
        annotations = [a for a in entry["annotations"] if not a["iscrowd"]]
        boxes = np.array([BoxMode.convert(a["bbox"], 1, 0) for a in annotations]).reshape(-1, 4)
        points = np.array([a["keypoints"] for a in annotations]).reshape(-1, 3, 3)
        masks = [
            mask_util.decode(mask_util.frPyObjects(a["segmentation"], SIZE, SIZE))[..., 0]
            for a in annotations
        ]
        boxes = boxes + rng.normal(0, 1, boxes.shape) * noise
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        points = points + rng.normal(0, 1, points.shape) * noise * (1, 1, 0)
        classes = [a["category_id"] for a in annotations]
        corners = rng.uniform(0, SIZE - 30, (extra, 2))
        boxes = np.concatenate([boxes, np.hstack([corners, corners + 25])])
        masks += [np.roll(np.eye(SIZE, dtype=np.uint8), i, 0) for i in range(extra)]
        points = np.concatenate([points, rng.uniform(0, SIZE, (extra, 3, 3))])
        classes += rng.integers(0, 3, extra).tolist()
        scores = rng.uniform(0, 1, len(classes)).round(2)
        if exact_scores:
            scores = np.linspace(1, 0.5, len(classes))
        instances = Instances((SIZE, SIZE))
        instances.pred_boxes = BoxList(torch.tensor(boxes))
        instances.scores = torch.tensor(scores)
        instances.pred_classes = torch.tensor(classes)
        instances.pred_masks = torch.tensor(np.array(masks).reshape(-1, SIZE, SIZE)).bool()
        instances.pred_keypoints = torch.tensor(points)
        found[entry["image_id"]] = instances
    return found


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


@pytest.mark.parametrize(
    ("metadata", "options", "message"),
    [
        ({"evaluator_type": "pascal_voc"}, {}, "has evaluator_type pascal_voc; it can be coco"),
        ({}, {}, "has evaluator_type None"),
        ({"evaluator_type": "sem_seg"}, {}, r"\(evaluator_type sem_seg\) has no label maps"),
        (
            {"evaluator_type": "coco_panoptic_seg", "stuff_classes": ["sky"]},
            {},
            "has no panoptic_json",
        ),
        (
            {"evaluator_type": "coco"},
            {"TEST__DETECTIONS_PER_IMAGE": 0},
            "^TEST.DETECTIONS_PER_IMAGE is 0",
        ),
        (
            {"evaluator_type": "visdrone"},
            {"TEST__DETECTIONS_PER_IMAGE": -1},
            "^TEST.DETECTIONS_PER_IMAGE is -1",
        ),
        (
            {"evaluator_type": "coco", "keypoint_names": ["a", "b"]},
            {"MODEL__KEYPOINT_ON": True, "TEST__KEYPOINT_OKS_SIGMAS": [0.1]},
            "^TEST.KEYPOINT_OKS_SIGMAS has 1 values, .* 2 keypoints",
        ),
        (
            {"evaluator_type": "coco"},
            {"TEST__KEYPOINT_OKS_SIGMAS": [0.1, 0.0]},
            "^TEST.KEYPOINT_OKS_SIGMAS .* must be positive",
        ),
        ({"evaluator_type": "coco"}, {}, ""),
        ({"evaluator_type": "sem_seg", "stuff_classes": ["sky"]}, {}, ""),
    ],
)
def test_what_evaluation_would_end_with_is_refused_before(metadata, options, message):
    name = "eval_checked_before"
    DatasetCatalog.register(name, lambda: [])
    try:
        MetadataCatalog.get(name).set(**metadata)
        cfg = config(name, **options)
        if not message:
            return check_evaluation(cfg)
        with pytest.raises(ConfigError, match=message) as error:
            check_evaluation(cfg)
        assert "\n" not in str(error.value)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_one_line(tmp_path, workers):
    make_data(tmp_path, f"eval_unreadable_{workers}", 1, images=3)
    (tmp_path / "2.png").write_bytes(b"")
    cfg = config(f"eval_unreadable_{workers}", DATALOADER__NUM_WORKERS=workers)
    with pytest.raises(DataError) as error:
        evaluate(cfg, lambda batch: [{} for _ in batch], output_dir=str(tmp_path / "out"))
    assert str(error.value).startswith(f"{tmp_path}/2.png: image cannot be read")
    assert "Traceback" not in str(error.value)


def run(evaluator, found):
    evaluator.reset()
    for image_id, instances in found.items():
        evaluator.process([{"image_id": image_id}], [{"instances": copy.deepcopy(instances)}])
    return evaluator.evaluate()


class Oracle(torch.nn.Module):
    """A "model" that gives stored predictions."""

    def __init__(self, found, **fields):
        super().__init__()
        self.found, self.fields = found, fields

    def forward(self, batch):
        """Stored outputs."""
        return [
            {"instances": copy.deepcopy(self.found[entry["image_id"]])}
            | {key: value[entry["image_id"]] for key, value in self.fields.items()}
            for entry in batch
        ]


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


def test_perfect_predictions_through_the_loader(tmp_path):
    dicts = make_data(tmp_path, "eval_perfect", 5)
    found = predictions(dicts, noise=0, exact_scores=True)
    cfg = config("eval_perfect", OUTPUT_DIR=str(tmp_path / "out"))
    results = evaluate(cfg, Oracle(found))
    assert set(results) == {"bbox", "segm", "keypoints"}
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] > 90  # masks are rounded to pixels
    assert results["keypoints"]["AP"] == pytest.approx(100)
    with open(tmp_path / "out" / "inference" / "coco_instances_results.json") as stream:
        written = json.load(stream)
    assert {item["category_id"] for item in written} == {10, 20, 30}


def test_several_data_sets_are_kept_apart(tmp_path):
    cfg = config(("eval_one", "eval_two"), OUTPUT_DIR=str(tmp_path))
    found = predictions(make_data(tmp_path, "eval_one", 3), noise=0)
    make_data(tmp_path, "eval_two", 5, seed=5)
    results = evaluate(cfg, Oracle(found))
    assert list(results) == ["eval_one", "eval_two"]
    assert results["eval_one"]["bbox"]["AP"] > 99 > results["eval_two"]["bbox"]["AP"]
    for name in results:
        assert (tmp_path / "inference" / name / "coco_instances_results.json").is_file()
    only = evaluate(cfg, Oracle(found), ["eval_one"], str(tmp_path / "elsewhere"))
    assert only == results["eval_one"]
    assert (tmp_path / "elsewhere" / "inference" / "coco_instances_results.json").is_file()


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


def test_user_errors_name_the_key(tmp_path):
    dicts = make_data(tmp_path, "eval_errors", 2)
    MetadataCatalog.get("eval_odd").evaluator_type = "odd"
    with pytest.raises(ConfigError, match="DATASETS.TEST: 'eval_odd' has evaluator_type odd"):
        build_evaluator(config("eval_odd"), "eval_odd")
    for limit in (0, -1):
        cfg = config("eval_errors", TEST__DETECTIONS_PER_IMAGE=limit)
        with pytest.raises(ConfigError, match="TEST.DETECTIONS_PER_IMAGE"):
            build_evaluator(cfg, "eval_errors")
    found = predictions(dicts, 0)
    found[1].pred_classes[0] = 3
    evaluator = build_evaluator(config("eval_errors"), "eval_errors", str(tmp_path))
    with pytest.raises(ConfigError, match="predicts class 3, but 'eval_errors' has 3 classes"):
        run(evaluator, found)
    for instances in found.values():
        instances.pred_classes[:] = 0
        instances.pred_keypoints = instances.pred_keypoints[:, :2]
    with pytest.raises(ConfigError, match="has 3 keypoints, the model predicts 2 .*NUM_KEYPOINTS"):
        run(evaluator, found)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png: image cannot be read"):
        evaluate(config("eval_errors", OUTPUT_DIR=str(tmp_path)), Oracle(found))


def semantic_data(folder, name, kind):
    """Two images whose semantic map has class 1 on the left half, with one box each."""
    truth = np.zeros((SIZE, SIZE), np.uint8)
    truth[:, : SIZE // 2] = 1
    Image.fromarray(truth).save(folder / "map.png")
    dicts = make_data(folder, name + "_boxes", 1, images=2)
    for entry in dicts:
        entry["sem_seg_file_name"] = str(folder / "map.png")
    DatasetCatalog.register(name, lambda: dicts)
    boxes = MetadataCatalog.get(name + "_boxes")
    MetadataCatalog.get(name).set(
        evaluator_type=kind,
        json_file=boxes.json_file,
        thing_classes=boxes.thing_classes,
        thing_dataset_id_to_contiguous_id=boxes.thing_dataset_id_to_contiguous_id,
        keypoint_names=KEYPOINTS,
        stuff_classes=["background", "thing"],
        ignore_label=255,
    )
    scores = torch.nn.functional.one_hot(torch.tensor(truth).long(), 2).permute(2, 0, 1).float()
    return dicts, {1: scores, 2: scores}


@pytest.mark.parametrize("kind", ["coco", "sem_seg"])
def test_semantic_segmentation_where_data_and_model_have_it(tmp_path, kind):
    name = f"eval_semantic_{kind}"
    dicts, scores = semantic_data(tmp_path, name, kind)
    cfg = config(name, OUTPUT_DIR=str(tmp_path))
    found = predictions(dicts, 0)
    results = evaluate(cfg, Oracle(found, sem_seg=scores))
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)
    assert ("bbox" in results) == (kind == "coco")
    assert "sem_seg" not in evaluate(cfg, Oracle(found))


def test_panoptic_data_get_all_evaluators(tmp_path):
    semantic_data(tmp_path, "eval_panoptic", "coco_panoptic_seg")
    MetadataCatalog.get("eval_panoptic").panoptic_json = str(tmp_path / "panoptic.json")
    combined = build_evaluator(config("eval_panoptic"), "eval_panoptic", str(tmp_path))
    assert isinstance(combined, DatasetEvaluators)
    names = [type(evaluator).__name__ for evaluator in combined._evaluators]
    assert names[:2] == ["DetectionEvaluator", "SemanticEvaluator"]


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
