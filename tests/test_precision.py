"""The precision of a training step."""

import kd_models
import pytest
import torch
from kd_detectors import detector_cfg, full_batch

from projects.kd import precision
from projects.kd.distiller import build_training_model


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


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_asked_for_is_done_on_every_device(asked):
    assert [precision.in_channels_last(asked, x) for x in ("cpu", "cuda")] == [asked, asked]
    assert precision.in_channels_last(None, "cpu") and not precision.in_channels_last(None, "cuda")


@pytest.mark.parametrize("name", ["RetinaNet", "Mask R-CNN"])
def test_the_order_in_memory_changes_no_loss_and_no_gradient(name):
    batch, found = full_batch(), {}
    for asked in (None, False):
        torch.manual_seed(0)
        cfg = detector_cfg(name, SOLVER__CHANNELS_LAST=asked)
        model = build_training_model(cfg).train()
        weight = model.backbone.fpn_output3.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) is (asked is None)
        torch.manual_seed(1)  # of the regions that are drawn
        losses = kd_models.losses_at(model, batch)
        sum(losses.values()).backward()
        found[asked] = losses, weight.grad
    for loss, value in found[False][0].items():
        torch.testing.assert_close(found[None][0][loss], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[None][1], found[False][1], rtol=1e-3, atol=1e-5)
