"""The COCO configs of ICD say what the released configs say."""

from __future__ import annotations

from pathlib import Path

import pytest
from kd_configs import load

ROOT = Path(__file__).resolve().parents[2] / "configs"
ONE_STAGE = ("backbone.fpn_", "backbone.top_block.", "head.")
TWO_STAGE = ("backbone.fpn_", "proposal_generator.", "roi_heads.")
DETECTION, SEGMENTATION = "COCO-Detection/", "COCO-InstanceSegmentation/"
# student: folder, teacher, weight, most instances, learning rate, inherited
RUNS = {
    "retinanet_R50": (DETECTION, "retinanet_R_101", 8.0, 300, 0.01, ONE_STAGE),
    "retinanet_R18": (DETECTION, "retinanet_R_101", 8.0, 300, 0.01, ONE_STAGE),
    "faster_rcnn_R50": (DETECTION, "faster_rcnn_R_101", 3.0, 100, 0.02, TWO_STAGE),
    "faster_rcnn_R18": (DETECTION, "faster_rcnn_R_101", 3.0, 100, 0.02, TWO_STAGE),
    "mask_rcnn_R50": (SEGMENTATION, "mask_rcnn_R_101", 3.0, 100, 0.02, TWO_STAGE),
}


def test_the_table_covers_every_icd_config():
    names = {
        f"{folder}{student}_FPN_from_R101_icd{kind}_1x.yaml"
        for student, (folder, *_) in RUNS.items()
        for kind in ("", "_inherit")
    }
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("COCO-*/*_icd*.yaml")
        if path.name.split("_FPN_")[0] in RUNS  # others: test_detector_configs.py
    }
    assert names == found


@pytest.mark.parametrize("kind", ["", "_inherit"])
@pytest.mark.parametrize("student", list(RUNS))
def test_published_values(student, kind):
    folder, teacher, weight, most, learning_rate, inherited = RUNS[student]
    plain = load(f"{folder}{student}_FPN_1x.yaml")
    cfg = load(f"{folder}{student}_FPN_from_R101_icd{kind}_1x.yaml")
    kd, icd = cfg.KD, cfg.KD.ICD
    assert (kd.META_ARCHITECTURE, kd.HEADS) == ("DistillMetaArch", ("ICD",))
    assert kd.TEACHER.CONFIG_FILE == f"model_zoo://{folder}{teacher}_FPN_3x.yaml"
    assert kd.TEACHER.WEIGHTS == ""
    assert kd.INIT_FROM_TEACHER == (inherited if kind else ())
    assert (icd.WEIGHT, icd.MAX_QUERIES) == (weight, most)
    assert (icd.LEVELS, kd.LEVELS, icd.MASK_PADDING) == ((), (), True)
    assert (icd.DIM, icd.HEADS, icd.LAYERS, icd.FFN_DIM) == (256, 8, 1, 1024)
    assert (icd.JITTER, icd.NEGATIVES_PER_BOX, icd.DETACH_ITERS) == (0.3, 5, 1000)
    assert (icd.CONF_WEIGHT, icd.BOX_WEIGHT) == (1, 1)
    assert (icd.ATTENTION, icd.PRIORS) == ("decoder", "dataset")
    optimizer = icd.OPTIMIZER
    assert (optimizer.NAME, optimizer.BASE_LR, optimizer.WEIGHT_DECAY) == ("AdamW", 1e-4, 1e-4)
    assert (optimizer.LR_SCHEDULER_NAME, optimizer.WARMUP_ITERS) == ("WarmupCosineLR", 10)
    assert optimizer.CLIP_NORM == 0.01
    # the student's optimizer is the baseline's but for clipping, which all of the authors' have
    clip = cfg.SOLVER.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "value", 1.0)
    assert cfg.SOLVER.BASE_LR == learning_rate
    clip.ENABLED = False
    for key in ("MODEL", "SOLVER", "INPUT", "DATASETS", "DATALOADER", "TEST"):
        assert cfg[key] == plain[key], f"{key} differs from the plain student's"


def test_plain_mask_rcnn_is_the_model_zoos_1x_config():
    ours = load(f"{SEGMENTATION}mask_rcnn_R50_FPN_1x.yaml")
    zoo = load(f"model_zoo://{SEGMENTATION}mask_rcnn_R_50_FPN_1x.yaml")
    for cfg in (ours, zoo):
        cfg.OUTPUT_DIR = ""
    assert ours == zoo
