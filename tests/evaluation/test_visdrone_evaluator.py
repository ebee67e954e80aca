"""The evaluator of VisDrone data sets: results, COCO metrics after the filter, result files."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from projects.kd import check_config
from projects.kd.config import add_kd_config, get_cfg
from projects.kd.data import visdrone
from projects.kd.errors import ConfigError
from projects.kd.evaluation import build_evaluator, evaluate
from projects.kd.evaluation.visdrone_evaluator import VisDroneEvaluator

SIZE = (120, 160)


def config(name, folder, **options):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TEST = (name,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.TEST.DETECTIONS_PER_IMAGE = 500
    cfg.OUTPUT_DIR = str(folder)
    for key, value in options.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


@pytest.fixture
def make(tmp_path):
    """Register images from lines of VisDrone annotations; forgotten after the test."""
    names = []

    def register(name, *texts):
        records = []
        for number, text in enumerate(texts):
            Image.new("RGB", SIZE[::-1]).save(tmp_path / f"{number}_a.b.jpg")
            rows = visdrone.parse_annotations(text, "", visdrone.Problems())
            records.append(visdrone.to_record(rows, f"{number}_a.b.jpg", SIZE[1], SIZE[0]))
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(visdrone.to_coco(records, {})))
        visdrone.register_visdrone_data(name, str(path), str(tmp_path))
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def instances(*rows):
    """(x, y, w, h, category 1..10, score)"""
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    result = Instances(SIZE)
    result.pred_boxes = Boxes(torch.cat([table[:, :2], table[:, :2] + table[:, 2:4]], 1))
    result.pred_classes = table[:, 4].long() - 1
    result.scores = table[:, 5]
    return result


def run(evaluator, *found):
    evaluator.reset()
    for number, one in enumerate(found, start=1):
        evaluator.process([{"image_id": number}], [{"instances": one}])
    return evaluator.evaluate()


TRUTH = "10,10,20,20,1,4,0,0\n100,10,20,20,1,1,0,0\n60,60,40,40,0,0,0,0\n70,70,10,10,1,4,0,0\n"


def test_results_of_all_kinds(make, tmp_path):
    name = make("vde_all", TRUTH, "10,10,40,40,1,4,0,0\n10,60,40,20,0,4,0,0\n")
    evaluator = build_evaluator(config(name, tmp_path), name, str(tmp_path))
    assert type(evaluator) is VisDroneEvaluator
    first = instances(
        [10, 10, 20, 20, 4, 0.5],
        [70, 70, 10, 10, 4, 0.9],  # in the region, like an object
        [65, 65, 20, 20, 9, 0.8],  # in the region
        [100, 10, 20, 20, 1, 0.7],
    )
    second = instances([10, 10, 40, 40, 4, 0.4], [15, 62, 10, 10, 4, 0.95])  # on the ignored object
    results = run(evaluator, first, second)
    assert list(results) == ["bbox", "visdrone", "visdrone_coco"]
    assert results["visdrone_coco"]["AP"] == pytest.approx(100)
    # recall over ignored objects: 2 of 3 cars; cars show in two images, pedestrians in one
    assert results["visdrone"]["AP-car"] == pytest.approx(100 * 2 / 3)
    assert results["visdrone"]["AP"] == pytest.approx((2 * 100 * 2 / 3 + 100) / 3)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["bbox"]["APs"] == results["bbox"]["APm"] == pytest.approx(100)
    assert math.isnan(results["bbox"]["APl"])
    assert results["bbox"]["AP-car"] == results["bbox"]["AP-pedestrian"] == pytest.approx(100)


def test_the_result_files(make, tmp_path):
    name = make("vde_files", TRUTH, "")
    evaluator = VisDroneEvaluator(name, output_dir=str(tmp_path / "out"))
    rows = [[10, 10, 20, 20, 4, 0.25], [5.12345, 0, 1, 2, 10, 0.75]]
    run(evaluator, instances(*rows), instances())
    folder = tmp_path / "out" / "visdrone_submission"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "0_a.b.txt": "5.123,0.000,1.000,2.000,0.750000,10,-1,-1\n"
        "10.000,10.000,20.000,20.000,0.250000,4,-1,-1\n",
        "1_a.b.txt": "",
    }
    stored = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert sorted(item["category_id"] for item in stored) == [4, 10]


def test_the_best_500_count_whatever_the_model_gives(make, tmp_path):
    name = make("vde_many", "10,10,20,20,1,4,0,0\n")
    wrong = [[100, 50, 10, 10, 4, 0.5 + i / 10000] for i in range(500)]
    right = [10, 10, 20, 20, 4]
    for score, found in ((0.45, False), (0.5005, True)):
        # not sorted: the model's order does not matter
        results = run(
            VisDroneEvaluator(name, output_dir=str(tmp_path)), instances([*right, score], *wrong)
        )
        assert (results["visdrone"]["AP"] > 0) == (results["bbox"]["AP"] > 0) == found
        text = (tmp_path / "visdrone_submission" / "0_a.b.txt").read_text()
        assert len(text.splitlines()) == 500
    scores = [float(line.split(",")[4]) for line in text.splitlines()]
    assert scores == sorted(scores, reverse=True)


def test_cocos_metrics_reach_beyond_100_detections(make, tmp_path):
    lines = [f"{x},{y},8,8,1,4,0,0\n" for x in range(0, 150, 10) for y in range(0, 110, 10)]
    name = make("vde_crowd", "".join(lines))
    rows = [[*map(int, line.split(",")[:4]), 4, 1 - i / 1000] for i, line in enumerate(lines)]
    results = run(VisDroneEvaluator(name, output_dir=str(tmp_path)), instances(*rows))
    assert len(lines) == 165
    assert results["bbox"]["AP"] == results["bbox"]["APs"] == pytest.approx(100)
    assert results["visdrone"]["AP"] == pytest.approx(100)
    assert results["visdrone"]["AR100"] == pytest.approx(100 * 100 / 165)


def test_no_detections(make, tmp_path):
    name = make("vde_nothing", TRUTH)
    evaluator = VisDroneEvaluator(name, output_dir=str(tmp_path))
    results = run(evaluator, instances())
    assert results["visdrone"]["AP"] == results["visdrone_coco"]["AP"] == 0
    assert math.isnan(results["bbox"]["AP"])
    # nothing but detections in the region comes to the same for the protocol
    results = run(evaluator, instances([70, 70, 10, 10, 4, 0.9]))
    assert results["visdrone"]["AP"] == 0 and math.isnan(results["bbox"]["AP"])


def test_readings_are_chosen_by_the_config(make, tmp_path, caplog):
    name = make("vde_readings", TRUTH)
    cfg = config(name, tmp_path, TEST__VISDRONE_READINGS=("coco",))
    results = run(build_evaluator(cfg, name, str(tmp_path)), instances([10, 10, 20, 20, 4, 0.9]))
    assert list(results) == ["bbox", "visdrone_coco"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 10
    cfg.TEST.VISDRONE_READINGS = ("matlab",)
    with pytest.raises(
        ConfigError, match="TEST.VISDRONE_READINGS .*'matlab'.* each one of 'toolkit'"
    ):
        check_config(cfg, training=False)
    build_evaluator(config(name, tmp_path, TEST__DETECTIONS_PER_IMAGE=100), name, str(tmp_path))
    assert "TEST.DETECTIONS_PER_IMAGE is 100; VisDrone counts 500 detections" in caplog.text


class Oracle(torch.nn.Module):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def forward(self, batch):
        return [{"instances": self.found[entry["image_id"]]} for entry in batch]


def test_through_the_loader(make, tmp_path):
    name = make("vde_loader", TRUTH, "", "5,5,9,9,1,10,0,0\n")
    found = {
        1: instances([10, 10, 20, 20, 4, 0.9], [100, 10, 20, 20, 1, 0.8]),
        2: instances(),
        3: instances([5, 5, 9, 9, 10, 0.7]),
    }
    results = evaluate(config(name, tmp_path), Oracle(found))
    assert results["visdrone"]["AP"] == results["bbox"]["AP"] == pytest.approx(100)
    files = sorted((tmp_path / "inference" / "visdrone_submission").iterdir())
    assert [path.stat().st_size > 0 for path in files] == [True, False, True]


def test_metrics_are_those_of_the_written_files(make, tmp_path):
    """Reading the files back and evaluating them gives the same numbers to the last digit."""
    from projects.kd.evaluation.visdrone_metrics import ImageResult, evaluate_images

    rng = np.random.default_rng(0)
    names, texts, found = dict(enumerate(visdrone.CLASSES, start=1)), [], []
    for _ in range(4):
        truth = np.concatenate([rng.integers(0, 80, (20, 2)), rng.integers(5, 40, (20, 2))], 1)
        labels = rng.integers(0, 11, 20)
        texts.append(
            "".join(
                f"{x},{y},{w},{h},1,{c},0,0\n"
                for (x, y, w, h), c in zip(truth, labels, strict=True)
            )
        )
        boxes = np.repeat(truth, 3, 0) + rng.normal(0, 2, (60, 4))
        rows = np.column_stack([boxes, np.maximum(np.repeat(labels, 3), 1), rng.random(60)])
        found.append(instances(*rows.tolist()))
    name = make("vde_written", *texts)
    results = run(VisDroneEvaluator(name, output_dir=str(tmp_path)), *found)
    images = []
    for number, text in enumerate(texts):
        rows = np.array(visdrone.parse_annotations(text, "", visdrone.Problems()))
        objects, regions = rows[rows[:, 5] > 0], rows[rows[:, 5] == 0]
        path = tmp_path / "visdrone_submission" / f"{number}_a.b.txt"
        lines = np.loadtxt(path, delimiter=",", ndmin=2)
        images.append(
            ImageResult(
                *SIZE,
                gt_boxes=objects[:, :4],
                gt_classes=objects[:, 5],
                gt_ignored=objects[:, 4] == 0,
                regions=regions[:, :4],
                boxes=lines[:, :4],
                scores=lines[:, 4],
                classes=lines[:, 5],
            )
        )
    again = evaluate_images(images, names)
    assert again["toolkit"] == results["visdrone"]
    assert again["coco"] == results["visdrone_coco"]
    assert 5 < again["toolkit"]["AP"] < 95
