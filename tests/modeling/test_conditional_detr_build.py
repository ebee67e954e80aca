"""Conditional DETR: backbones, initialisation, and what is refused when it is built."""

import pytest
import torch
from kd_models import build, losses_at, make_batch, tiny_cfg
from torch import nn

from projects.kd import check_config
from projects.kd.errors import ConfigError
from projects.kd.modeling.conditional_detr_transformer import Transformer

ARCH = "ConditionalDETR"
SIZES = ((64, 96), (90, 60))


def test_dc5_dilates_all_but_the_first_block():
    cfg = tiny_cfg(
        ARCH,
        MODEL__RESNETS__DEPTH=50,
        MODEL__RESNETS__RES5_DILATION=2,
        MODEL__RESNETS__OUT_FEATURES=["res5"],
        MODEL__CONDITIONAL_DETR__IN_FEATURE="res5",
        MODEL__DEVICE="meta",
    )
    with torch.device("meta"):
        model = build(cfg)
    assert model.backbone.output_shape()["res5"].stride == 16
    import torchvision

    with torch.device("meta"):
        reference = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    for ours, theirs in zip(model.backbone.res5, reference.layer4, strict=True):
        for key in ("dilation", "padding", "stride"):
            assert getattr(ours.conv2, key) == getattr(theirs.conv2, key)
    features = model.backbone(torch.zeros(1, 3, 64, 96, device="meta"))
    assert features["res5"].shape[-2:] == (4, 6)


def test_a_timm_backbone_without_a_pyramid():
    cfg = tiny_cfg(
        ARCH,
        MODEL__BACKBONE__NAME="build_timm_backbone",
        MODEL__TIMM__NAME="mobilenetv3_small_050",
        MODEL__FPN__IN_FEATURES=["res4"],
    )
    model = build(cfg).train()
    sum(losses_at(model, make_batch(SIZES)).values()).backward()
    assert model.input_proj.in_channels == model.backbone.output_shape()["res4"].channels


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("CONDITIONAL_DETR.HIDDEN_DIM", 18),
        ("CONDITIONAL_DETR.NHEADS", 3),
        ("CONDITIONAL_DETR.NUM_QUERIES", 0),
        ("CONDITIONAL_DETR.DEC_LAYERS", 0),
        ("CONDITIONAL_DETR.DROPOUT", 1.0),
        ("CONDITIONAL_DETR.IN_FEATURE", "res5"),
        ("RESNETS.RES5_DILATION", 2),
    ],
)
def test_bad_values_name_their_key(key, value):
    wanted = "HIDDEN_DIM" if key.endswith("NHEADS") else key.split(".")[1]
    with pytest.raises(ConfigError, match=f"MODEL.*{wanted}"):
        build(tiny_cfg(ARCH, **{f"MODEL__{key.replace('.', '__')}": value}))


def test_the_number_of_classes_is_checked_against_the_data_set():
    with pytest.raises(ConfigError, match="MODEL.CONDITIONAL_DETR.NUM_CLASSES is 3"):
        check_config(tiny_cfg(ARCH))


def test_initialisation():
    model = build(tiny_cfg(ARCH))
    assert isinstance(model.transformer, Transformer) and isinstance(model.decoded, nn.Identity)
    probability = model.class_embed.bias.sigmoid()
    torch.testing.assert_close(probability, torch.full_like(probability, 0.01))
    assert not model.bbox_embed.layers[-1].weight.any()
