"""timm models behind FPN: composition, grids, norms, freezing, and weights from files."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from PIL import Image
from torch import nn

import projects.kd.modeling.timm_fpn as timm_fpn
from projects.kd.config import add_kd_config
from projects.kd.errors import ConfigError
from projects.kd.modeling.timm_weights import load_timm_weights

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("KD_TEST_DATA", ROOT.parent / "shared" / "data"))
LITE = DATA / "weights" / "efficientnet_lite0_fp16.pth"
SMALL = "mobilenetv3_small_050"
RCNN, RETINA = "build_timm_fpn_backbone", "build_retinanet_timm_fpn_backbone"


def make_cfg(builder: str = RETINA, name: str = SMALL, **timm_keys):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    stages = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = stages if builder == RETINA else ["res2", *stages]
    cfg.MODEL.TIMM.NAME = name
    for key, value in timm_keys.items():
        cfg.MODEL.TIMM[key] = value
    return cfg


def build(cfg, seed: int = 0):
    torch.manual_seed(seed)
    return build_backbone(cfg)


def randomise_norms(model, seed: int = 3):
    """Statistics and affine parameters that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
            for tensor in (module.bias, module.running_mean):
                tensor.data = torch.randn(tensor.shape, generator=generator) * 0.1


def images(height: int = 64, width: int = 96, count: int = 2, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


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


# --- weights ------------------------------------------------------------------------------------


def save_whole(name: str, path: Path, seed: int = 11, wrap: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=7)
    randomise_norms(model, seed)
    state = {key: value.half() for key, value in model.state_dict().items()}
    torch.save({"state_dict": state} if wrap else state, path)
    return model.load_state_dict({key: value.float() for key, value in state.items()}) and model


@pytest.mark.parametrize("name", [SMALL, "resnet18", "regnety_002"])
def test_weights_of_a_whole_timm_model_are_read(name, tmp_path):
    """regnet's containers are flattened by features_only, mobilenet has a head behind its maps."""
    path = tmp_path / "weights.pth"
    whole = save_whole(name, path, wrap=name == "resnet18").eval()
    features = timm.create_model(name, features_only=True).eval()
    report = load_timm_weights(features, str(path))
    assert report.missing == ()
    assert report.unexpected
    assert all(value.dtype == torch.float32 for value in features.parameters())
    kept = {}
    modules = [info["module"] for info in features.feature_info.get_dicts()]
    for module in modules:
        whole.get_submodule(module).register_forward_hook(
            lambda _, __, output, module=module: kept.__setitem__(module, output)
        )
    with torch.no_grad():
        whole(images())
        for module, value in zip(modules, features(images()), strict=True):
            torch.testing.assert_close(value, kept[module], rtol=1e-4, atol=1e-4)


def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    source = timm.create_model("resnet18", num_classes=2)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    model = timm.create_model("resnet18", features_only=True)
    load_timm_weights(model, str(path))
    assert torch.equal(model.layer3[0].conv1.weight, source.layer3[0].conv1.weight)
    path.write_bytes(b"not a tensor file")
    with pytest.raises(ConfigError, match="MODEL.TIMM.WEIGHTS"):
        load_timm_weights(model, str(path))


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    save_whole("resnet18", path)
    before = timm.create_model("resnet34", features_only=True)
    state = {key: value.clone() for key, value in before.state_dict().items()}
    with pytest.raises(ConfigError, match=r"lacks.* layer1\.2\.conv1\.weight"):
        load_timm_weights(before, str(path))
    assert all(torch.equal(value, state[key]) for key, value in before.state_dict().items())
    save_whole("resnet34", path)
    with pytest.raises(ConfigError, match=r"also holds .*and \d+ more"):
        load_timm_weights(timm.create_model("resnet18", features_only=True), str(path))


def test_missing_weights_are_an_error_unless_a_detector_is_read(tmp_path, caplog):
    missing = str(tmp_path / "absent.pth")
    with pytest.raises(ConfigError, match="MODEL.TIMM.WEIGHTS.*absent.pth"):
        build(make_cfg(WEIGHTS=missing))
    cfg = make_cfg(WEIGHTS=missing)
    cfg.MODEL.WEIGHTS = "trained_detector.pth"
    with caplog.at_level(logging.WARNING):
        assert build(cfg) is not None
    assert "absent.pth" in caplog.text


def test_download_that_fails_is_one_line(monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise ConnectionError("no route")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match="MODEL.TIMM.PRETRAINED.*MODEL.TIMM.WEIGHTS instead"):
        build(make_cfg(PRETRAINED=True))


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


# --- the real EfficientNet-Lite0 weights --------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not LITE.exists(), reason="no EfficientNet-Lite0 weights in KD_TEST_DATA")
def test_lite0_weights_agree_with_timm_loaded_by_hand():
    """By hand: both state dicts list the same tensors in the same order, only names differ."""
    saved = torch.load(LITE, weights_only=True)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    names = [key for key in whole.state_dict() if "num_batches_tracked" not in key]
    assert len(names) == len(saved)
    whole.load_state_dict(
        {name: value.float() for name, value in zip(names, saved.values(), strict=True)},
        strict=False,
    )
    backbone = build(make_cfg(RETINA, "tf_efficientnet_lite0", WEIGHTS=str(LITE))).eval()
    photograph = next((DATA / "coco_subset" / "val").glob("*.jpg"))
    pixels = np.asarray(Image.open(photograph).convert("RGB").resize((224, 160)), np.float32)
    batch = (torch.from_numpy(pixels).permute(2, 0, 1)[None] - 127) / 128
    kept = []
    for block in (2, 4, 6):
        whole.blocks[block].register_forward_hook(lambda _, __, output: kept.append(output))
    with torch.no_grad():
        scores = whole(batch).softmax(1)
        found = backbone.bottom_up(batch)
    assert scores.max() > 0.05  # wrong weights give about 1 / 1000
    for value, reference in zip(found.values(), kept, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.real_data
@pytest.mark.skipif(not LITE.exists(), reason="no EfficientNet-Lite0 weights in KD_TEST_DATA")
def test_lite0_weights_fill_the_whole_model_and_no_other():
    report = load_timm_weights(timm.create_model("tf_efficientnet_lite0"), str(LITE))
    assert (len(report.matched), report.missing, report.unexpected) == (247, (), ())
    with pytest.raises(ConfigError, match="MODEL.TIMM.WEIGHTS"):
        load_timm_weights(timm.create_model("tf_efficientnet_lite1"), str(LITE))


def test_image_channels_follow_the_config():
    cfg = make_cfg()
    backbone = timm_fpn.build_timm_backbone(cfg, ShapeSpec(channels=4))
    assert backbone.model.conv_stem.weight.shape[1] == 4
