"""Weights that set themselves: the rule, where it is measured, and what is kept."""

import math

import kd_models
import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from projects.kd import ConfigError
from projects.kd.balance import (
    ShareController,
    Target,
    build_balance,
    gradient_norm,
    multiplier,
    update,
)


def test_gradient_norm_is_over_all_maps_together():
    a = torch.tensor([3.0, 0.0], requires_grad=True)
    b = torch.tensor([4.0], requires_grad=True)
    c = torch.tensor([1.0], requires_grad=True)
    maps = [a * 1, b * 1, c * 1]
    loss = (maps[0].square().sum() + maps[1].square().sum()) / 2
    assert gradient_norm(loss, maps) == pytest.approx(5.0)
    assert gradient_norm(2 * loss, maps) == pytest.approx(10.0), "the graph is kept"
    assert gradient_norm(loss, maps, scale=4096.0) == pytest.approx(5.0)
    assert gradient_norm(loss, maps[2:]) == 0.0
    assert gradient_norm(torch.tensor(1.0), maps) == 0.0
    assert a.grad is None


def test_multipliers_of_the_methods_dossier():
    samples = [(4, 2), (3.5, 2.4), (3, 0), (2.8, 3.5), (2.5, 0.9), (math.nan, 1), (2, 1e-4)]
    expected = [1.0, 0.85391256, 0.85391256, 0.66317620, 0.79778998, 0.79778998, 5.26636384]
    state = torch.zeros(2, dtype=torch.float64)
    found = []
    for task, head in samples:
        if head / task > 0:  # false for 0 and for NaN
            update(state, math.log(head / task), ema=0.8)
        found.append(multiplier(state, 0.5, bound=10.0))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("share, expected", [(1e-6, 10.0), (1e6, 0.1)])
def test_the_multiplier_stays_within_its_bound(share, expected):
    state = torch.zeros(2, dtype=torch.float64)
    update(state, math.log(share), ema=0.9)
    assert multiplier(state, 0.5, bound=10.0) == pytest.approx(expected)


def test_a_target_that_moves():
    target = Target(8.0, 0.5, 100)
    assert [target(x) for x in (0, 25, 50, 100, 500)] == pytest.approx([8.0, 4.0, 2.0, 0.5, 0.5])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return kd_models.write_teacher(tmp_path_factory.mktemp("teacher"))


def run(model, iterations, seed=0):
    """Per iteration what was logged and the losses; nothing is trained."""
    found = []
    for iteration in iterations:
        with EventStorage(iteration) as storage:
            losses = model(kd_models.make_batch(seed=seed))
            found.append(({k: v[0] for k, v in storage.latest().items()}, losses))
    return found


def share_of(losses, model, batch_seed=0):
    """Gradient norm of loss_kd_* beside the task's at the paired levels, by its definition."""
    kd = [v for k, v in losses.items() if k.startswith("loss_kd_")]
    task = [v for k, v in losses.items() if not k.startswith(("loss_kd_", "loss_aux_"))]
    maps = model.seen
    return gradient_norm(sum(kd), maps) / gradient_norm(sum(task), maps)


@pytest.fixture
def spied(monkeypatch, files):
    """A wrapper that remembers the student's features of its last step."""

    def build(heads=("Mimic",), **overrides):
        model = kd_models.build_wrapper(kd_models.distill_cfg(files, heads=heads, **overrides))
        observe = model.observe

        def remember(batch):
            ctx, losses = observe(batch)
            model.seen = model.heads[heads[0]].acts_on(ctx)
            return ctx, losses

        model.observe = remember
        return model

    return build


@pytest.mark.parametrize("heads", [("Mimic",), ("SDF",)])
def test_the_first_sample_brings_the_share_to_the_target(spied, heads):
    model = spied(heads, KD__BALANCE__TARGET=0.7, KD__BALANCE__BOUND=1e9)
    (logged, losses), *_ = run(model, [0])
    assert share_of(losses, model) == pytest.approx(0.7, rel=1e-4)
    assert logged[f"kd/share_{heads[0]}"] == pytest.approx(0.7, rel=1e-4)


