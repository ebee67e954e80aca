"""The configs of CSA, of SDF with CSA, and of OutputKD: what they share and what they differ in."""

from __future__ import annotations

from pathlib import Path

import pytest
from kd_configs import load

from projects.kd.schedule import Ramp, build_ramp

ROOT = Path(__file__).resolve().parents[2] / "configs"
DETECTORS = ("retinanet", "faster_rcnn")
PYRAMID = {"retinanet": ("p3", "p4", "p5"), "faster_rcnn": ("p2", "p3", "p4", "p5")}
SECTIONS = ("MODEL", "SOLVER", "INPUT", "DATASETS", "DATALOADER", "TEST")
HEADS = {"csa": ("CSA",), "sdf_csa": ("SDF", "CSA"), "output_kd": ("OutputKD",)}


def assert_only_distillation_differs(cfg, plain):
    assert cfg.KD.META_ARCHITECTURE == "DistillMetaArch"
    for key in SECTIONS:
        assert cfg[key] == plain[key], f"{key} differs from the plain student's"


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(
    ("student", "kind", "method", "scale", "teacher"),
    [
        ("R50_FPN", "output_kd", "output_kd", 1.0, "zoo"),
        ("R50_FPN", "csa", "csa", 1.0, "zoo"),
        ("R50_FPN", "sdf_csa", "sdf_csa", 1.0, "zoo"),
        ("R50_FPN", "sdf_csa_hires", "sdf_csa", 2.0, "own"),
        ("R50_FPN_400", "sdf_csa", "sdf_csa", 2.0, "zoo"),
    ],
)
def test_coco(detector, student, kind, method, scale, teacher):
    plain = load(f"COCO-Detection/{detector}_{student}_1x.yaml")
    cfg = load(f"COCO-Detection/{detector}_{student}_from_R101_{kind}_1x.yaml")
    assert_only_distillation_differs(cfg, plain)
    kd = cfg.KD
    assert kd.HEADS == HEADS[method]
    assert kd.TEACHER.INPUT_SCALE == scale
    zoo = f"model_zoo://COCO-Detection/{detector}_R_101_FPN_3x.yaml"
    hires = str(ROOT / f"COCO-Detection/{detector}_R101_FPN_hires_3x.yaml")
    assert kd.TEACHER.CONFIG_FILE == (zoo if teacher == "zoo" else hires)
    assert (kd.TEACHER.WEIGHTS == "") == (teacher == "zoo")
    pairs = [] if scale == 1 else [[level, level] for level in PYRAMID[detector]]
    assert [list(pair) for pair in kd.LEVEL_MAP] == pairs
    if method == "output_kd":
        assert (kd.OUTPUTKD.PRESET, kd.OUTPUTKD.BOX_JITTER) == ("balanced", 0.0)
        return
    csa = kd.CSA
    assert (csa.PRESET, csa.DIM, csa.HEADS, csa.LEVELS, csa.RATES) == (
        *("balanced", 256, 8, ()),
        [],
    )
    assert (csa.LOCAL_ENHANCEMENT, csa.POSITIONS, csa.IDLE_ITERS) == (True, False, 0)
    optimizer = csa.OPTIMIZER
    assert (optimizer.NAME, optimizer.BASE_LR, optimizer.WEIGHT_DECAY) == ("Adam", 3e-4, 1e-4)
    assert build_ramp(cfg, "CSA") == Ramp(30000, 1000, -1), "the published warm-up"
