"""The VisDrone configs: protocol, recipes, and what students share with the plain one."""

from __future__ import annotations

from pathlib import Path

import pytest

from projects.kd import load_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "VisDrone"
METHODS = ("fgfi", "cwd", "pkd", "icd")
DETECTORS = ("retinanet", "faster_rcnn")
STUDENTS = {"": ("R50", "R18", "MobileNetV2"), "_querydet": ("R50",)}
BACKBONES = ("R101", "R50", "R18", "MobileNetV2")
PLAIN = [f"{d}_{b}_FPN{r}" for d in DETECTORS for b in BACKBONES for r in STUDENTS]
HIGH = [f"{d}_R101_FPN_1600" for d in DETECTORS]
DISTILLED = [
    (detector, student, method, recipe)
    for recipe, students in STUDENTS.items()
    for detector in DETECTORS
    for student in students
    for method in METHODS
]


def load(name: str):
    return load_config(str(FOLDER / f"{name}.yaml"))


def distilled_name(detector, student, method, recipe):
    return f"{detector}_{student}_FPN_from_R101_{method}{recipe}"


SCALEKD = [
    (detector, student, high)
    for detector in DETECTORS
    for student in STUDENTS[""]
    for high in ("", "_hires")
]


def scalekd_name(detector, student, high):
    return distilled_name(detector, student, "sdf_csa", high)


ALL = PLAIN + HIGH + [distilled_name(*item) for item in DISTILLED]
ALL += [scalekd_name(*item) for item in SCALEKD]


def test_the_tables_cover_every_config():
    found = {path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("Base-")}
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


@pytest.mark.parametrize("item", DISTILLED)
def test_students_differ_from_the_plain_one_in_kd_only(item):
    detector, student, method, recipe = item
    plain, cfg = load(f"{detector}_{student}_FPN{recipe}"), load(distilled_name(*item))
    teacher = f"{detector}_R101_FPN{recipe}"
    assert cfg.KD.TEACHER.CONFIG_FILE == str(FOLDER / f"{teacher}.yaml")
    assert cfg.KD.TEACHER.WEIGHTS == f"{load(teacher).OUTPUT_DIR}/model_final.pth"
    assert cfg.KD.HEADS == (method.upper(),)
    if method == "icd":
        assert cfg.SOLVER.CLIP_GRADIENTS.ENABLED and cfg.KD.ICD.MAX_QUERIES == 300
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    for key in ("MODEL", "SOLVER", "INPUT", "DATASETS", "DATALOADER", "TEST"):
        assert cfg[key] == plain[key], f"{key} differs from the plain student's"


@pytest.mark.parametrize("item", SCALEKD)
def test_scalekd(item):
    """Values and pairs of levels are those of the COCO configs."""
    detector, student, high = item
    cfg, plain = load(scalekd_name(*item)), load(f"{detector}_{student}_FPN")
    coco = f"configs/COCO-Detection/{detector}_R50_FPN_from_R101_sdf_csa{high}_1x.yaml"
    coco = load_config(str(ROOT / coco))
    for key in ("HEADS", "SDF", "CSA", "LEVEL_MAP"):
        assert cfg.KD[key] == coco.KD[key]
    teacher = f"{detector}_R101_FPN" + ("_1600" if high else "")
    assert cfg.KD.TEACHER.CONFIG_FILE == str(FOLDER / f"{teacher}.yaml")
    assert cfg.KD.TEACHER.WEIGHTS == f"{load(teacher).OUTPUT_DIR}/model_final.pth"
    sides = [load(name).INPUT.MIN_SIZE_TEST for name in (teacher, f"{detector}_{student}_FPN")]
    assert cfg.KD.TEACHER.INPUT_SCALE == sides[0] / sides[1]
    for key in ("MODEL", "SOLVER", "INPUT", "DATASETS", "DATALOADER", "TEST"):
        assert cfg[key] == plain[key], f"{key} differs from the plain student's"


@pytest.mark.parametrize("item", [item for item in DISTILLED if item[2] != "icd"])
def test_the_heads_are_cocos(item):
    """One place decides about a method's values: configs/COCO-Detection, after the papers."""
    detector, _, method, _ = item
    coco = load_config(
        str(ROOT / f"configs/COCO-Detection/{detector}_R50_FPN_from_R101_{method}_1x.yaml")
    )
    assert load(distilled_name(*item)).KD[method.upper()] == coco.KD[method.upper()]
