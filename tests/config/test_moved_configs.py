"""A config of an earlier version: the line says what to use now, and that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from projects.kd import load_config
from projects.kd.errors import ConfigError
from projects.kd.moved_configs import _NAMES, moved

ROOT = Path(__file__).resolve().parents[2]
GONE = [
    ("shapes/retinanet_student_fgfi", "retinanet_student.yaml with .*retinanet_teacher.* fgfi,"),
    ("shapes/faster_rcnn_student_sdf_csa_2x", "faster_rcnn_teacher_2x.yaml --method sdf_csa"),
    ("shapes/mask_rcnn_student_cwd_masks", "--method cwd_masks, .*shapes_detectors"),
    ("shapes/retinanet_student_icd_inherit", "--method icd, .*KD.INIT_FROM_TEACHER"),
    ("aerial_cars/retinanet_student_from_r50_cwd", "retinanet_r50_teacher.yaml --method cwd"),
    ("VisDrone/retinanet_R18_FPN_from_R101_sdf_csa_hires", "retinanet_R101_FPN_1600.yaml"),
    ("VisDrone/faster_rcnn_R50_FPN_from_R101_pkd_querydet", "faster_rcnn_R101_FPN_querydet.yaml"),
    ("VisDrone/retinanet_R18_FPN_querydet", "visdrone_querydet.yaml, which has it"),
    ("Cityscapes/PSPNet_R18_from_R101_cwd_logits", "PSPNet_R101.yaml --method cwd_logits"),
    ("COCO-Detection/fcos_R50_FPN_from_R101_cwd_1x", "fcos_R50_FPN_1x.yaml with --teacher"),
    *((f"x/{name}", re.escape(use)) for name, use in _NAMES.items()),
]


@pytest.mark.parametrize(("name", "message"), GONE)
def test_what_to_use_is_there(name, message):
    said = moved(f"configs/{name}.yaml")
    assert re.search(message, said)
    assert not (ROOT / "configs" / f"{name}.yaml").exists()
    for path in re.findall(r"configs/[\w/.-]+\.yaml", said):
        assert (ROOT / path).is_file()
    assert "\n" not in said


def test_other_names_get_no_hint():
    for name in ("shapes/retinanet_student", "shapes/a_student_mine", "mine/x_student_cwd", "x"):
        assert moved(f"configs/{name}.yaml") == ""


def test_in_both_places(tmp_path):
    old = tmp_path / "mine.yaml"
    old.write_text('_BASE_: "shapes/gfl_student_cwd.yaml"\n')
    line = (
        r"mine.yaml: _BASE_: no such file .*gfl_student_cwd.yaml'; it is gone: use configs/shapes"
    )
    with pytest.raises(ConfigError, match=line):
        load_config(str(old))
    with pytest.raises(ConfigError, match="--config-file: no such file .* it is gone: use configs"):
        load_config(str(tmp_path / "shapes/gfl_student_cwd.yaml"))
