"""student.yaml: stock detectron2 builds and loads the student from it, without this project."""

from __future__ import annotations

import json
import subprocess
import sys

import kd_models
import pytest
import torch
from detectron2.config import get_cfg

from projects.kd.engine.export import needed_packages, write_student_config

STOCK = """
import json, sys, torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
cfg.MODEL.DEVICE = "cpu"
model = build_model(cfg).eval()
DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
image = torch.load(sys.argv[2])
with torch.no_grad():
    found = model([{"image": image, "height": 64, "width": 96}])[0]["instances"]
assert not any(name.startswith("projects") for name in sys.modules)
print(json.dumps({"boxes": found.pred_boxes.tensor.tolist(), "scores": found.scores.tolist()}))
"""


def test_stock_detectron2_finds_the_same_in_a_process_without_this_project(tmp_path):
    cfg = kd_models.tiny_cfg(OUTPUT_DIR=str(tmp_path))
    student = kd_models.build(cfg).eval()
    torch.save({"model": student.state_dict(), "distill": {}}, tmp_path / "model_final.pth")
    image = kd_models.make_batch(((64, 96),))[0]["image"]
    torch.save(image, tmp_path / "image.pt")
    path = write_student_config(cfg, student)
    assert path == str(tmp_path / "student.yaml")
    result = subprocess.run(
        [sys.executable, "-c", STOCK, path, str(tmp_path / "image.pt")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    theirs = json.loads(result.stdout.splitlines()[-1])
    with torch.no_grad():
        ours = student([{"image": image, "height": 64, "width": 96}])[0]["instances"]
    assert len(theirs["scores"]) == len(ours) > 5
    assert torch.equal(torch.tensor(theirs["boxes"]), ours.pred_boxes.tensor)
    assert torch.equal(torch.tensor(theirs["scores"]), ours.scores)


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_it_holds_detectron2s_keys_only_and_the_students_values(arch, tmp_path):
    cfg = kd_models.tiny_cfg(arch, OUTPUT_DIR=str(tmp_path), KD__HEADS=("CWD",))
    path = write_student_config(cfg, kd_models.build(cfg))
    stock = get_cfg()
    stock.merge_from_file(path)  # refuses a key that it does not know
    assert stock.MODEL.RESNETS.DEPTH == 18 and stock.MODEL.META_ARCHITECTURE == arch
    assert stock.INPUT.MIN_SIZE_TEST == 64
    assert stock.MODEL.WEIGHTS == str(tmp_path / "model_final.pth")


@pytest.mark.parametrize(
    ("arch", "overrides", "needed"),
    [
        ("ConditionalDETR", {}, "projects.kd.modeling.conditional_detr.ConditionalDETR"),
        (
            "RetinaNet",
            {
                "MODEL__BACKBONE__NAME": "build_retinanet_timm_fpn_backbone",
                "MODEL__TIMM__NAME": "mobilenetv3_small_050",
            },
            "build_retinanet_timm_fpn_backbone",
        ),
    ],
)
def test_other_students_are_said_to_need_more(arch, overrides, needed, tmp_path, caplog):
    cfg = kd_models.tiny_cfg(arch, OUTPUT_DIR=str(tmp_path), **overrides)
    student = kd_models.build(cfg)
    with caplog.at_level("INFO"):
        assert write_student_config(cfg, student) == ""
    assert not (tmp_path / "student.yaml").exists()
    assert "stock detectron2 cannot build this student" in caplog.text and needed in caplog.text
    assert needed_packages(cfg, student)
