"""Sizes at training size, and the anchors suggested for them, against counting by hand."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from projects.kd import load_config
from projects.kd.analysis.size_advice import covered, size_advice, suggest_anchors
from projects.kd.errors import ConfigError

NAME = "size_advice"


@pytest.fixture
def register():
    def add(boxes, height=200, width=400):
        entry = {
            "height": height,
            "width": width,
            "annotations": [
                {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
                for box in boxes
            ],
        }
        DatasetCatalog.register(NAME, lambda: [entry])
        MetadataCatalog.get(NAME).set(thing_classes=["a"])

    yield add
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def config(arch="retinanet", *opts):
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(100,)", "INPUT.MAX_SIZE_TRAIN", 400]
    return load_config(f"configs/shapes/{arch}_student.yaml", [*sizes, *opts])


def test_boxes_are_resized_as_in_training(register):
    register([[0, 0, 40, 40], [0, 0, 8, 18]])  # 200x400 becomes 100x200
    advice = size_advice(NAME, config())
    assert sorted(advice.sizes) == pytest.approx([6, 20])
    assert advice.tiny == 0.5
    assert "50 % are below 8 pixels" in advice.text()


def test_the_longer_side_limits(register):
    register([[0, 0, 40, 40]])
    advice = size_advice(NAME, config("retinanet", "INPUT.MAX_SIZE_TRAIN", 80))
    assert advice.sizes == pytest.approx([8])


def test_a_crop_before_resizing_counts_with_its_size(register):
    register([[0, 0, 40, 40]])
    crop = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [50, 50]]
    assert size_advice(NAME, config("retinanet", *crop)).sizes == pytest.approx([80])


def test_anchors_are_suggested_where_a_detector_has_them(register):
    register([[0, 0, 2 * s, 2 * s] for s in range(10, 90)])
    advice = size_advice(NAME, config())
    assert len(advice.anchors) == 4 and all(len(level) == 2 for level in advice.anchors)
    assert advice.suggested == pytest.approx(78 / 80) and advice.present == 1.0
    assert "MODEL.ANCHOR_GENERATOR.SIZES" in advice.text()
    assert len(size_advice(NAME, config("faster_rcnn")).anchors) == 5
    without = size_advice(NAME, config("gfl"))
    assert without.anchors is None and "ANCHOR" not in without.text()


def test_a_data_set_without_boxes_is_refused(register):
    register([])
    with pytest.raises(ConfigError, match="no boxes"):
        size_advice(NAME, config())


def test_suggested_sizes_rise_by_one_factor():
    sizes = np.geomspace(10, 1000, 10001)
    values = [s for level in suggest_anchors(sizes, 3, 2) for s in level]
    low, high = np.quantile(sizes, [0.05, 0.95])
    expected = [low * (high / low) ** ((i + 0.5) / 6) for i in range(6)]
    assert values == [round(x) for x in expected]


def test_coverage_against_a_loop():
    rng = np.random.default_rng(0)
    sides = rng.uniform(4, 60, (50, 2))
    sizes, ratios = [10, 30], [0.5, 1.0, 2.0]
    good = 0
    for w, h in sides:
        best = 0.0
        for s in sizes:
            for r in ratios:
                aw, ah = s / r**0.5, s * r**0.5
                inner = min(w, aw) * min(h, ah)
                best = max(best, inner / (w * h + aw * ah - inner))
        good += best >= 0.5
    assert covered(sides, sizes, ratios) == good / 50
