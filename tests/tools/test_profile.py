"""kd-benchmark profile: which part an operation belongs to, the picture, the command."""

import json
import time
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from projects.kd import ConfigError, build_training_model, load_config
from projects.kd.analysis.benchmark import without_weights
from projects.kd.analysis.flame import flame_svg
from projects.kd.analysis.shares import label, marked, shares_of
from projects.kd.commands.benchmark import PARTS as BENCHMARK
from projects.kd.commands.benchmark import turns
from projects.kd.evaluation.batches import build_test_loader


class Slow(torch.autograd.Function):
    """Sleeps for so many milliseconds forward and backward."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_time = backward
        time.sleep(forward / 1e3)
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward_time / 1e3)
        return gradient, None, None


class Sleeper(nn.Module):
    def forward(self, x):
        return Slow.apply(x, 30, 60)


def test_forward_and_backward_time_go_to_the_part_that_caused_them():
    x = torch.ones(3, requires_grad=True)
    student = nn.Sequential()
    student.add_module("backbone", nn.Sequential(nn.Sequential(Sleeper())))
    with (
        marked(student, "kd/student"),
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler,
    ):
        start = time.perf_counter()
        with record_function("kd/student"):
            features = student(x)
        losses = []
        for name, backward in (("A", 90), ("B", 0)):
            with record_function(f"kd/head/{name}"):
                losses.append(Slow.apply(features, 0, backward).sum())
        with record_function("kd/backward"):
            sum(losses).backward()
        time.sleep(0.04)
        total = 1e3 * (time.perf_counter() - start)
    shares = shares_of(profiler.events(), total)
    least = {
        "kd/student/backbone": 30,
        "kd/student/backbone/backward": 60,
        "kd/head/A/backward": 90,
        "kd/rest": 40,
    }
    for part, milliseconds in least.items():
        others = sum(v for k, v in least.items() if k != part)
        assert milliseconds * 0.95 <= shares.host[part] <= total - 0.95 * others, part
    assert "kd/head/B/backward" in shares.host
    assert sum(shares.host.values()) == pytest.approx(total)
    assert sum(shares.stacks.values()) == pytest.approx(total)
    backward = [p for p in shares.stacks if p[:2] == ("backward", "head/A")]
    assert any("SlowBackward" in p[-1] for p in backward)
    assert ("student", "student/backbone", "backbone.0") in {p[:3] for p in shares.stacks}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_kernels_are_counted_where_they_were_launched():
    def event(name, start, end, parent=None, kernels=(), number=-1):
        return SimpleNamespace(
            name=name,
            time_range=SimpleNamespace(start=start, end=end),
            cpu_parent=parent,
            kernels=[SimpleNamespace(duration=x) for x in kernels],
            sequence_nr=number,
            self_cpu_time_total=1000,
            device_type=DeviceType.CPU,
            is_async=False,
        )

    head = event("kd/head/A", 0, 9)
    forward = event("aten::mul", 1, 2, head, [3000], number=7)
    backward = event("autograd::engine::evaluate_function: MulBackward0", 20, 22, number=7)
    inner = event("aten::mul", 21, 22, backward, [5000, 1000])
    stray = event("aten::add", 30, 31, None, [2000])
    on_device = event("kernel", 3, 4)
    on_device.device_type = DeviceType.CUDA
    shares = shares_of([inner, on_device, stray, backward, forward, head], 10)
    assert shares.device == {"kd/head/A": 3, "kd/head/A/backward": 6, "kd/rest": 2}
    assert shares.host == {"kd/head/A": 2, "kd/head/A/backward": 2, "kd/rest": 6}
    assert label("kd/head/A/backward") == "head, A, backward"


def test_widths_of_the_picture_are_the_shares():
    text = flame_svg({("a", "b<"): 30.0, ("a",): 10.0, ("c",): 60.0}, "t & u")
    root = ElementTree.fromstring(text)  # so names are escaped
    space = "{http://www.w3.org/2000/svg}"
    drawn = {}
    for group in root.iter(f"{space}g"):
        rectangle = group.find(f"{space}rect")
        name = group.find(f"{space}title").text
        drawn[name] = tuple(float(rectangle.get(key)) for key in ("x", "y", "width"))
    assert drawn == {
        "c: 60 ms, 60.0%": (0.0, 18.0, 720.0),
        "a: 40 ms, 40.0%": (720.0, 18.0, 480.0),
        "b<: 30 ms, 30.0%": (720.0, 36.0, 360.0),
    }


def test_the_command_tells_every_part_of_a_distillation_step(config, folder, capsys, monkeypatch):
    evaluated = []
    monkeypatch.setattr(
        "projects.kd.commands.benchmark.profile.build_test_loader",
        lambda *args, **kw: evaluated.append(build_test_loader(*args, **kw)) or evaluated[-1],
    )
    report = BENCHMARK.call(
        [
            *("profile", "--config-file", config, "--steps", 1, "--warm-up", 1),
            *("--eval-images", 2, "--output", folder / "profile", "SOLVER.CHECKPOINT_PERIOD", 100),
            *("SOLVER.MAX_ITER", 250, "TEST.EVAL_PERIOD", 0, "TEST.IMS_PER_BATCH", 2),
        ]
    )
    assert max(map(len, evaluated[0].batch_sampler)) == 2
    parts = report["host_ms"]
    loader = {f"kd/loader/{name}" for name in ("read", "augmentation", "annotations")}
    teacher = {f"kd/teacher/{name}" for name in ("preprocess", "backbone")}
    heads = {f"kd/head/{name}" for name in ("Mimic", "FGFI", "CWD")}
    student = {f"kd/student/{name}" for name in ("backbone", "head")}
    back = {f"{name}/backward" for name in heads | student}
    assert loader | teacher | heads | student | back <= set(parts)
    assert {"kd/optimizer", "kd/rest"} <= set(parts)
    assert not any(name.startswith("kd/teacher") and "backward" in name for name in parts)
    watched = 1e3 * report["step_seconds_with_profiler"]["median"]
    assert sum(parts.values()) == pytest.approx(watched, rel=1e-3)
    assert report["evaluation_images"] == 6 and report["images"] == 2
    out = capsys.readouterr().out
    assert "head, FGFI, backward" in out and "3 checkpoints" in out and "250 steps" in out
    saved = json.loads((folder / "profile" / "profile.json").read_text())
    assert saved["host_ms"] == parts
    ElementTree.parse(folder / "profile" / "flame.svg")
    assert "traceEvents" in json.loads((folder / "profile" / "trace.json").read_text())


def test_the_command_takes_a_plain_config_and_noise(config, capsys):
    words = ["profile", "--config-file", config, "--steps", 1, "--warm-up", 1]
    plain = ["KD.META_ARCHITECTURE", "", "KD.HEADS", "()"]
    report = BENCHMARK.call([*words, "--size", "64x96", "--images", 3, *plain])
    parts = set(report["host_ms"])
    assert {"kd/forward/backbone", "kd/forward/head/backward"} <= parts
    assert not any(name.startswith(("kd/teacher", "kd/head", "kd/loader/")) for name in parts)
    assert report["images"] == 3 and "evaluation_images" not in report
    with pytest.raises(ConfigError, match="--steps: is 0"):
        BENCHMARK.call([*words[:3], "--steps", "0"])
    with pytest.raises(ConfigError, match=r"DATASETS\.TRAIN"):
        BENCHMARK.call([*words, "DATASETS.TRAIN", "('nothing_of_this_name',)"])


@pytest.mark.parametrize("teacher", [False, True])
def test_variants_take_turns(config, folder, monkeypatch, capsys, teacher):
    order = []
    step = turns.Variant.step
    monkeypatch.setattr(
        turns.Variant,
        "step",
        lambda self, counts: order.append((self.name[-1], counts)) or step(self, counts),
    )
    words = ["turns", "--config-file", config, "--rounds", 3, "--warm-up", 1, "--size", "64x64"]
    words += ["--teacher"] if teacher else []
    variants = [["--variant", "KD.LOG_PERIOD", "5", "SEED", str(i)] for i in (1, 2)]
    report = BENCHMARK.call([*words, *variants[0], *variants[1]])
    assert "".join(name for name, _ in order) == "12211221"
    assert [counts for _, counts in order] == [False] * 2 + [True] * 6
    first, second = report["results"].values()
    assert first["ratio"] == {"median": 1, "low": 1, "high": 1}
    low, high = second["cpu_seconds"]["low"], second["cpu_seconds"]["high"]
    assert 0 < low <= second["cpu_seconds"]["median"] <= high
    assert "KD.LOG_PERIOD 5 SEED 2" in capsys.readouterr().out


def test_turns_refuses_what_is_no_variant(config):
    words = ["turns", "--config-file", config, "--variant", "SEED"]
    with pytest.raises(ConfigError, match="--variant SEED: write KEY VALUE"):
        BENCHMARK.call(words)
    plain = ["KD.META_ARCHITECTURE", "", "KD.HEADS", "()"]
    with pytest.raises(ConfigError, match="--teacher: KD.META_ARCHITECTURE is empty"):
        BENCHMARK.call([*words[:3], "--teacher", "--size", "64x64", "--variant", *plain])


def test_gradients_are_those_of_all_trained_parameters(config, capsys):
    words = ["gradients", "--config-file", config, "--processes", 2, 8, "--gigabytes", 2]
    report = BENCHMARK.call(words)
    model = build_training_model(without_weights(load_config(config)))
    expected = {"student": model.student, **{f"head {k}": v for k, v in model.heads.items()}}
    for name, part in expected.items():
        count = sum(p.numel() for p in part.parameters() if p.requires_grad)
        assert report["parameters"][name] == count, name
    total = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report["exchange"][2] == {"bytes": total, "seconds": total / 2e9}
    assert report["exchange"][8]["bytes"] == pytest.approx(total * 1.75)
    assert "together" in capsys.readouterr().out
