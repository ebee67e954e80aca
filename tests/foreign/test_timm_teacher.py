"""timm teachers give the maps of timm itself, on the grids of the student's levels."""

import os
from pathlib import Path

import foreign_models  # noqa: F401  # registers kd_tiny_vit16 and kd_tiny_vit14
import kd_models
import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.data.detection_utils import read_image

from projects.kd import ConfigError, build_teacher
from projects.kd.foreign.timm_teacher import resize_cells

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("KD_TEST_DATA", ROOT.parent / "shared" / "data"))
LITE = DATA / "weights" / "efficientnet_lite0_fp16.pth"


def vit(patch: int = 16, seed: int = 5):
    """timm's own model, for images of any size, padded by timm."""
    torch.manual_seed(seed)
    options = {"num_classes": 0, "dynamic_img_size": True, "dynamic_img_pad": True}
    model = timm.create_model(f"kd_tiny_vit{patch}", **options).eval()
    torch.nn.init.normal_(model.pos_embed)
    torch.nn.init.uniform_(model.norm.weight, 0.5, 2)
    return model


def cfg_of(name: str, weights: str = "", heads=("Mimic",), **overrides):
    overrides.setdefault("KD__TEACHER__ALLOW_MISSING", not weights)
    return kd_models.distill_cfg((f"timm://{name}", weights), heads=heads, **overrides)


def teacher_of(model, folder, name, **overrides):
    path = folder / "vit.pth"
    torch.save(model.state_dict(), path)
    teacher = build_teacher(cfg_of(name, str(path), **overrides))
    teacher.tap({"features"})
    return teacher


