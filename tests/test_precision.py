"""The precision of a training step."""

import kd_models
import pytest
import torch

from projects.kd import precision


@pytest.mark.parametrize(
    "device, able, expected",
    [
        ("cpu", True, torch.bfloat16),
        ("cpu", False, None),
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
    ],
)
def test_auto_takes_what_the_device_computes(monkeypatch, device, able, expected):
    monkeypatch.setattr(precision, "cpu_computes_bfloat16", lambda: able)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    cfg = kd_models.tiny_cfg(
        MODEL__DEVICE=device, SOLVER__AMP__ENABLED=True, SOLVER__AMP__DTYPE="auto"
    )
    assert precision.step_dtype(cfg) is expected


@pytest.mark.parametrize(
    "enabled, name, expected",
    [(False, "auto", None), (False, "bfloat16", None), (True, "float16", torch.float16)],
)
def test_a_named_precision_is_taken_as_it_is(enabled, name, expected):
    cfg = kd_models.tiny_cfg(SOLVER__AMP__ENABLED=enabled, SOLVER__AMP__DTYPE=name)
    assert precision.step_dtype(cfg) is expected