def test_between_measurements_the_multiplier_is_kept(spied):
    free = spied(("Mimic",))
    held = spied(("Mimic",), KD__BALANCE__TARGET=3.0, KD__BALANCE__PERIOD=2)
    held.load_state_dict(free.state_dict(), strict=False)
    (_, plain), *_ = run(free, [0])
    (first, a), (second, b) = run(held, [0, 1])
    factor = first["kd/multiplier_Mimic"]
    assert "kd/multiplier_Mimic" not in second
    assert factor != pytest.approx(1.0, abs=0.01)
    for name, value in plain.items():
        expected = value * (factor if name.startswith("loss_kd_") else 1.0)
        torch.testing.assert_close(a[name], expected, rtol=1e-4, atol=1e-6)
    kd = [name for name in b if name.startswith("loss_kd_")]
    for name in kd:
        torch.testing.assert_close(b[name], a[name], rtol=0.2, atol=1e-3)


def test_micro_batches_of_a_step_count_once_and_the_state_is_saved(spied):
    model = spied(KD__BALANCE__TARGET=0.5, KD__BALANCE__PERIOD=1)
    run(model, [0, 0, 0])
    assert model.heads.state_dict()["Mimic.balance_state"][1] == 1
    run(model, [1])
    state = model.heads.state_dict()
    assert state["Mimic.balance_state"][1] == 2
    other = spied(KD__BALANCE__TARGET=0.5, KD__BALANCE__PERIOD=1)
    other.load_state_dict(model.state_dict())
    # in no state dict; checkpoints of a training hold it
    other.student.loss_normalizer = model.student.loss_normalizer
    (mine, _), *_ = run(model, [2], seed=3)
    (theirs, _), *_ = run(other, [2], seed=3)
    assert mine["kd/multiplier_Mimic"] == theirs["kd/multiplier_Mimic"]


def test_nothing_is_measured_or_kept_when_it_is_off(spied):
    model = spied(("Mimic", "CWD"))
    assert model.balance is None
    assert not [name for name in model.heads.state_dict() if "balance" in name]


def test_a_head_may_have_its_own_target(files):
    cfg = kd_models.distill_cfg(
        files, heads=("Mimic", "CWD", "PKD"), KD__BALANCE__TARGET=2.0, KD__BALANCE__END_TARGET=0.5
    )
    cfg.KD.CWD.SHARE = 0.0
    cfg.KD.PKD.SHARE = 0.3
    balance = build_balance(cfg, nn.ModuleDict({x: nn.Identity() for x in cfg.KD.HEADS}))
    length = cfg.SOLVER.MAX_ITER
    assert balance.targets == {"Mimic": Target(2.0, 0.5, length), "PKD": Target(0.3, 0.3, length)}


def test_an_end_without_a_target(files):
    cfg = kd_models.distill_cfg(files, KD__BALANCE__END_TARGET=0.5)
    with pytest.raises(ConfigError, match="KD.BALANCE.END_TARGET .* KD.BALANCE.TARGET"):
        build_balance(cfg, nn.ModuleDict())


def test_a_task_without_gradient_names_the_head_and_its_key(files):
    cfg = kd_models.distill_cfg(files, KD__BALANCE__TARGET=0.5)
    model = kd_models.build_wrapper(cfg)
    for parameter in model.student.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="KD.BALANCE.*Mimic.*KD.MIMIC.SHARE"):
        kd_models.losses_at(model, kd_models.make_batch())


def test_a_loss_that_is_not_finite_leaves_the_state(spied):
    model = spied(KD__BALANCE__TARGET=0.5, KD__BALANCE__PERIOD=1)
    run(model, [0])
    before = model.heads["Mimic"].balance_state.clone()
    model.heads["Mimic"].weight = math.nan
    (logged, _), *_ = run(model, [1])
    assert torch.equal(model.heads["Mimic"].balance_state, before)
    assert "kd/share_Mimic" not in logged


def test_every_due_step_measures_the_task_once_for_heads_on_the_same_maps(spied, monkeypatch):
    counted = []
    monkeypatch.setattr(
        "projects.kd.balance.gradient_norm",
        lambda loss, maps, scale: counted.append(loss) or gradient_norm(loss, maps, scale),
    )
    model = spied(("Mimic", "CWD", "PKD"), KD__BALANCE__TARGET=0.5)
    run(model, [0])
    assert len(counted) == 4


def test_the_controller_registers_buffers_of_its_own_heads_alone():
    heads = nn.ModuleDict({"A": nn.Identity(), "B": nn.Identity()})
    ShareController(heads, {"A": Target(1.0, 1.0, 10)}, period=1, ema=0.9, bound=10.0)
    assert list(heads.state_dict()) == ["A.balance_state"]
