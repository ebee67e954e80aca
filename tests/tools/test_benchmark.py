"""kd-benchmark on a tiny pair of detectors and a data set on the disk."""

import functools
import json

import pytest
import torch
from detectron2.utils.events import EventStorage

from projects.kd import ConfigError, load_config
from projects.kd.analysis.benchmark import Bench, loop_masks
from projects.kd.analysis.measure import interleave
from projects.kd.commands.benchmark import PARTS as BENCHMARK
from projects.kd.commands.benchmark import step


def test_benchmark_measures_every_part(config, folder, capsys, monkeypatch):
    monkeypatch.setattr(step, "interleave", functools.partial(interleave, warm_up=0))
    path = folder / "bench.json"
    report = BENCHMARK.call(
        [
            *("all", "--config-file", config, "--size", "64x96", "--boxes", 3, "--rounds", 2),
            *("--clock", "cpu"),
            *("--memory", "--memory-size", "64x64", "--mask-size", "60x90", "--mask-boxes", 7),
            *("--output", path),
        ]
    )
    saved = json.loads(path.read_text())
    assert saved["protocol"]["size"] == [64, 96] and saved["protocol"]["rounds"] == 2
    assert saved["protocol"]["clock"] == "cpu"
    result = saved["results"]["student"]
    assert result == report["results"]["student"]
    assert set(result) == {"data", "teacher", "student", "heads", "step", "mask", "memory"}
    together = "Mimic+FGFI+CWD"
    assert set(result["heads"]) == {"Mimic", "FGFI", "CWD"}
    assert set(result["step"]) == {"Mimic", "FGFI", "CWD", together}
    for entry in result["step"].values():
        assert set(entry) == {"seconds", "base", "ratio"}
        assert entry["ratio"]["low"] <= entry["ratio"]["median"] <= entry["ratio"]["high"]
    assert result["mask"]["cells_that_differ_from_the_fp32_loop"] <= 1
    memory = result["memory"]
    assert memory["teacher"] < memory["base step"] <= memory[f"step with {together}"]
    assert all(value > 0 for value in memory.values())
    printed = capsys.readouterr().out
    assert f"step with {together}" in printed and "loop over boxes" in printed


def test_benchmark_times_the_same_number_of_steps_of_both_sides(config, monkeypatch):
    built, steps = [], []
    init = Bench.__init__

    def count(bench, cfg, heads, *args, **kwargs):
        init(bench, cfg, heads, *args, **kwargs)
        built.append(tuple(heads))
        steps.clear()
        bench.model.student.register_forward_hook(lambda *_: steps.append("student"))
        bench.model.teacher.model.backbone.register_forward_hook(lambda *_: steps.append("teacher"))

    monkeypatch.setattr(Bench, "__init__", count)
    words = ["step", "--config-file", config, "--heads", "CWD"]
    BENCHMARK.call([*words, "--size", "64x64", "--boxes", "2", "--rounds", "3"])
    assert built == [("CWD",)]
    # three warm-ups and three rounds of base and whole, each with one pass of both networks
    assert steps.count("student") == steps.count("teacher") == 12


def test_crosskd_has_a_second_pass_of_the_teachers_last_layers_in_its_base(config):
    cfg = load_config(config)
    with EventStorage(1):
        bench = Bench(cfg, ("CrossKD",), (64, 96), 3)
        last = []
        bench.model.teacher.model.head.cls_score.register_forward_hook(lambda *_: last.append(1))
        levels = len(bench.ctx.student_features)
        bench.base()()
        in_base, _ = len(last), last.clear()
        bench.step(bench.model)()
    # the teacher's own pass, and the student's maps
    assert in_base == len(last) == 2 * levels
    assert all(p.grad is None for p in bench.model.teacher.model.parameters())


def test_csa_has_a_second_pass_of_the_students_head_in_its_base(config):
    cfg = load_config(config)
    with EventStorage(1):
        bench = Bench(cfg, ("CSA",), (64, 96), 3)
        last, levels = [], len(bench.ctx.student_features)
        bench.model.student.head.cls_score.register_forward_hook(lambda *_: last.append(1))
        bench.base()()
        assert len(last) == 2 * levels


def test_benchmark_steps_train_what_they_should(config):
    cfg = load_config(config)
    cfg.KD.START_ITER = 0
    with EventStorage(1):
        bench = Bench(cfg, ("CWD", "FGFI"), (64, 96), 3)
        heads = [p.clone() for p in bench.model.heads.parameters()]
        student = bench.model.student.head.cls_score.weight.clone()
        bench.base()()
        assert not torch.equal(student, bench.model.student.head.cls_score.weight)
        assert all(map(torch.equal, heads, bench.model.heads.parameters()))
        whole = bench.step(bench.model)
        whole()
        trained = [
            not torch.equal(a, b)
            for a, b in zip(heads, bench.model.heads.parameters(), strict=True)
        ]
        assert any(trained)
        assert bench.model.student.head.cls_score.weight.grad is not None
        whole.clear()
        assert all(p.grad is None for p in bench.model.parameters())
        before = [p.clone() for p in bench.model.parameters()]
        bench.head("FGFI")()
        assert all(map(torch.equal, before, bench.model.parameters()))
        assert all(p.grad is None for p in bench.model.parameters())


def test_the_loop_over_boxes_selects_what_the_head_selects(config):
    with EventStorage(1):
        bench = Bench(load_config(config), ("FGFI",), (90, 120), 20)
    head = bench.model.heads["FGFI"]
    for head.per_level in (False, True):
        ours = list(head.masks(bench.ctx).values())
        loop = loop_masks(head, bench.ctx)
        assert [x.shape for x in ours] == [x.shape for x in loop]
        assert sum(int(x.sum()) for x in loop) > 10
        assert (
            sum(int((a != b).sum()) for a, b in zip(ours, loop, strict=True)) <= 1
        )  # fp32 against fp64


def test_benchmark_refuses_what_it_cannot_measure(config, monkeypatch):
    words = ["step", "--config-file", config]
    with pytest.raises(ConfigError, match="KD.HEADS: no imitation head 'CDW'"):
        BENCHMARK.call([*words, "--heads", "CDW"])
    with pytest.raises(ConfigError, match=r"KD\.META_ARCHITECTURE of student is empty"):
        BENCHMARK.call([*words, "KD.META_ARCHITECTURE", ""])
    with pytest.raises(ConfigError, match="data: needs --config-file"):
        BENCHMARK.call(["data"])
    with pytest.raises(ConfigError, match="--clock cpu: of --device cuda"):
        monkeypatch.setattr(step, "require_device", lambda device: None)
        BENCHMARK.call([*words, "--clock", "cpu", "--device", "cuda"])
    with pytest.raises(ConfigError, match="nothing to measure"):
        BENCHMARK.call(["mask", *words[1:], "--heads", "CWD"])
