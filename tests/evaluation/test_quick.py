"""TEST.QUICK changes the speed of a detector, not what it finds."""

import copy

import pytest
import torch
from kd_detectors import detector_cfg
from kd_models import build, make_batch

from projects.kd.check import check_config
from projects.kd.deploy.parity import differences
from projects.kd.errors import ConfigError
from projects.kd.evaluation.quick import quicken


def test_fused_and_in_another_order_it_finds_the_same():
    cfg = detector_cfg("Faster R-CNN", TEST__QUICK__FUSE_BN=True, TEST__QUICK__CHANNELS_LAST=True)
    model = build(cfg).eval()
    quick = quicken(cfg, copy.deepcopy(model))
    assert quick.backbone.fpn_output2.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any("running_mean" in name for name, _ in quick.named_buffers())
    found = differences(model, quick, make_batch())
    assert found.detections > 0 and found.boxes < 1e-3 and found.scores < 1e-5


@pytest.mark.parametrize("name", ["FCOS", "Cascade R-CNN"])
def test_lower_precision_is_near_and_its_results_are_single(name):
    cfg = detector_cfg(name, TEST__QUICK__DTYPE="bfloat16")
    model = build(cfg).eval()
    quick = quicken(cfg, copy.deepcopy(model))
    image = make_batch()[0]["image"][None].float()
    with torch.no_grad():
        exact, near = model.backbone(image), quick.backbone(image)
        (result,) = quick(make_batch()[:1])
    for level, value in exact.items():
        apart = (near[level] - value).norm() / value.norm()
        assert near[level].dtype is torch.float32 and 1e-5 < apart < 0.05
    assert result["instances"].scores.dtype is torch.float32 and len(result["instances"]) > 0


def test_a_precision_that_is_none():
    cfg = detector_cfg("FCOS", TEST__QUICK__DTYPE="int8")
    with pytest.raises(ConfigError, match="TEST.QUICK.DTYPE.*'float32', 'bfloat16', 'float16'"):
        check_config(cfg, training=False)
