"""timm models behind FPN: composition, grids, norms, freezing."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from timm_models import RCNN, RETINA, SMALL, build, images, make_cfg, randomise_norms
from torch import nn

import projects.kd.modeling.timm_fpn as timm_fpn
from projects.kd.errors import ConfigError

# --- composition and grids ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("builder", "indices", "levels"),
    [(RCNN, (1, 2, 3, 4), "p2 p3 p4 p5 p6"), (RETINA, (2, 3, 4), "p3 p4 p5 p6 p7")],
)
def test_equals_timm_features_and_pyramid_composed_by_hand(builder, indices, levels):
    backbone = build(make_cfg(builder)).eval()
    reference = timm.create_model(SMALL, features_only=True, out_indices=indices).eval()
    state = backbone.state_dict()
    prefix = "bottom_up.model."
    reference.load_state_dict(
        {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    )
    batch = images()
    with torch.no_grad():
        found = backbone(batch)
        maps = reference(batch)
    assert list(found) == levels.split()

    def conv(name, x, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    above, wanted = None, {}
    for index, bottom in reversed(list(zip(indices, maps, strict=True))):
        number = index + 1
        merged = conv(f"fpn_lateral{number}", bottom)
        if above is not None:
            merged = merged + above.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        above = merged
        wanted[f"p{number}"] = conv(f"fpn_output{number}", merged, padding=1)
    if builder == RCNN:
        wanted["p6"] = wanted["p5"][:, :, ::2, ::2]
    else:
        wanted["p6"] = conv("top_block.p6", maps[-1], stride=2, padding=1)
        wanted["p7"] = conv("top_block.p7", wanted["p6"].relu(), stride=2, padding=1)
    for level, value in found.items():
        torch.testing.assert_close(value, wanted[level], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", SMALL, "resnet18"])
def test_maps_have_the_promised_size_and_channels(name):
    """ceil(size / stride) for any size; an exact grid where 32 divides the sides."""
    backbone = build(make_cfg(RCNN, name)).eval()
    bottom_up = backbone.bottom_up
    with torch.no_grad():
        for height, width in ((97, 131), (64, 65)):
            for key, value in bottom_up(images(height, width, 1)).items():
                shape = bottom_up.output_shape()[key]
                cells = (-(-height // shape.stride), -(-width // shape.stride))
                assert value.shape == (1, shape.channels, *cells)
        assert backbone.size_divisibility == 32
        for height, width in ((32, 96), (160, 224)):
            for key, value in backbone(images(height, width, 1)).items():
                shape = backbone.output_shape()[key]
                wanted = (max(1, -(-height // shape.stride)), max(1, -(-width // shape.stride)))
                assert value.shape == (1, 16, *wanted)
                assert shape.stride == 2 ** int(key[1])


def test_fewer_levels_leave_no_parameter_without_gradient():
    """Distributed training hangs or fails on trainable parameters that no loss reaches."""
    for builder in (RCNN, RETINA):
        cfg = make_cfg(builder, "tf_efficientnet_lite0")
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4"]
        backbone = build(cfg).train()
        wanted = ["p3", "p4", "p5"] + ["p6"] * (builder == RETINA)
        levels = backbone(images(count=2))
        assert list(levels) == wanted
        sum(value.square().mean() for value in levels.values()).backward()
        unreached = [
            name
            for name, parameter in backbone.named_parameters()
            if parameter.requires_grad != (parameter.grad is not None)
        ]
        assert unreached == []
        frozen = [name for name, p in backbone.named_parameters() if not p.requires_grad]
        assert frozen
        assert all(name.startswith("bottom_up.model.blocks.") for name in frozen)


def test_given_indices_must_fit_the_levels():
    cfg = make_cfg(OUT_INDICES=(2, 3, 4))
    assert list(build(cfg).bottom_up.output_shape()) == ["res3", "res4", "res5"]
    for wrong in ((1, 2, 3), (2, 3), (2, 3, 9)):
        with pytest.raises(ConfigError, match="MODEL.TIMM.OUT_INDICES"):
            build(make_cfg(OUT_INDICES=wrong))


# --- norm and freezing --------------------------------------------------------------------------


def test_frozen_norm_keeps_outputs_and_is_frozen():
    plain = timm.create_model(SMALL, features_only=True, out_indices=(2, 3, 4))
    randomise_norms(plain)
    count = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    with torch.no_grad():
        wanted = plain.eval()(images())
        frozen = timm_fpn._convert_norm(plain, "FrozenBN").train()
        found = frozen(images())
    assert count > 30
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    assert not any("bn" in name for name, _ in frozen.named_parameters())
    for value, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)


def test_norm_key_reaches_the_built_backbone():
    for norm, kind in (("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm), ("FrozenBN", None)):
        backbone = build(make_cfg(NORM=norm))
        found = {
            type(module)
            for module in backbone.modules()
            if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))
        }
        assert bool(found) == (kind is not None)
        assert all(issubclass(one, kind) for one in found)


def test_sync_norm_keeps_outputs_in_evaluation():
    plain, sync = (build(make_cfg(NORM=norm)).eval() for norm in ("BN", "SyncBN"))
    with torch.no_grad():
        wanted, found = plain(images()), sync(images())
    for level, value in found.items():
        torch.testing.assert_close(value, wanted[level])


def test_freeze_at_freezes_stem_and_stages_with_their_statistics():
    for depth, prefixes in ((1, ("conv1.", "bn1.")), (2, ("conv1.", "bn1.", "layer1."))):
        model = build(make_cfg(RETINA, "resnet18", FREEZE_AT=depth)).bottom_up.model
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(name.startswith(prefixes) for name in frozen)
        assert not any(name.startswith(prefixes) for name in trained)
        before = {name: value.clone() for name, value in model.named_buffers()}
        model.train()(images() * 3 + 1)
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                assert torch.equal(value, before[name]) == name.startswith(prefixes), name


def test_drop_path_reaches_the_model():
    for rate in (0.0, 0.5):
        model = build(make_cfg(RETINA, "resnet18", DROP_PATH=rate)).bottom_up.model.train()
        randomise_norms(model)  # timm starts residual branches at zero
        torch.manual_seed(0)
        assert torch.equal(model(images())[-1], model(images())[-1]) == (rate == 0)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("", {}, "MODEL.TIMM.NAME is empty"),
        ("resnet81", {}, "no 'resnet81'; near: .*resnet"),
        ("vit_tiny_patch16_224", {}, "does not take a 96x160 image"),
        ("resnet18", {"NORM": "GN"}, "MODEL.TIMM.NORM: 'GN'"),
        ("convnext_atto", {"NORM": "FrozenBN"}, "no BatchNorm"),
        ("convnext_atto", {"FREEZE_AT": 1}, "FREEZE_AT 1: .* stride 4"),
        ("vgg11", {"DROP_PATH": 0.1}, "timm cannot make vgg11"),
    ],
)
def test_user_errors(name, keys, message):
    with pytest.raises(ConfigError, match=message):
        build(make_cfg(RETINA, name, **keys))


def test_stride_that_the_model_lacks():
    cfg = make_cfg()
    cfg.MODEL.FPN.IN_FEATURES = ["res5", "res6"]
    with pytest.raises(ConfigError, match=r"MODEL.TIMM.NAME: .*needs \[32, 64\]"):
        build(cfg)
    cfg.MODEL.FPN.IN_FEATURES = ["stem"]
    with pytest.raises(ConfigError, match="MODEL.FPN.IN_FEATURES: 'stem'"):
        build(cfg)


def test_image_channels_follow_the_config():
    cfg = make_cfg()
    backbone = timm_fpn.build_timm_backbone(cfg, ShapeSpec(channels=4))
    assert backbone.model.conv_stem.weight.shape[1] == 4
