"""A library of one's own becomes a teacher; recipes, checks and timing know of schemes."""

import re
from pathlib import Path
from types import SimpleNamespace

import foreign_models  # noqa: F401  # registers kd_tiny_vit16
import kd_models
import pytest
import torch
from torch import nn

from projects.kd import ConfigError, build_teacher, check_config
from projects.kd.analysis.benchmark import Bench, without_weights
from projects.kd.commands.evaluate import teacher as evaluate_teacher
from projects.kd.foreign import base
from projects.kd.foreign.timm_teacher import PatchBackbone
from projects.kd.recipes.one_flag import recipe_config

GUIDE = Path(__file__).resolve().parents[2] / "docs/guide/any_teacher.md"


class Mine(nn.Module):
    """Maps of strides 8 and 16."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 256, 8, 8), nn.Conv2d(256, 256, 2, 2)

    def forward(self, x):
        fine = self.fine(x)
        return fine, self.coarse(fine)


@pytest.fixture
def mylib(monkeypatch):
    """The scheme that the guide registers, and what it was asked for."""
    monkeypatch.setattr(base, "_SCHEMES", dict(base._SCHEMES))
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    asked = SimpleNamespace(models=[], loaded=[])

    def make_model(name, size):
        asked.models.append((name, size))
        return Mine()

    load = lambda model, weights: asked.loaded.append(weights)  # noqa: E731
    exec(code, {"make_model": make_model, "load": load, "__name__": "mylib"})
    return asked


def cfg_of(name: str, weights: str = "", **overrides):
    return kd_models.distill_cfg((name, weights), **overrides)


def test_the_guides_example_teaches(mylib):
    opts = {"KD__TEACHER__OPTS": ["SIZE", "small"]}
    wrapper = kd_models.build_wrapper(cfg_of("mylib://net", "file.pth", **opts))
    assert mylib.models == [("net", "small")] and mylib.loaded == ["file.pth"]
    assert wrapper.level_map == {"p3": "p3", "p4": "p4"}
    model = wrapper.teacher.model.backbone.model
    images = [x["image"] for x in kd_models.make_batch()]
    tensor = wrapper.teacher.preprocess(images, (96, 96), "BGR")
    with kd_models.EventStorage(0):
        ctx, _ = wrapper.observe(kd_models.make_batch())
    assert torch.equal(ctx.teacher_features["p4"][..., :6, :6], model(tensor)[1])
    losses = kd_models.losses_at(wrapper, kd_models.make_batch())
    losses["loss_kd_mimic"].backward()
    assert all(p.grad is None for p in model.parameters())


def test_shapes_that_are_not_the_models_are_one_line(mylib, monkeypatch):
    monkeypatch.setattr(Mine, "forward", lambda self, x: (self.fine(x), self.fine(x)))
    with pytest.raises(ConfigError, match=r"'mylib://net': of a 64x96 image p4 is \(256, 8, 12\)"):
        build_teacher(cfg_of("mylib://net", "file.pth"))
    monkeypatch.setattr(Mine, "forward", lambda self, x: self.coarse(x))
    with pytest.raises(ConfigError, match="it does not take an image of 64x96 pixels"):
        build_teacher(cfg_of("mylib://net", "file.pth"))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tvision://net", "no teachers are registered for tvision://.*did you mean torchvision"),
        ("timm://", "names nothing behind timm://"),
    ],
)
def test_unknown_schemes(name, line):
    with pytest.raises(ConfigError, match=line):
        build_teacher(cfg_of(name))


def test_the_check_before_building_knows_schemes():
    for name, line in (("timm://resnet18", None), ("tim://resnet18", "registered for tim://")):
        cfg = cfg_of(name, DATASETS__TEST=(), MODEL__RETINANET__NUM_CLASSES=6)
        if line is None:
            check_config(cfg)
        else:
            with pytest.raises(ConfigError, match=line):
                check_config(cfg)


def test_one_flag_takes_them(tmp_path):
    student = kd_models.write_config(
        kd_models.tiny_cfg(OUTPUT_DIR="output/tiny"), tmp_path / "s.yaml"
    )
    cfg, lines, weights = recipe_config(student, "timm://resnet10t", "DSI")
    assert cfg.KD.HEADS == ("DSI",) and cfg.KD.DSI.SHARE == 0.12
    assert cfg.KD.TEACHER.CONFIG_FILE == weights == "timm://resnet10t"
    assert cfg.OUTPUT_DIR == "output/s_from_resnet10t_DSI"
    assert "DSI" in lines[-1] and "on p5" in lines[-1]


def test_timing_needs_no_weights_of_them():
    cfg = without_weights(cfg_of("timm://resnet10t", KD__TEACHER__OPTS=["NORM", False]))
    assert cfg.KD.TEACHER.OPTS == ["NORM", False] and cfg.KD.TEACHER.ALLOW_MISSING
    assert type(build_teacher(cfg).model).__name__ == "ForeignDetector"


def test_timing_runs_their_own_forward_once_a_step(monkeypatch):
    """In the whole step and in what it is compared with, on the same images."""
    ran, maps = [], PatchBackbone.maps
    cfg = without_weights(cfg_of("timm://kd_tiny_vit16", heads=("DSI",)))
    with kd_models.EventStorage(1):
        bench = Bench(cfg, ("DSI",), (60, 90), 2)
        monkeypatch.setattr(PatchBackbone, "maps", lambda self, x: ran.append(x) or maps(self, x))
        for action in (bench.base(), bench.step(bench.model), bench.teacher):
            action()
        bench.step()()
        bench.head("DSI")()
    assert len(ran) == 3, "neither the student's step nor a head runs the teacher"
    assert ran[0].shape == (1, 3, 64, 96)
    assert torch.equal(ran[0], ran[1]) and torch.equal(ran[0], ran[2])


def test_what_detects_nothing_cannot_be_evaluated():
    cfg = cfg_of("timm://resnet10t", KD__TEACHER__ALLOW_MISSING=True)
    with pytest.raises(ConfigError, match="ResNet gives features and no detections"):
        evaluate_teacher.build(cfg, student_input=False)
