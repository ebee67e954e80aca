"""Teachers of other libraries see photographs as these libraries show them to their own models."""

import math
import os
from pathlib import Path

import foreign_models  # noqa: F401  # registers kd_tiny_frcnn and others
import kd_models
import pytest
import timm
import torch
import yaml
from detectron2.data.detection_utils import read_image
from PIL import Image
from torch.nn import functional as F
from torchvision.models import get_model
from torchvision.transforms.functional import pil_to_tensor

from projects.kd import build_teacher

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("KD_TEST_DATA", ROOT.parent / "shared" / "data"))
FOLDERS = {"coco_subset": "val", "aerial_cars": "val"}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(params=FOLDERS)
def photograph(request):
    """A file."""
    files = sorted((DATA / request.param / FOLDERS[request.param]).glob("*.jpg"))
    if not files:
        pytest.skip(f"no photographs of {request.param} in KD_TEST_DATA")
    return files[0]


def equal(found, expected):
    """To 1e-5 of the largest value."""
    assert len(found) == len(expected)
    for value, other in zip(found, expected, strict=True):
        largest = other.abs().max().item()
        torch.testing.assert_close(value, other, rtol=0, atol=1e-5 * largest)


def seen_by(name, weights, photograph, **overrides):
    """Maps of a teacher as it is built from a file of weights, for the loader's image."""
    teacher = build_teacher(kd_models.distill_cfg((name, str(weights)), **overrides))
    teacher.tap({"features"})
    image = torch.from_numpy(read_image(str(photograph), "BGR").copy()).permute(2, 0, 1)
    multiple = teacher.size_divisibility
    canvas = tuple(multiple * math.ceil(side / multiple) for side in image.shape[-2:])
    return list(teacher.observe([image], canvas, "BGR")["features"].values())


def moving(model):
    """A model whose batch norms have statistics of their own."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["kd_tiny_frcnn", "kd_tiny_retinanet"])
def test_torchvision(name, photograph, tmp_path):
    torch.manual_seed(1)
    model = moving(get_model(name))
    torch.save(model.state_dict(), tmp_path / "net.pth")
    image = pil_to_tensor(Image.open(photograph).convert("RGB")) / 255
    sides = image.shape[-2:]
    model.transform.min_size, model.transform.max_size = (min(sides),), max(sides)
    expected = model.backbone(model.transform([image])[0].tensors)
    found = seen_by(f"torchvision://{name}", tmp_path / "net.pth", photograph)
    equal(found, list(expected.values()))


def as_timm_shows(model, photograph, folder):
    """By timm's own transform, of the part whose sides are multiples of 32; it is saved as well."""
    picture = Image.open(photograph).convert("RGB")
    width, height = (side // 32 * 32 for side in picture.size)
    picture = picture.crop((0, 0, width, height))
    picture.save(folder / "part.png")
    settings = timm.data.resolve_model_data_config(model)
    settings |= {"input_size": (3, height, width), "crop_pct": 1.0}
    return timm.data.create_transform(**settings)(picture)[None]


@torch.no_grad()
def test_timm(photograph, tmp_path):
    torch.manual_seed(2)
    model = timm.create_model("kd_tiny_vit16", num_classes=0, dynamic_img_size=True).eval()
    torch.nn.init.normal_(model.pos_embed)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    image = as_timm_shows(model, photograph, tmp_path)
    maps = model.forward_intermediates(image, intermediates_only=True, norm=True)
    found = seen_by(
        "timm://kd_tiny_vit16",
        tmp_path / "vit.pth",
        tmp_path / "part.png",
        KD__TEACHER__OPTS=["LEVELS", [["a", 16, 0], ["b", 16, 2], ["c", 32, 2]]],
    )
    equal(found, [maps[0], maps[2], F.avg_pool2d(maps[2], 2)])


@torch.no_grad()
def test_torchscript(photograph, tmp_path):
    torch.manual_seed(3)
    model = timm.create_model("resnet10t", features_only=True, out_indices=(3, 4))
    model = moving(model)
    torch.jit.trace(model, torch.rand(1, 3, 64, 96)).save(str(tmp_path / "net.ts"))
    settings = timm.data.resolve_model_data_config(model)
    said = {"OUTPUTS": {"c4": 16, "c5": 32}}
    said |= {f"PIXEL_{name.upper()}": [255 * x for x in settings[name]] for name in ("mean", "std")}
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(said))
    image = as_timm_shows(model, photograph, tmp_path)
    name = f"torchscript://{tmp_path}/net.yaml"
    equal(seen_by(name, tmp_path / "net.ts", tmp_path / "part.png"), model(image))
