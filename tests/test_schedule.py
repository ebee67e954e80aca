"""The factor of a distillation loss over the iterations."""

import kd_models
import pytest

from projects.kd.schedule import Ramp, build_ramp


def test_values_of_a_ramp():
    ramp = Ramp(start=10, warmup=4, end=20)
    values = {iteration: ramp(iteration) for iteration in (0, 9, 10, 11, 13, 14, 15, 19, 20, 99)}
    assert values == pytest.approx(
        {0: 0, 9: 0, 10: 0.2, 11: 0.4, 13: 0.8, 14: 1, 15: 1, 19: 1, 20: 0, 99: 0}
    )


def test_default_is_always_one():
    assert [Ramp()(iteration) for iteration in (0, 1, 10**6)] == [1.0, 1.0, 1.0]


def test_end_before_the_ramp_is_over_and_end_zero():
    ramp = Ramp(start=0, warmup=9, end=5)
    assert ramp(4) == pytest.approx(0.5)
    assert ramp(5) == 0.0
    assert Ramp(end=0)(0) == 0.0


def test_a_head_inherits_each_common_value_by_itself():
    cfg = kd_models.tiny_cfg(
        KD__START_ITER=3, KD__WARMUP_ITERS=5, KD__END_ITER=50, KD__MIMIC__WARMUP_ITERS=0
    )
    assert build_ramp(cfg, "Mimic") == Ramp(3, 0, 50)
    assert build_ramp(cfg, "CWD") == Ramp(3, 5, 50)
    cfg.KD.MIMIC.END_ITER = -1
    cfg.KD.MIMIC.START_ITER = 0
    assert build_ramp(cfg, "Mimic") == Ramp(0, 0, -1)


def test_a_node_without_schedule_keys_takes_the_common_ones():
    cfg = kd_models.tiny_cfg(KD__START_ITER=7)
    cfg.KD.OWN = type(cfg)({"WEIGHT": 1.0})
    assert build_ramp(cfg, "Own") == Ramp(7, 0, -1)
