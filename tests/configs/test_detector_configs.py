"""COCO configs of further detectors: students are the zoo's, only the backbone or KD differs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from kd_configs import load

from projects.kd import load_config

ROOT = Path(__file__).resolve().parents[2]
ZOO = {
    "COCO-Detection/cascade_rcnn_R50_FPN_1x": "Misc/cascade_mask_rcnn_R_50_FPN_1x",
    "COCO-InstanceSegmentation/cascade_mask_rcnn_R18_FPN_1x": "Misc/cascade_mask_rcnn_R_50_FPN_1x",
    "COCO-Keypoints/keypoint_rcnn_R50_FPN_1x": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x",
    "COCO-Keypoints/keypoint_rcnn_R18_FPN_1x": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x",
    "COCO-InstanceSegmentation/mask_rcnn_R18_FPN_1x": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"
    ),
    "COCO-PanopticSegmentation/panoptic_fpn_R50_1x": (
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x"
    ),
    "COCO-PanopticSegmentation/panoptic_fpn_R18_1x": (
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x"
    ),
}
FOLDERS = ("COCO-Detection", "COCO-InstanceSegmentation", "COCO-Keypoints")
# those of RetinaNet and Faster R-CNN with ResNets have files of their own, one a method
ELSEWHERE = r"COCO-Detection/(retinanet|faster_rcnn)_R\d+_FPN_(400_)?from_R101_"
DISTILLED = sorted(
    name
    for folder in (*FOLDERS, "COCO-PanopticSegmentation")
    for path in (ROOT / "configs" / folder).glob("*_from_*.yaml")
    if not re.match(ELSEWHERE, name := path.relative_to(ROOT / "configs").as_posix())
)


@pytest.mark.parametrize("name", ZOO)
def test_plain_students_are_the_zoos(name):
    ours, zoo = load(f"{name}.yaml"), load(f"model_zoo://{ZOO[name]}.yaml")
    for cfg in (ours, zoo):
        cfg.OUTPUT_DIR = ""
        if "_R18_" in name or "cascade_rcnn" in name:
            for key in ("WEIGHTS", "PIXEL_MEAN", "PIXEL_STD", "RESNETS", "MASK_ON"):
                del cfg.MODEL[key]
            del cfg.INPUT["FORMAT"]
    assert ours == zoo


@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_students_differ_from_plain_ones_by_kd_only(name):
    """And by ICD's gradient clipping, which the authors' configs have."""
    stem = name.split("_from_")[0]
    plain = next(
        x for x in (f"{stem}_1x.yaml", f"{stem}_FPN_1x.yaml") if (ROOT / "configs" / x).is_file()
    )
    ours, base = load(name), load(plain)
    assert ours.KD.TEACHER.CONFIG_FILE and ours.KD.HEADS
    for cfg in (ours, base):
        cfg.OUTPUT_DIR = ""
        del cfg["KD"]
        if "_icd" in name:
            del cfg.SOLVER["CLIP_GRADIENTS"]
    ours.VERSION = base.VERSION
    assert ours == base


def test_teachers_outside_of_the_zoo_have_a_config_that_makes_their_weights():
    own = [load(name).KD.TEACHER for name in DISTILLED]
    own = [teacher for teacher in own if not teacher.CONFIG_FILE.startswith("model_zoo://")]
    assert own
    for teacher in own:
        cfg = load_config(str(ROOT / teacher.CONFIG_FILE))
        assert f"{cfg.OUTPUT_DIR}/model_final.pth" == teacher.WEIGHTS
        assert not cfg.KD.META_ARCHITECTURE


@pytest.mark.parametrize("name", [name for name in DISTILLED if "_icd" in name])
def test_icd_has_the_published_values_of_its_family(name):
    """Kang et al., released configs: weight 8 and 300 queries for FCOS, 3 and 100 for R-CNN."""
    icd = load(name).KD.ICD
    one_stage = name.startswith("COCO-Detection/fcos")
    assert (icd.WEIGHT, icd.MAX_QUERIES) == ((8.0, 300) if one_stage else (3.0, 100))
    assert (icd.LEVELS, icd.DETACH_ITERS, icd.LAYERS) == ((), 1000, 1)


@pytest.mark.parametrize("name", [name for name in DISTILLED if "_cwd" in name])
def test_cwd_leaves_the_last_level_out(name):
    kd = load(name).KD
    if kd.CWD.TARGET == "features" and not kd.LEVEL_MAP:
        one_stage = kd.CWD.WEIGHT == 5.0
        first = 3 if one_stage else 2
        assert kd.CWD.LEVELS == tuple(f"p{k}" for k in range(first, first + 4))
        assert one_stage == bool(re.search("fcos|gfl|reppoints|retinanet", name))
