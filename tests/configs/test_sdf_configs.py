"""The configs of SDF: one student at three teacher resolutions, and what each differs in."""

from __future__ import annotations

from pathlib import Path

import pytest
from kd_configs import load

ROOT = Path(__file__).resolve().parents[2] / "configs"
DETECTORS = ("retinanet", "faster_rcnn")
PYRAMID = {"retinanet": ("p3", "p4", "p5"), "faster_rcnn": ("p2", "p3", "p4", "p5")}
SECTIONS = ("MODEL", "SOLVER", "INPUT", "DATASETS", "DATALOADER", "TEST")


def doubled(sizes):
    return [[2 * size for size in level] for level in sizes]


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(
    ("student", "kind", "scale", "teacher"),
    [
        ("R50_FPN", "sdf", 1.0, "zoo"),
        ("R50_FPN", "sdf_hires", 2.0, "own"),
        ("R50_FPN_400", "sdf", 2.0, "zoo"),
    ],
)
def test_coco(detector, student, kind, scale, teacher):
    plain = load(f"COCO-Detection/{detector}_{student}_1x.yaml")
    cfg = load(f"COCO-Detection/{detector}_{student}_from_R101_{kind}_1x.yaml")
    for key in SECTIONS:
        assert cfg[key] == plain[key], f"{key} differs from the plain student's"
    kd = cfg.KD
    assert (kd.META_ARCHITECTURE, kd.HEADS) == ("DistillMetaArch", ("SDF",))
    assert kd.TEACHER.INPUT_SCALE == scale
    zoo = f"model_zoo://COCO-Detection/{detector}_R_101_FPN_3x.yaml"
    hires = str(ROOT / f"COCO-Detection/{detector}_R101_FPN_hires_3x.yaml")
    assert kd.TEACHER.CONFIG_FILE == (zoo if teacher == "zoo" else hires)
    assert (kd.TEACHER.WEIGHTS == "") == (teacher == "zoo")
    sdf = kd.SDF
    assert (sdf.PRESET, sdf.WEIGHT, sdf.LEVELS) == ("balanced", -1.0, ())
    assert (list(sdf.DILATIONS), sdf.EMBED_DIM, sdf.NORMALIZE) == ([1, 2, 3], 256, True)
    assert (sdf.TEACHER_SDF, sdf.EMA_DECAY, sdf.MASK_PADDING) == ("ema", 0.999, True)
    pairs = [] if scale == 1 else [[level, level] for level in PYRAMID[detector]]
    assert [list(pair) for pair in kd.LEVEL_MAP] == pairs


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_teachers_input_is_scaled_from_the_students(detector):
    """What a teacher is trained on is what it is shown beside a student."""
    for student, teacher, scale in (
        ("R50_FPN_1x", f"COCO-Detection/{detector}_R101_FPN_hires_3x.yaml", 2.0),
        ("R50_FPN_400_1x", f"model_zoo://COCO-Detection/{detector}_R_101_FPN_3x.yaml", 2.0),
    ):
        ours = load(f"COCO-Detection/{detector}_{student}.yaml").INPUT
        theirs = load(teacher).INPUT
        assert [scale * side for side in ours.MIN_SIZE_TRAIN] == list(theirs.MIN_SIZE_TRAIN)
        assert scale * ours.MIN_SIZE_TEST == theirs.MIN_SIZE_TEST
        for key in ("MAX_SIZE_TRAIN", "MAX_SIZE_TEST"):
            assert abs(scale * ours[key] - theirs[key]) <= 1
    zoo = load(f"model_zoo://COCO-Detection/{detector}_R_101_FPN_3x.yaml")
    hires = load(f"COCO-Detection/{detector}_R101_FPN_hires_3x.yaml")
    assert (hires.MODEL, hires.SOLVER) == (zoo.MODEL, zoo.SOLVER)


@pytest.mark.parametrize(
    ("folder", "detector"),
    [("shapes", "retinanet"), ("shapes", "faster_rcnn"), ("aerial_cars", "retinanet")],
)
def test_small_data_sets(folder, detector):
    small, large = (load(f"{folder}/{detector}_{name}.yaml") for name in ("teacher", "teacher_2x"))
    # the two teachers differ in resolution, and in anchors as much
    for key in ("MIN_SIZE_TRAIN", "MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
        one, two = small.INPUT[key], large.INPUT[key]
        assert two == (tuple(2 * x for x in one) if isinstance(one, tuple) else 2 * one)
    sizes = large.MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes == doubled(small.MODEL.ANCHOR_GENERATOR.SIZES)
    large.MODEL.ANCHOR_GENERATOR.SIZES = small.MODEL.ANCHOR_GENERATOR.SIZES
    assert (large.MODEL, large.SOLVER) == (small.MODEL, small.SOLVER)
