"""Exported programs as teachers: their outputs, however they come, and files that are none."""

import shutil

import kd_models
import pytest
import torch
import yaml
from torch import nn

from projects.kd import ConfigError, build_teacher, load_config
from projects.kd.foreign.torchscript import ScriptBackbone

MEAN, STD = [120.0, 110.0, 100.0], [50.0, 60.0, 70.0]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Net(nn.Module):
    """Two maps of strides 8 and 16."""

    def __init__(self, form: str = "tuple"):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 6, 8, 8), nn.Conv2d(6, 5, 2, 2)
        self.form = form

    def forward(self, x):
        fine = self.fine(x)
        coarse = self.coarse(fine)
        if self.form == "dict":
            return {"coarse": coarse, "fine": fine}
        if self.form == "tokens":
            tokens = coarse.flatten(2).transpose(1, 2)
            return torch.cat((tokens.new_ones(x.shape[0], 2, 5), tokens), 1)
        return fine, coarse


def export(folder, form="tuple", trace_with=None, **said):
    """Write a program and its YAML file; returns the net and the scheme's name."""
    torch.manual_seed(3)
    net = Net(form).eval()
    image = torch.rand(1, 3, 64, 96)
    torch.jit.trace(trace_with or net, image, strict=False).save(str(folder / "net.ts"))
    outputs = {"p3": 8, "p4": 16}
    keys = {"WEIGHTS": "net.ts", "OUTPUTS": outputs, "PIXEL_MEAN": MEAN, "PIXEL_STD": STD, **said}
    keys = {name: value for name, value in keys.items() if value is not None}
    (folder / "net.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    return net, f"torchscript://{folder}/net.yaml"


def cfg_of(name, weights="", **overrides):
    return kd_models.distill_cfg((name, weights), **overrides)


@pytest.mark.parametrize("form", ["tuple", "dict", "tokens"])
def test_outputs_equal_the_nets_own(form, tmp_path):
    outputs = {
        "tuple": {"p3": 8, "p4": 16},
        "dict": {"fine": 8, "coarse": 16},
        "tokens": {"p4": 16},
    }[form]
    net, name = export(tmp_path, form, OUTPUTS=outputs)
    teacher = build_teacher(cfg_of(name))
    teacher.tap({"features"})
    images = [x["image"] for x in kd_models.make_batch()]
    found = teacher.observe(images, (96, 96), "BGR")["features"]
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    batch = torch.zeros(2, 3, 96, 96)
    for target, image in zip(batch, images, strict=True):
        target[:, : image.shape[1], : image.shape[2]] = (image.flip(0) - mean) / std
    with torch.no_grad():
        fine = net.fine(batch)
        expected = {8: fine, 16: net.coarse(fine)}
    shapes = teacher.info().shapes
    assert list(found) == list(outputs)
    for level, stride in outputs.items():
        torch.testing.assert_close(found[level], expected[stride], rtol=1e-5, atol=1e-5)
        assert shapes[level].channels == found[level].shape[1] and shapes[level].stride == stride


def test_bgr_and_a_multiple_for_its_input(tmp_path, monkeypatch):
    _, name = export(tmp_path, FORMAT="BGR", MULTIPLE_OF=48)
    ran, maps = [], ScriptBackbone.maps
    monkeypatch.setattr(
        ScriptBackbone, "maps", lambda self, x: ran.append(x.shape) or maps(self, x)
    )
    teacher = build_teacher(cfg_of(name))
    assert ran == [(1, 3, 96, 144)], "a program, which computes, is tried once"
    assert teacher.input_format == "BGR" and teacher.size_divisibility == 48
    wrapper = kd_models.build_wrapper(cfg_of(name))
    with kd_models.EventStorage(0):
        ctx, _ = wrapper.observe(kd_models.make_batch())
    assert all(side % 48 == 0 for side in ctx.canvas)


def test_training_leaves_the_program_as_it_is(tmp_path):
    _, name = export(tmp_path)
    wrapper = kd_models.build_wrapper(cfg_of(name))
    model = wrapper.teacher.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert len(before) == 4
    kd_models.train_steps(wrapper, kd_models.make_batch(), steps=2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def test_the_file_is_found_beside_the_config_that_names_it(tmp_path):
    export(tmp_path)
    (tmp_path / "student.yaml").write_text(
        'KD: {TEACHER: {CONFIG_FILE: "torchscript://net.yaml"}}\n'
    )
    cfg = load_config(str(tmp_path / "student.yaml"))
    assert cfg.KD.TEACHER.CONFIG_FILE == f"torchscript://{tmp_path}/net.yaml"


class OtherDevice(nn.Module):
    """Moves its input to the device that it was exported on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x):
        return self.layer(x), torch.zeros(1, device="cuda") + x.mean()


def refused(cfg) -> str:
    with pytest.raises(ConfigError) as error:
        build_teacher(cfg)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"OUTPUTS": {"p3": 8}}, "net.yaml: OUTPUTS names 1 maps, the program gives 2"),
        ({"OUTPUTS": {"p3": 16, "p4": 16}}, r"p3 is \(6, 8, 12\) and not \(6, 4, 6\)"),
        ({"OUTPUTS": ["p3", "p4"]}, "net.yaml: OUTPUTS is .* write level: stride"),
        ({"OUTPUTS": None}, "net.yaml: OUTPUTS is missing"),
        ({"OUTPUT": 3}, "net.yaml: unknown key OUTPUT; did you mean OUTPUTS"),
        ({"FORMAT": "L"}, "net.yaml: FORMAT: 'L' is not one of RGB, BGR"),
        ({"PIXEL_MEAN": [1, 2]}, r"pixel_mean of a teacher is \[1, 2\], it must be three"),
        ({"MULTIPLE_OF": 0}, "MULTIPLE_OF 0; write level"),
        ({"WEIGHTS": "none.ts"}, "KD.TEACHER.WEIGHTS: no such file"),
        ({"WEIGHTS": ""}, "net.yaml: WEIGHTS .or KD.TEACHER.WEIGHTS.: name the file"),
    ],
)
def test_wrong_descriptions_are_one_line(said, line, tmp_path):
    import re

    _, name = export(tmp_path, **said)
    assert re.search(line, refused(cfg_of(name)))


def test_files_that_do_not_run_are_one_line(tmp_path):
    _, name = export(tmp_path)
    state, torn = tmp_path / "state.pth", tmp_path / "torn.ts"
    torch.save(Net().state_dict(), state)
    torn.write_bytes((tmp_path / "net.ts").read_bytes()[:2000])
    for file in (state, torn):
        message = refused(cfg_of(name, str(file)))
        assert message.startswith(f"KD.TEACHER.WEIGHTS: '{file}' is no TorchScript program")
        assert torch.__version__ in message
    assert "this teacher has no option" in refused(cfg_of(name, KD__TEACHER__OPTS=["A", 1]))
    assert "no such file" in refused(cfg_of("torchscript://none.yaml"))
    shutil.copy(tmp_path / "net.yaml", tmp_path / "fixed.yaml")
    torch.jit.script(Fixed()).save(str(tmp_path / "fixed.ts"))
    message = refused(cfg_of(f"torchscript://{tmp_path}/fixed.yaml", str(tmp_path / "fixed.ts")))
    assert "does not run with an image of 64x96 pixels on cpu" in message and "224" in message


class Fixed(nn.Module):
    """Takes one size of image."""

    def forward(self, x: torch.Tensor):
        if x.shape[-1] != 224:
            raise RuntimeError("images are 224x224")
        return x


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_program_of_another_device_is_one_line(tmp_path):
    _, name = export(tmp_path)
    program = torch.jit.script(OtherDevice())
    program.save(str(tmp_path / "gpu.ts"))
    message = refused(cfg_of(name, str(tmp_path / "gpu.ts")))
    assert "does not run with an image of 64x96 pixels on cpu, MODEL.DEVICE" in message
