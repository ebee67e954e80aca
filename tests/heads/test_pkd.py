"""PKD keeps to the contract; values of the head."""

import pytest
import torch
from head_contract import HeadContract
from kd_testing import STRIDES, head_cfg, make_context, toy_info, wave

from projects.kd.errors import ConfigError
from projects.kd.heads import build_imitation_heads

GOLDEN = 0.91732912


class TestPKD(HeadContract):
    name = "PKD"


def build(**node):
    return build_imitation_heads(head_cfg("PKD", **node), toy_info(3), toy_info(3))["PKD"]


def golden_context():
    ctx = make_context(sizes=((32, 48),) * 2, canvas=(32, 48), channels=(3, 3))
    ctx.student_features["p3"] = wave("student", 2, 3, 4, 6, dtype=torch.float32)
    ctx.teacher_features["p3"] = wave("teacher", 2, 3, 4, 6, dtype=torch.float32)
    return ctx


def test_golden_number_through_the_head():
    loss = build(LEVELS=("p3",))(golden_context())["loss_kd_pkd"]
    assert loss.item() == pytest.approx(6 * GOLDEN, rel=1e-5)


def test_levels_are_summed():
    ctx = golden_context()
    alone = [build(LEVELS=(level,))(ctx)["loss_kd_pkd"] for level in STRIDES]
    torch.testing.assert_close(build()(ctx)["loss_kd_pkd"], sum(alone))


def test_a_teacher_of_double_resolution_is_resized_to_the_students_grid():
    ctx = golden_context()
    expected = build(LEVELS=("p3",))(ctx)["loss_kd_pkd"]
    ctx.teacher_features["p3"] = (
        ctx.teacher_features["p3"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    torch.testing.assert_close(build(LEVELS=("p3",))(ctx)["loss_kd_pkd"], expected)


def test_different_channels_without_an_adapter_are_refused():
    cfg = head_cfg("PKD", {"ADAPTER": {"TYPE": "none"}})
    with pytest.raises(ConfigError, match="KD.ADAPTER.TYPE"):
        build_imitation_heads(cfg, toy_info(3), toy_info(4))
