"""The configs of Conditional DETR and D3ETR say what the literature says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kd_configs import load as read

from projects.kd import build_training_model
from projects.kd.engine.optim import build_optimizations

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "COCO-DETR"
EPOCH = 118287 // 16 + 1  # iterations
PAIRS = {
    f"conditional_detr_R50_{level}_from_R101_d3etr_{epochs}ep": (
        f"conditional_detr_R50_{level}_{epochs}ep",
        f"conditional_detr_R101_{level}_50ep",
    )
    for level in ("C5", "DC5")
    for epochs in (12, 50)
}
PAIRS["conditional_detr_R18_C5_from_R50_d3etr_50ep"] = (
    "conditional_detr_R18_C5_50ep",
    "conditional_detr_R50_C5_50ep",
)
PLAIN = {name for pair in PAIRS.values() for name in pair}


def load(name):
    return read(f"COCO-DETR/{name}.yaml")


def test_the_tables_cover_every_config():
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == {*PAIRS, *PLAIN}


@pytest.mark.parametrize("name", sorted({*PAIRS, *PLAIN}))
def test_schedule_is_that_of_the_authors(name):
    cfg = load(name)
    epochs, drop = (12, 11) if name.endswith("_12ep") else (50, 40)
    assert cfg.SOLVER.MAX_ITER == pytest.approx(epochs * EPOCH, abs=epochs)
    assert cfg.SOLVER.STEPS == pytest.approx((drop * EPOCH,), abs=epochs)
    solver = cfg.SOLVER
    assert (solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY) == ("AdamW", 1e-4, 1e-4)
    assert (solver.BACKBONE_MULTIPLIER, solver.IMS_PER_BATCH, solver.GAMMA) == (0.1, 16, 0.1)
    clip = solver.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 0.1)
    assert cfg.INPUT.DETR_AUGMENTATION and cfg.INPUT.MIN_SIZE_TRAIN == tuple(range(480, 801, 32))
    assert (cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST) == (1333, 800)
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.BACKBONE.FREEZE_AT == 2
    node = cfg.MODEL.CONDITIONAL_DETR
    assert (node.NUM_QUERIES, node.HIDDEN_DIM, node.NHEADS) == (300, 256, 8)
    assert (node.ENC_LAYERS, node.DEC_LAYERS, node.DIM_FEEDFORWARD) == (6, 6, 2048)
    assert (node.DROPOUT, node.CLS_WEIGHT, node.L1_WEIGHT, node.GIOU_WEIGHT) == (0.1, 2, 5, 2)
    student = name.split("_from")[0]
    assert (cfg.MODEL.RESNETS.RES5_DILATION == 2) == ("_DC5" in student)
    assert f"_R{cfg.MODEL.RESNETS.DEPTH}_" in student


@pytest.mark.parametrize("name", PAIRS)
def test_the_pair_differs_from_the_plain_student_in_kd_only(name):
    plain, teacher = PAIRS[name]
    ours, other = load(name), load(plain)
    assert ours.KD.HEADS == ("D3ETR",)
    assert ours.KD.TEACHER.CONFIG_FILE == str(FOLDER / f"{teacher}.yaml")
    for key in ("MODEL", "SOLVER", "INPUT", "DATASETS", "DATALOADER", "TEST"):
        assert ours[key] == other[key]


def test_all_parameters_but_the_frozen_ones_are_decayed_and_backbones_slower():
    cfg = load("conditional_detr_R50_C5_50ep")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_training_model(cfg)
    optimization = build_optimizations(cfg, model)["student"]
    groups = optimization.optimizer.param_groups
    assert all(group["weight_decay"] == 1e-4 for group in groups)
    rates = {p: group["initial_lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = 1e-5 if name.startswith("backbone.") else 1e-4
            assert rates[parameter] == pytest.approx(expected), name
    stages = {n.split(".")[0] for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert stages == {"res3", "res4", "res5"}
    # no warm-up, and a drop to a tenth after four fifths
    scheduler = optimization.scheduler
    assert scheduler.get_last_lr()[0] == pytest.approx(rates[next(iter(rates))])


def test_numbers_of_parameters_are_the_published_ones():
    """44 and 63 million, as the authors' table says."""
    for depth, millions in ((50, 44), (101, 63)):
        cfg = load(f"conditional_detr_R{depth}_C5_50ep")
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            model = build_training_model(cfg)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def test_the_keys_are_there_without_the_training_loop():
    """Tools load configs without importing the loader."""
    code = (
        f"from projects.kd import load_config; load_config({str(FOLDER / min(PAIRS))!r} + '.yaml')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
