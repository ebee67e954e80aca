"""Which evaluators a data set gets, what they are given, and what is refused."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from evaluated_data import KEYPOINTS, SIZE, Oracle, config, make_data, predictions, run
from PIL import Image

from projects.kd.data.mapper import ImageMapper, NamedErrors
from projects.kd.errors import ConfigError, DataError
from projects.kd.evaluation import (
    build_evaluator,
    check_evaluation,
    evaluate,
)
from projects.kd.evaluation.batches import EqualBatches, build_test_loader


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


def test_images_in_batches_give_the_same_results(tmp_path):
    dicts = make_data(tmp_path, "eval_batches", 5, images=5)
    found = predictions(dicts, noise=5)
    sizes, results = [], []
    for images in (1, 2):
        cfg = config("eval_batches", OUTPUT_DIR=str(tmp_path), TEST__IMS_PER_BATCH=images)
        model = Oracle(found)
        model.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
        results.append(evaluate(cfg, model))
    assert sizes == [1, 1, 1, 1, 1, 2, 2, 1]
    assert results[0] == results[1] and 0 < results[0]["bbox"]["AP"] < 99


def test_batches_hold_one_kind_and_every_image_once():
    kinds = ["a", "b", "a", None, "a", "b", None, "a", "c"]
    assert EqualBatches(range(9), kinds, 2).batches == [[0, 2], [1, 5], [3], [4, 7], [6], [8]]
    assert EqualBatches([8, 4, 2, 0], kinds, 3).batches == [[8], [4, 2, 0]]
    batches = EqualBatches([], kinds, 3)
    assert list(batches) == [] and len(batches) == 0


def test_batches_of_images_of_equal_size_after_resizing(tmp_path):
    images = [(40, 60), (60, 40), (80, 120), (40, 60)]
    for n, (height, width) in enumerate(images):
        Image.new("RGB", (width, height)).save(tmp_path / f"{n}.png")
    dicts = [
        {"file_name": str(tmp_path / f"{n}.png"), "image_id": n, "height": h, "width": w}
        for n, (h, w) in enumerate(images)
    ]
    DatasetCatalog.register("eval_sizes", lambda: dicts)
    cfg = config("eval_sizes", TEST__IMS_PER_BATCH=8, INPUT__MIN_SIZE_TEST=32)
    mapper = NamedErrors(ImageMapper(cfg, is_train=False))
    batches = list(build_test_loader(cfg, "eval_sizes", mapper))
    assert [[x["image_id"] for x in batch] for batch in batches] == [[0, 2, 3], [1]]
    assert {tuple(x["image"].shape) for x in batches[0]} == {(3, 32, 48)}
    # a mapper that is not ours: by the size of the file
    batches = list(build_test_loader(cfg, "eval_sizes", lambda x: x))
    assert [[x["image_id"] for x in batch] for batch in batches] == [[0, 3], [1], [2]]


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
