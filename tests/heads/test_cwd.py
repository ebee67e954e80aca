"""CWD keeps to the contract on features and on logits; values of the head, and what it refuses."""

import dataclasses

import pytest
import torch
from head_contract import HeadContract
from kd_testing import (
    CHANNELS,
    STRIDES,
    head_cfg,
    make_context,
    toy_info,
    toy_retinanet,
    wave,
)

from projects.kd.errors import ConfigError
from projects.kd.heads import build_imitation_heads
from projects.kd.predict import DenseOutputs


class TestCWD(HeadContract):
    name = "CWD"
    node = {"TAU": 2.0}


class TestStandardisedCWD(HeadContract):
    name = "CWD"
    node = {"STANDARDIZE": True}


class TestCWDOnLogits(HeadContract):
    name = "CWD"
    node = {"TARGET": "dense"}
    adapts = False
    reads = "dense"


def build(student=None, teacher=None, **node):
    infos = toy_info(3) if student is None else student, toy_info(3) if teacher is None else teacher
    return build_imitation_heads(head_cfg("CWD", **node), *infos)["CWD"]


@pytest.mark.parametrize(("tau", "value"), [(1.0, 1.45068518), (4.0, 2.70280353)])
@pytest.mark.parametrize("target", ["features", "dense"])
def test_golden_numbers_through_the_head(target, tau, value):
    ctx = make_context(sizes=((32, 48),) * 2, canvas=(32, 48), channels=(3, 3))
    sides = {"student": (ctx.student_features, ctx.student_outputs)}
    sides["teacher"] = (ctx.teacher_features, ctx.teacher_outputs)
    for name, (features, outputs) in sides.items():
        values = wave(name, 2, 3, 4, 6, dtype=torch.float32)
        if target == "features":
            features["p3"] = values
        else:
            outputs["dense"].logits[0] = values
    loss = build(TAU=tau, LEVELS=("p3",), TARGET=target, WEIGHT=10.0)(ctx)["loss_kd_cwd"]
    assert loss.item() == pytest.approx(10 * value, rel=1e-5)


def test_standardised_through_the_head():
    ctx = make_context(sizes=((32, 48),) * 2, canvas=(32, 48), channels=(3, 3))
    ctx.student_features["p3"] = wave("student", 2, 3, 4, 6, dtype=torch.float32)
    ctx.teacher_features["p3"] = wave("teacher", 2, 3, 4, 6, dtype=torch.float32)
    loss = build(LEVELS=("p3",), STANDARDIZE=True, WEIGHT=10.0)(ctx)["loss_kd_cwd"]
    assert loss.item() == pytest.approx(10 * 0.72385201, rel=1e-5)


def test_levels_are_summed():
    ctx = make_context(channels=(3, 3))
    alone = [build(LEVELS=(level,))(ctx)["loss_kd_cwd"] for level in STRIDES]
    torch.testing.assert_close(build()(ctx)["loss_kd_cwd"], sum(alone))


def test_logits_of_a_level_are_found_by_the_teachers_own_name():
    """The teacher's head may read more levels, under other names, several of one stride."""
    teacher = toy_info(3)
    own = {level: level.replace("p", "c") for level in teacher.shapes}
    teacher = dataclasses.replace(teacher, own_names=own)
    teacher.model.head_in_features = ["dilated c3", *own.values()]
    head = build(teacher=teacher, TARGET="dense")
    assert head.requires == {"dense"}
    ctx = make_context(channels=(3, 3), same=True)
    logits = ctx.teacher_outputs["dense"].logits
    finest = torch.randn(2, 8, 16, 16)
    ctx.teacher_outputs["dense"] = DenseOutputs([finest, *logits])
    assert head(ctx)["loss_kd_cwd"].item() == pytest.approx(0.0, abs=1e-6)


def test_other_anchors_or_classes_are_refused_in_the_first_step():
    head = build(TARGET="dense")
    ctx = make_context(channels=(3, 3))
    ctx.teacher_outputs["dense"].logits[1] = torch.randn(2, 12, 4, 4)
    with pytest.raises(ConfigError, match="KD.CWD.TARGET.* at p4 the student has 8 .* teacher 12"):
        head(ctx)


def test_other_anchors_or_classes_are_refused_when_built_where_the_detectors_tell():
    teacher = toy_retinanet()
    teacher.head.cls_score = torch.nn.Conv2d(CHANNELS, 12, 3)
    infos = [toy_info(CHANNELS, model=model) for model in (toy_retinanet(), teacher)]
    with pytest.raises(ConfigError, match="KD.CWD.TARGET.* the student has 8 .* teacher 12"):
        build(student=infos[0], teacher=infos[1], TARGET="dense")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_logits_need_one_stage_detectors_on_both_sides(side):
    with pytest.raises(ConfigError, match=f"KD.CWD.TARGET.*the {side} .* offers"):
        build(**{side: toy_info(3, taps=("features",))}, TARGET="dense")


def test_a_level_without_logits_is_refused():
    student = toy_info(3)
    student.model.head_in_features = ["p3", "p4"]
    with pytest.raises(ConfigError, match="KD.CWD.LEVELS.*p5"):
        build(student=student, TARGET="dense", LEVELS=("p3", "p5"))
    assert build(student=student, TARGET="dense").levels == ("p3", "p4")  # those that it reads


@pytest.mark.parametrize(("key", "value"), [("TARGET", "logits"), ("TAU", 0.0), ("TAU", -1.0)])
def test_bad_values_name_their_key(key, value):
    with pytest.raises(ConfigError, match=f"KD.CWD.{key}"):
        build(**{key: value})