def normalised(images, mean, std, canvas):
    """As timm's own transforms: RGB in 0..1, padded by zeros afterwards."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
    batch = torch.zeros(len(images), 3, *canvas)
    for target, image in zip(batch, images, strict=True):
        target[:, : image.shape[1], : image.shape[2]] = (image.flip(0) / 255 - mean) / std
    return batch


@pytest.mark.parametrize("patch", [16, 14])
def test_blocks_of_a_transformer_equal_timms_own(patch, tmp_path):
    model = vit(patch)
    opts = ["LEVELS", [["a", patch, 0], ["b", patch, -1], ["p4", 16, 1]], "NORM", True]
    teacher = teacher_of(model, tmp_path, f"kd_tiny_vit{patch}", KD__TEACHER__OPTS=opts)
    images = [x["image"] for x in kd_models.make_batch(sizes=((100, 112), (64, 90)))]
    canvas = (112, 112)
    found = teacher.observe(images, canvas, "BGR")["features"]
    settings = model.pretrained_cfg
    batch = normalised(images, settings["mean"], settings["std"], canvas)
    with torch.no_grad():
        maps = model.forward_intermediates(batch, intermediates_only=True, norm=True)
    torch.testing.assert_close(found["a"], maps[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["b"], maps[2], rtol=1e-5, atol=1e-5)
    expected = maps[1]
    if patch != 16:
        expected = F.interpolate(maps[1], size=(7, 7), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found["p4"], expected, rtol=1e-5, atol=1e-5)


def test_without_the_last_norm(tmp_path):
    model = vit()
    opts = ["LEVELS", [["p4", 16, -1]], "NORM", False]
    teacher = teacher_of(model, tmp_path, "kd_tiny_vit16", KD__TEACHER__OPTS=opts)
    images = [torch.rand(3, 64, 64) * 255]
    settings = model.pretrained_cfg
    batch = normalised(images, settings["mean"], settings["std"], (64, 64))
    with torch.no_grad():
        expected = model.forward_intermediates(batch, indices=1, intermediates_only=True)[0]
    found = teacher.observe(images, (64, 64), "BGR")["features"]["p4"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("patch", "stride"), [(16, 8), (14, 8), (14, 16), (14, 32), (16, 32)])
def test_cells_are_read_where_they_lie(patch, stride):
    """A map that is a linear function of the place is that function at the cells' centres."""
    side = 224
    centres = (torch.arange(side // patch) + 0.5) * patch
    maps = torch.stack(
        (centres[:, None].expand(-1, len(centres)), centres.expand(len(centres), -1))
    )
    grid = (side // stride, side // stride - 1)
    found = resize_cells(maps[None], patch, stride, grid)
    assert found.shape[-2:] == grid
    wanted = [(torch.arange(n) + 0.5) * stride for n in grid]
    inside = [(x >= centres[0]) & (x <= centres[-1]) for x in wanted]
    found = found[0][:, inside[0]][:, :, inside[1]]
    rows, columns = torch.meshgrid(wanted[0][inside[0]], wanted[1][inside[1]], indexing="ij")
    torch.testing.assert_close(found, torch.stack((rows, columns)), rtol=1e-5, atol=1e-4)


def test_a_partial_patch_does_not_stretch_the_map():
    maps = torch.rand(1, 2, 5, 5)  # 70 pixels, of which 64 are the canvas
    found = resize_cells(maps, 14, 16, (4, 4))
    larger = resize_cells(F.pad(maps, (0, 9, 0, 9)), 14, 16, (12, 12))
    torch.testing.assert_close(found, larger[..., :4, :4])


def test_a_grid_of_patches_equals_the_students_with_an_input_scale(tmp_path):
    """Patches of 14 pixels at 7/8 of the size are cells of stride 16: nothing is resized."""
    cfg = cfg_of(
        "kd_tiny_vit14",
        KD__TEACHER__OPTS=["LEVELS", [["patches", 14, -1]]],
        KD__TEACHER__INPUT_SCALE=0.875,
        KD__LEVEL_MAP=[["p4", "patches"]],
    )
    wrapper = kd_models.build_wrapper(cfg)
    batch = kd_models.make_batch(sizes=((64, 96), (96, 64)), teacher_scale=0.875)
    with kd_models.EventStorage(0):
        ctx, _ = wrapper.observe(batch)
    ours, theirs = ctx.student_features["p4"], ctx.teacher_features["p4"]
    assert ours.shape[-2:] == theirs.shape[-2:] == (6, 6)


def test_training_changes_the_student_alone_with_every_kind_of_head():
    heads = ("Mimic", "PKD", "CWD", "MGD", "DSI")
    wrapper = kd_models.build_wrapper(cfg_of("kd_tiny_vit16", heads=heads))
    teacher = wrapper.teacher
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    student = wrapper.student.backbone.fpn_output3.weight.detach().clone()
    batch = kd_models.make_batch()
    losses = kd_models.losses_at(wrapper, batch)
    assert {f"loss_kd_{name.lower()}" for name in heads} <= losses.keys()
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    kd_models.train_steps(wrapper, batch, steps=3)
    assert all(torch.equal(v, before[n]) for n, v in teacher.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())
    assert not torch.equal(wrapper.student.backbone.fpn_output3.weight, student)
    assert not set(teacher.model.parameters()) & set(wrapper.parameters())


def test_a_pyramid_gives_its_stages_by_stride(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "net.pth")
    teacher = build_teacher(cfg_of("resnet10t", str(tmp_path / "net.pth")))
    teacher.tap({"features"})
    strides = {name: shape.stride for name, shape in teacher.info().shapes.items()}
    assert strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    images = [x["image"] for x in kd_models.make_batch()]
    found = teacher.observe(images, (96, 96), "BGR")["features"]
    mean, std = (model.pretrained_cfg[name] for name in ("mean", "std"))
    with torch.no_grad():
        maps = timm.create_model("resnet10t", features_only=True).eval()
        maps.load_state_dict(model.state_dict(), strict=False)
        expected = maps(normalised(images, mean, std, (96, 96)))[1:]
    for name, value in zip(found, expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not LITE.exists(), reason="no EfficientNet-Lite0 weights in KD_TEST_DATA")
def test_trained_weights_on_photographs():
    """A teacher that reads photographs as timm's own model with the same weights does."""
    teacher = build_teacher(cfg_of("tf_efficientnet_lite0", str(LITE)))
    teacher.tap({"features"})
    files = sorted((DATA / "coco_subset" / "val").glob("*.jpg"))[:2]
    images = [torch.from_numpy(read_image(str(x), "BGR").copy()).permute(2, 0, 1) for x in files]
    images = [image[:, :192, :256] for image in images]
    found = teacher.observe(images, (192, 256), "BGR")["features"]
    batch = normalised(images, (0.5,) * 3, (0.5,) * 3, (192, 256))
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    model.load_state_dict(teacher.model.backbone.model.state_dict())
    with torch.no_grad():
        expected = model.forward_intermediates(batch, intermediates_only=True)[1:]
    for (name, value), other in zip(found.items(), expected, strict=True):
        largest = other.abs().max().item()
        torch.testing.assert_close(value, other, rtol=0, atol=1e-5 * largest, msg=name)


def refused(cfg) -> str:
    with pytest.raises(ConfigError) as error:
        build_teacher(cfg)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    for name, options, line in (
        ("resnet19", [], r"KD.TEACHER.CONFIG_FILE: timm has no model 'resnet19'; did you mean"),
        (
            "resnet18.none",
            [],
            "KD.TEACHER.CONFIG_FILE: timm has no weights 'resnet18.none', it has",
        ),
        ("kd_tiny_vit16", ["LEVEL", 1], "KD.TEACHER.OPTS: this teacher has no option 'LEVEL'"),
        ("kd_tiny_vit16", ["LEVELS"], "KD.TEACHER.OPTS: they come in pairs NAME VALUE"),
        ("kd_tiny_vit16", ["LEVELS", 3], "KD.TEACHER.OPTS: LEVELS is 3, it must be a list"),
        ("kd_tiny_vit16", ["LEVELS", [["p4", 16]]], "LEVELS has the entry ['p4', 16]; write"),
        ("kd_tiny_vit16", ["LEVELS", [["p4", 16, 3]]], "p4 reads block 3, the model has 3"),
        ("kd_tiny_vit16", ["PIXEL_STD", [1, 1, 0]], "pixel_std of a teacher"),
        ("resnet10t", ["LEVELS", [["p4", 16, 0]]], "LEVELS is for transformers"),
        ("vit_tiny_patch16_224.none", [], "timm has no weights 'vit_tiny_patch16_224.none'"),
    ):
        assert line in refused(cfg_of(name, KD__TEACHER__OPTS=options))
    model = vit()
    state = model.state_dict()
    del state["blocks.1.mlp.fc1.weight"]
    torch.save(state, tmp_path / "partial.pth")
    message = refused(cfg_of("kd_tiny_vit16", str(tmp_path / "partial.pth")))
    assert message.startswith("KD.TEACHER.WEIGHTS: ") and "blocks.1.mlp.fc1.weight" in message
    state = {**model.state_dict(), "norm.weight": torch.full((24,), float("nan"))}
    torch.save(state, tmp_path / "nan.pth")
    assert "norm.weight holds values" in refused(cfg_of("kd_tiny_vit16", str(tmp_path / "nan.pth")))
    assert "no such file" in refused(cfg_of("kd_tiny_vit16", str(tmp_path / "none.pth")))

    def offline(*args, pretrained=False, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("projects.kd.foreign.timm_teacher.timm.create_model", offline)
    message = refused(cfg_of("resnet18", KD__TEACHER__ALLOW_MISSING=False))
    assert "KD.TEACHER.WEIGHTS is empty" in message and "resnet18.a1_in1k" in message
    assert "model.safetensors" in message
