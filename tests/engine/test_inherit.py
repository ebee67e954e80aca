"""Inheriting: which of the teacher's parameters a student starts from, and what is logged."""

from __future__ import annotations

import logging

import kd_models
import pytest
import torch

from projects.kd import check_config
from projects.kd.engine.inherit import inherit
from projects.kd.engine.trainer import DistillTrainer
from projects.kd.errors import ConfigError

ONE_STAGE = ("backbone.fpn_", "backbone.top_block.", "head.")
TWO_STAGE = ("backbone.fpn_", "proposal_generator.", "roi_heads.")
MOBILENET = {
    "MODEL__BACKBONE__NAME": "build_retinanet_timm_fpn_backbone",
    "MODEL__TIMM__NAME": "mobilenetv3_small_050",
}
BOTTLENECK = {"MODEL__RESNETS__DEPTH": 50, "MODEL__RESNETS__RES2_OUT_CHANNELS": 32}


def pair(arch="RetinaNet", student=None, teacher=None):
    """A student and a teacher with different random weights."""
    return (
        kd_models.build(kd_models.tiny_cfg(arch, **(student or {})), seed=1),
        kd_models.build(kd_models.tiny_cfg(arch, **(teacher or {})), seed=2),
    )


def check_result(student, teacher, before, result, prefixes):
    """Exactly the copied entries are the teacher's, and none is missing from the report."""
    now, theirs = student.state_dict(), teacher.state_dict()
    chosen = {name for name in now if name.startswith(prefixes)}
    assert chosen == set(result.copied) | set(result.skipped)
    assert not set(result.copied) & set(result.skipped)
    for name, value in now.items():
        assert torch.equal(value, (theirs if name in result.copied else before)[name]), name
    for name in result.skipped:
        assert name not in theirs or theirs[name].shape != now[name].shape


@pytest.mark.parametrize(
    ("arch", "prefixes"), [("RetinaNet", ONE_STAGE), ("GeneralizedRCNN", TWO_STAGE)]
)
def test_equal_shapes_are_all_copied(arch, prefixes):
    student, teacher = pair(arch)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    result = inherit(student, teacher, prefixes)
    check_result(student, teacher, before, result, prefixes)
    assert not result.skipped
    assert any(name.startswith("backbone.bottom_up.") for name in before)


@pytest.mark.parametrize("student", [{}, MOBILENET], ids=["R18", "MobileNet"])
def test_students_with_backbones_of_other_widths(student):
    student, teacher = pair(student=student, teacher=BOTTLENECK)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    result = inherit(student, teacher, ONE_STAGE)
    check_result(student, teacher, before, result, ONE_STAGE)
    lateral = [f"backbone.fpn_lateral{i}.weight" for i in (3, 4, 5)]
    assert set(result.skipped) == {*lateral, "backbone.top_block.p6.weight"}
    assert result.skipped[lateral[0]].startswith("student (16, ")
    assert {"backbone.fpn_output3.weight", "backbone.top_block.p7.weight"} <= set(result.copied)
    assert "head.cls_score.weight" in result.copied


def test_other_classes_keep_their_own_scores():
    student, teacher = pair(teacher={"MODEL__RETINANET__NUM_CLASSES": 7})
    result = inherit(student, teacher, ("head.",))
    assert set(result.skipped) == {"head.cls_score.weight", "head.cls_score.bias"}
    assert "head.bbox_pred.weight" in result.copied


def test_what_the_teacher_lacks_is_said():
    student, teacher = pair(student={"MODEL__RETINANET__NUM_CONVS": 2})
    result = inherit(student, teacher, ("head.",))
    assert result.skipped["head.cls_subnet.2.weight"] == "the teacher has none"


def test_every_key_is_logged(caplog):
    student, teacher = pair(teacher=BOTTLENECK)
    with caplog.at_level(logging.INFO, logger="projects.kd.engine.inherit"):
        result = inherit(student, teacher, ONE_STAGE)
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert f"Copied from the teacher ({len(result.copied)})" in text
    assert f"Not copied from the teacher ({len(result.skipped)})" in text
    for name in (*result.copied, *result.skipped):
        assert name in text


def test_a_prefix_that_nothing_has():
    student, teacher = pair()
    with pytest.raises(ConfigError, match="KD.INIT_FROM_TEACHER: .* 'roi_heads.'; it has backbone"):
        inherit(student, teacher, (*ONE_STAGE, "roi_heads."))


def test_nothing_to_copy():
    student, teacher = pair(teacher={"MODEL__FPN__OUT_CHANNELS": 24})
    with pytest.raises(ConfigError, match="KD.INIT_FROM_TEACHER: nothing can be copied"):
        inherit(student, teacher, ("backbone.fpn_",))


def test_it_needs_a_teacher():
    cfg = kd_models.tiny_cfg(KD__INIT_FROM_TEACHER=("head.",), DATASETS__TEST=())
    cfg.MODEL.RETINANET.NUM_CLASSES = 6
    with pytest.raises(ConfigError, match="KD.INIT_FROM_TEACHER needs KD.META_ARCHITECTURE"):
        check_config(cfg)


def test_training_starts_from_the_teacher_and_a_resumed_run_does_not(tmp_path):
    teacher = kd_models.write_teacher(tmp_path)
    weights = torch.load(teacher[1])["model"]
    cfg = kd_models.distill_cfg(
        teacher, KD__INIT_FROM_TEACHER=ONE_STAGE, OUTPUT_DIR=str(tmp_path / "run"), SEED=1
    )
    name = "head.cls_score.weight"
    trainer = DistillTrainer(cfg)
    assert not torch.equal(trainer.student.state_dict()[name], weights[name])
    trainer.resume_or_load(resume=True)
    assert torch.equal(trainer.student.state_dict()[name], weights[name])
    with torch.no_grad():
        trainer.student.head.cls_score.weight.fill_(0.5)
    (tmp_path / "run").mkdir(exist_ok=True)
    trainer._trainer.iter = trainer.iter = 3
    trainer.checkpointer.save("model_0000003", iteration=3)
    again = DistillTrainer(cfg)
    again.resume_or_load(resume=True)
    assert (again.student.state_dict()[name] == 0.5).all()
    assert again.start_iter == 4
