"""kd-convert resnet: converted backbones compute what torchvision computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kd_models
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from projects.kd.commands.convert import PARTS
from projects.kd.commands.convert import resnet as tool
from projects.kd.errors import ConfigError
from projects.kd.weights.loading import load_detector

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "convert.py"
STAGES = ("layer1", "layer2", "layer3", "layer4")


def random_resnet(architecture: str, seed: int = 4):
    """A torchvision ResNet whose norms are not the identity."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(architecture, weights=None).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def detector_cfg(depth: int, norm: str):
    """What the R18 configs set (and R50 analogously)."""
    return kd_models.tiny_cfg(
        MODEL__RESNETS__DEPTH=depth,
        MODEL__RESNETS__RES2_OUT_CHANNELS=64 if depth < 50 else 256,
        MODEL__RESNETS__STEM_OUT_CHANNELS=64,
        MODEL__RESNETS__STRIDE_IN_1X1=False,
        MODEL__RESNETS__NORM=norm,
        MODEL__RESNETS__OUT_FEATURES=["res2", "res3", "res4", "res5"],
        MODEL__PIXEL_MEAN=[123.675, 116.28, 103.53],
        MODEL__PIXEL_STD=[58.395, 57.12, 57.375],
        INPUT__FORMAT="RGB",
    )


@pytest.mark.parametrize(
    ("architecture", "depth", "norm"),
    [("resnet18", 18, "FrozenBN"), ("resnet18", 18, "BN"), ("resnet50", 50, "FrozenBN")],
)
def test_features_equal_torchvision(tmp_path, architecture, depth, norm):
    source = random_resnet(architecture)
    path = tmp_path / "converted.pth"
    torch.save(tool.convert(source.state_dict(), architecture), path)
    detector = build_model(detector_cfg(depth, norm)).eval()
    DetectionCheckpointer(detector).load(str(path))

    image = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((image / 255 - mean[:, None, None]) / std[:, None, None])[None]
    with torch.no_grad():
        ours = detector.backbone.bottom_up(
            detector.preprocess_image([{"image": image.float()}]).tensor
        )
        x = source.maxpool(source.relu(source.bn1(source.conv1(x))))
        for name, stage in zip(("res2", "res3", "res4", "res5"), STAGES, strict=True):
            x = getattr(source, stage)(x)
            torch.testing.assert_close(ours[name], x, rtol=1e-3, atol=1e-3)


def test_our_loader_reports_only_the_detectors_own_parts(tmp_path):
    path = tmp_path / "converted.pth"
    torch.save(tool.convert(random_resnet("resnet18").state_dict(), "resnet18"), path)
    detector = build_model(detector_cfg(18, "FrozenBN"))
    missing = load_detector(detector, str(path), "MODEL.WEIGHTS")
    assert missing
    assert not [name for name in missing if name.startswith("backbone.bottom_up")]


def test_command_line(tmp_path):
    weights, output = tmp_path / "resnet18.pth", tmp_path / "new" / "converted.pth"
    torch.save(random_resnet("resnet18").state_dict(), weights)
    words = ["--architecture", "resnet18", "--weights", weights, "--output", output]
    PARTS.call(["resnet", *words])
    saved = torch.load(output, weights_only=True)["model"]
    assert len(saved) == 100  # 20 convolutions, each with four tensors of its norm
    assert torch.equal(
        saved["res3.0.shortcut.norm.running_var"],
        torch.load(weights, weights_only=True)["layer2.0.downsample.1.running_var"],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet50", "{r18}", "{out}"], "not a state dict of torchvision's resnet50"),
        (["resnet18", "absent.pth", "{out}"], "no such file 'absent.pth'"),
        (["resnet18", "{r18}", "converted.bin"], "must end in .pth"),
    ],
)
def test_user_errors(tmp_path, arguments, message):
    weights = tmp_path / "r18.pth"
    torch.save(random_resnet("resnet18").state_dict(), weights)
    output = tmp_path / "out.pth"
    places = {"out": str(output), "r18": str(weights)}
    flags = ("--architecture", "--weights", "--output")
    words = [w for f, a in zip(flags, arguments, strict=True) for w in (f, a.format(**places))]
    with pytest.raises(ConfigError, match=message):
        PARTS.call(["resnet", *words])
    assert not output.exists()


def test_failed_download_names_the_file(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(weights), "get_state_dict", offline)
    with pytest.raises(ConfigError, match="resnet18-.*.pth' could not be downloaded.*--weights"):
        tool.read_state("resnet18", "")


def test_script_starts_from_any_folder(tmp_path):
    words = ["--architecture", "resnet18", "--output", "x.pth", "--weights", "absent.pth"]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "resnet", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: --weights: no such file 'absent.pth'"
