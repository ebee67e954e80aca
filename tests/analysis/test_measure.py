"""The measuring tools' arithmetic: spreads, interleaving, bytes, batches and gradients."""

import math

import kd_models
import pytest
import torch

from projects.kd.analysis import measure

MIB = 2**20


def test_quartiles():
    spread = measure.Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert spread.as_dict() == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert measure.Spread.of([7.0]).as_dict() == {"median": 7.0, "low": 7.0, "high": 7.0}


def test_ratio_is_taken_within_pairs():
    # a machine twice as slow in the second round changes no ratio
    assert measure.ratio([2.0, 4.0, 3.0], [1.0, 2.0, 1.0]).median == 2.0
    with pytest.raises(ValueError):
        measure.ratio([1.0], [1.0, 2.0])


def test_actions_take_turns_and_only_rounds_after_warm_up_count():
    calls, ticks = [], []
    seconds = measure.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=3,
        warm_up=1,
        tick=lambda: ticks.append(1),
    )
    assert "".join(calls) == "abbaabba"
    assert [len(seconds[name]) for name in "ab"] == [3, 3] and len(ticks) == 4
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_seconds_are_those_of_the_given_clock():
    now = [0.0]

    def work(seconds):
        now[0] += seconds

    actions = {"a": lambda: work(2.0), "b": lambda: work(0.5)}
    found = measure.interleave(actions, rounds=2, warm_up=0, clock=lambda: now[0])
    assert found == {"a": [2.0, 2.0], "b": [0.5, 0.5]}


def test_default_protocol(monkeypatch):
    calls = []
    measure.interleave({"a": lambda: calls.append(1)})
    assert len(calls) == 14 and (measure.WARM_UP, measure.PAIRS) == (3, 11)


def test_peak_counts_what_lives_at_once():
    def action():
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        del first
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        view = second[MIB:]
        third = torch.empty(2 * MIB, dtype=torch.uint8)
        del second, third, view
        torch.empty(MIB, dtype=torch.uint8)

    kept = torch.empty(50 * MIB, dtype=torch.uint8)
    assert measure.peak_bytes(action) == 4 * MIB
    assert kept.numel() == 50 * MIB


def test_peak_sees_saved_tensors_and_temporaries():
    x = torch.ones(MIB // 4, requires_grad=True)  # 1 MiB
    assert 2 * MIB <= measure.peak_bytes(lambda: x.exp().exp()) < 2.1 * MIB
    # the exponents are saved for the backward pass, gradients come on top
    assert measure.peak_bytes(lambda: x.exp().exp().sum().backward()) >= 3 * MIB
    assert measure.peak_bytes(lambda: None) == 0


def test_random_batches_lie_inside_and_repeat():
    batch = measure.random_batch((96, 160), boxes=200, classes=4, images=2, seed=3)
    assert len(batch) == 2
    for example in batch:
        assert example["image"].shape == (3, 96, 160) and example["image"].dtype == torch.uint8
        boxes = example["instances"].gt_boxes.tensor
        assert boxes.shape == (200, 4) and (boxes >= 0).all()
        assert (boxes[:, [0, 2]] <= 160).all() and (boxes[:, [1, 3]] <= 96).all()
        sides = boxes[:, 2:] - boxes[:, :2]
        assert sides.min() >= 15.9
        # log-uniform: half of the sides lie below the geometric mean of the limits
        assert (sides[:, 0] < math.sqrt(16 * 160)).float().mean() == pytest.approx(0.5, abs=0.12)
        assert set(example["instances"].gt_classes.tolist()) == {0, 1, 2, 3}
    again = measure.random_batch((96, 160), boxes=200, classes=4, images=2, seed=3)
    assert torch.equal(batch[1]["image"], again[1]["image"])
    assert not torch.equal(batch[0]["image"], batch[1]["image"])


def test_settled_norms_keep_a_random_network_finite():
    cfg = kd_models.tiny_cfg(MODEL__RESNETS__NORM="FrozenBN")
    backbone = kd_models.build(cfg).backbone.eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 50
    measure.settle_norms(backbone, images)
    with torch.no_grad():
        stem = backbone.bottom_up.stem.conv1(images)
    torch.testing.assert_close(stem.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        stem.var((0, 2, 3), unbiased=False), torch.ones(8), atol=1e-3, rtol=0
    )
    with torch.no_grad():
        features = backbone(images)
    assert all(value.abs().max() < 1e3 for value in features.values())
    assert not backbone.bottom_up.stem.conv1.norm._forward_pre_hooks


def test_progress_names_what_runs_and_the_time_left(capsys):
    progress = measure.Progress(3, period=0.0)
    for name in "abc":
        progress.tick(name)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["[1/3] a", "[2/3] b", "[3/3] c"]
    assert lines[-1].endswith("ETA 0:00")
    quiet = measure.Progress(2, period=60.0)
    quiet.tick("a")
    assert capsys.readouterr().err == ""
    quiet.tick("b")
    assert "[2/2] b" in capsys.readouterr().err
