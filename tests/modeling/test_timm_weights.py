"""Weights of timm models from files: whole models, safetensors, EfficientNet-Lite0's own."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm_models import RETINA, SMALL, build, images, make_cfg, randomise_norms
from torch import nn

from projects.kd.errors import ConfigError
from projects.kd.modeling.timm_weights import load_timm_weights

ROOT = Path(__file__).resolve().parents[2]


DATA = Path(os.environ.get("KD_TEST_DATA", ROOT.parent / "shared" / "data"))


LITE = DATA / "weights" / "efficientnet_lite0_fp16.pth"


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
