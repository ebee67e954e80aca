"""Fused batch norms: what a detector computes stays, but for rounding."""

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from kd_models import build, tiny_cfg
from torch import nn

from projects.kd.fusing import fuse_batch_norms, is_batch_norm


def stirred(model, seed=0):
    """Norms with statistics and factors like trained ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if is_batch_norm(module):
            for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5)):
                value = getattr(module, name).data
                value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)
            module.running_mean.copy_(torch.randn(value.shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model.eval()


TIMM = {
    "MODEL__BACKBONE__NAME": "build_timm_fpn_backbone",
    "MODEL__TIMM__NAME": "mobilenetv3_small_050",
    "MODEL__TIMM__PRETRAINED": False,
    "MODEL__FPN__NORM": "BN",
}


@pytest.mark.parametrize(
    "overrides",
    [
        {"MODEL__RESNETS__NORM": "FrozenBN"},
        {**TIMM, "MODEL__TIMM__NORM": "BN"},
    ],
    ids=["ResNet, frozen", "timm"],
)
def test_every_norm_of_a_backbone_goes_and_its_features_stay(overrides):
    model = stirred(build(tiny_cfg("GeneralizedRCNN", **overrides))).double()
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64, generator=torch.manual_seed(1))
    with torch.no_grad():
        before = model.backbone(images)
        norms = sum(map(is_batch_norm, model.backbone.modules()))
        assert fuse_batch_norms(model) == norms > 10
        after = model.backbone(images)
    assert not any(map(is_batch_norm, model.modules()))
    for name, level in before.items():
        torch.testing.assert_close(after[name], level, rtol=1e-9, atol=1e-9)


class Shared(nn.Module):
    """A convolution that the sum reads beside the norm, and one whose norm nobody else reads."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.second, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.first(x)
        return self.other(self.second(x + self.norm(x)))


def test_a_convolution_that_others_read_keeps_its_norm():
    model = nn.Module()
    model.backbone = stirred(Shared())
    x = torch.rand(1, 3, 4, 5)
    with torch.no_grad():
        before = model.backbone(x)
        assert fuse_batch_norms(model.eval()) == 1
        torch.testing.assert_close(model.backbone(x), before, rtol=0, atol=1e-6)
    assert is_batch_norm(model.backbone.norm) and not is_batch_norm(model.backbone.other)


def test_training_mode_is_refused_and_other_norms_stay():
    conv = Conv2d(3, 4, 1, norm=get_norm("BN", 4))
    with pytest.raises(ValueError, match="evaluation mode"):
        fuse_batch_norms(nn.Sequential(conv))
    assert isinstance(conv.norm, nn.BatchNorm2d)
    grouped = nn.Sequential(Conv2d(3, 32, 1, norm=get_norm("GN", 32))).eval()
    assert fuse_batch_norms(grouped) == 0 and isinstance(grouped[0].norm, nn.GroupNorm)
    frozen = Conv2d(3, 4, 1, bias=False, norm=FrozenBatchNorm2d(4))
    assert fuse_batch_norms(nn.Sequential(frozen)) == 1  # follows no batch in any mode
