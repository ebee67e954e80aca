"""The VisDrone configs: protocol, recipes, and what students share with the plain one."""

from __future__ import annotations

from pathlib import Path

import pytest
from kd_configs import load as read

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "VisDrone"
DETECTORS = ("retinanet", "faster_rcnn")
BACKBONES = {"": ("R101", "R50", "R18", "MobileNetV2"), "_querydet": ("R101", "R50")}
PLAIN = [f"{d}_{b}_FPN{r}" for d in DETECTORS for r, names in BACKBONES.items() for b in names]
ALL = PLAIN + [f"{d}_R101_FPN_1600" for d in DETECTORS]


def load(name: str):
    return read(f"VisDrone/{name}.yaml")


def test_the_tables_cover_every_config():
    found = {path.stem for path in FOLDER.glob("*.yaml")}
    assert found == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_protocol(name):
    cfg = load(name)
    assert cfg.DATASETS.TEST == ("visdrone_val",)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 500
    dense = name.startswith("retinanet")
    node = cfg.MODEL.RETINANET if dense else cfg.MODEL.ROI_HEADS
    assert (node.NUM_CLASSES, node.SCORE_THRESH_TEST) == (10, 0.005)
    assert cfg.MODEL.META_ARCHITECTURE == ("RetinaNet" if dense else "GeneralizedRCNN")
    assert cfg.OUTPUT_DIR == f"output/VisDrone/{name}"
    assert cfg.SOLVER.IMS_PER_BATCH == 8


@pytest.mark.parametrize("name", [name for name in ALL if "querydet" in name])
def test_querydets_protocol(name):
    """The values of QueryDet's RetinaNet configs for VisDrone."""
    cfg = load(name)
    assert cfg.DATASETS.TRAIN == ("visdrone_train_crops",)
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ((1200,), 1999)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (3999, 3999)
    assert cfg.INPUT.IGNORED_REGIONS == "keep"
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.01, 50000)
    assert cfg.SOLVER.STEPS == (30000, 40000) and cfg.SOLVER.AMP.ENABLED
    assert [sizes[0] for sizes in cfg.MODEL.ANCHOR_GENERATOR.SIZES] == [32, 64, 128, 256, 512]
    assert cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA == 0.1 or "retinanet" not in name


@pytest.mark.parametrize("name", [name for name in ALL if "querydet" not in name])
def test_light_recipe(name):
    cfg = load(name)
    scale = 2 if "1600" in name else 1
    assert cfg.DATASETS.TRAIN == ("visdrone_train",)
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ((800 * scale,), 1333 * scale)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800 * scale, 1333 * scale)
    assert cfg.INPUT.IGNORED_REGIONS == "paint"
    assert [sizes[0] for sizes in cfg.MODEL.ANCHOR_GENERATOR.SIZES] == [
        scale * 16 * 2**level for level in range(5)
    ]
    epochs = cfg.SOLVER.MAX_ITER * 8 / 6471
    assert epochs == pytest.approx(12, abs=0.01)
    assert cfg.SOLVER.BASE_LR == (0.005 if name.startswith("retinanet") else 0.01)
