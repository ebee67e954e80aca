"""SDF keeps to the contract; its module against loops; its target, its monitor, what it refuses."""

import logging

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from head_contract import RAGGED, HeadContract
from kd_testing import STRIDES, head_cfg, leaves, make_context, stage, toy_info
from torch import nn

from projects.kd import DistillContext
from projects.kd.errors import ConfigError
from projects.kd.functional.sdf import spread
from projects.kd.heads import build_imitation_heads
from projects.kd.heads.sdf import SDF

SMALL = {"EMBED_DIM": 8}
FINE = {**SMALL, "LEVELS": ("res3", "res5")}  # at stride 32 the contract's images fill their grid


class TestSDF(HeadContract):
    name = "SDF"
    node = FINE

    def student_leaves(self, ctx, head):
        features = leaves(ctx).student[: len(STRIDES)]
        return [(level, x) for level, x in features if stage(level) in head.levels]

    def test_levels_are_limited_by_the_config(self):
        """Stages of the backbone, whatever the pyramid's levels are; the last by default."""
        for head, levels in (
            (self.head(LEVELS=()), ["p5"]),
            (self.head(common={"LEVELS": ("p3",)}, LEVELS=()), ["p5"]),
            (self.head(LEVELS=("res4", "res5")), ["p4", "p5"]),
        ):
            ctx = self.context(**RAGGED)
            assert head.levels == tuple(map(stage, levels))
            self.run(head, ctx)[1].backward()
            reached = [k for k, x in ctx.student_features.items() if x.grad is not None]
            assert reached == levels


class TestSDFShared(TestSDF):
    node = {**FINE, "TEACHER_SDF": "shared", "NORMALIZE": False, "DILATIONS": [2]}


def build(channels=(6, 6), common=None, student=None, teacher=None, **node):
    torch.manual_seed(5)
    infos = student or toy_info(channels[0]), teacher or toy_info(channels[1])
    return build_imitation_heads(head_cfg("SDF", common, **{**SMALL, **node}), *infos)["SDF"]


# --- the teacher's side -------------------------------------------------------------------------


def steps(head, iterations, seed=0):
    """Optimizer steps; each iteration's forward passes, then a list of E's states after them."""
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.5)
    states = []
    for iteration, passes in iterations:
        for _ in range(passes):
            ctx = make_context(**RAGGED, seed=seed + iteration)
            ctx.iteration = iteration
            head(ctx)["loss_kd_sdf"].backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append({k: p.detach().clone() for k, p in head.decouplers.named_parameters()})
    return states


def test_the_average_counts_every_optimizer_step_once():
    """Two batches an iteration are one step; the average lags by the step that has yet to come."""
    head = build(EMA_DECAY=0.75, WEIGHT=1.0).train()
    assert {n for n, _ in head.targets.named_parameters()} == {
        n for n, _ in head.decouplers.named_parameters()
    }
    assert not any(p.requires_grad for p in head.targets.parameters())
    expected = {k: p.detach().clone() for k, p in head.decouplers.named_parameters()}
    first = {k: v.clone() for k, v in head.targets.named_parameters()}
    assert all(torch.equal(first[k], v) for k, v in expected.items())
    states = steps(head, [(0, 2), (1, 1), (2, 3), (3, 2)])
    for state in states[:-1]:
        expected = {k: 0.75 * v + 0.25 * state[k] for k, v in expected.items()}
    assert any("norm" in name for name in expected)
    for name, value in head.targets.named_parameters():
        assert not torch.equal(value, first[name]), name
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    head.eval()
    before = {k: v.clone() for k, v in head.targets.named_parameters()}
    ctx = make_context(**RAGGED)
    ctx.iteration = 9
    head(ctx)
    assert all(torch.equal(v, before[k]) for k, v in head.targets.named_parameters())


def test_a_frozen_target_stays_and_a_shared_one_is_the_module_itself():
    frozen = build(TEACHER_SDF="frozen", WEIGHT=1.0).train()
    before = {k: v.clone() for k, v in frozen.targets.named_parameters()}
    states = steps(frozen, [(0, 1), (1, 1)])
    assert all(torch.equal(v, before[k]) for k, v in frozen.targets.named_parameters())
    assert not torch.equal(states[-1]["res5.middle.weight"], before["res5.middle.weight"])
    shared = build(TEACHER_SDF="shared", WEIGHT=1.0).train()
    assert shared.targets is None and not any("target" in name for name in shared.state_dict())
    steps(shared, [(0, 1)])
    _, teacher, mask = shared.stage_pair(make_context(**RAGGED), "res5")
    target = shared.embed_teacher("res5", teacher, mask)
    assert torch.equal(target, shared.decouplers["res5"](teacher, mask))
    assert not target.requires_grad


@pytest.mark.parametrize("mode", ["ema", "shared", "frozen"])
def test_no_gradient_through_the_teachers_side(mode):
    """With equal features on both sides all that differs is the gradient: the student's alone."""
    head = build(TEACHER_SDF=mode, WEIGHT=1.0, LEVELS=("res3",))
    for parameter in head.targets.parameters() if head.targets is not None else ():
        parameter.mul_(1.1)
    ctx = make_context(**RAGGED)
    head(ctx)["loss_kd_sdf"].backward()
    found = {n: p.grad.clone() for n, p in head.decouplers.named_parameters()}
    assert all(x.grad is None for _, x in leaves(ctx).teacher)
    head.zero_grad()
    student, teacher, mask = head.stage_pair(make_context(**RAGGED), "res3")
    target = head.embed_teacher("res3", teacher, mask).detach().clone()
    own = head.decouplers["res3"](student, mask)
    difference = (own - target)[mask.expand_as(own)]
    difference.square().mean().backward()
    for name, parameter in head.decouplers.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


class GradientsOnBothSides(SDF):
    """What the paper's text leaves open, and what must not be."""

    def embed_teacher(self, stage, teacher, mask):
        return self.decouplers[stage](teacher, mask)


def imitate(head, most, caplog):
    """Train a random student of a frozen random teacher until the target is lost.

    Returns the target's spread at the start and at the end, in logging steps of every 10.
    """
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Conv2d(3, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3), nn.ReLU())
        for c in (8, 12)
    ]
    parameters = [*nets[0].parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    sizes = [(128, 128)] * 4
    with EventStorage(0) as storage, caplog.at_level(logging.WARNING):
        for iteration in range(most):
            x = torch.randn(4, 3, 6, 6)
            ctx = DistillContext(
                iteration=iteration,
                image_sizes=sizes,
                canvas=sizes[0],
                gt=None,
                student_features={},
                teacher_features={},
                student_outputs={"bottom_up": {"res5": nets[0](x)}},
                teacher_outputs={"bottom_up": {"res5": nets[1](x)}},
                log_scalars=iteration % 10 == 0,
            )
            loss = head(ctx)["loss_kd_sdf"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            spreads = [v for v, _ in storage.history("kd/sdf_target_std").values()]
            if caplog.records and spreads[-1] < 0.05 * spreads[0]:
                break
            storage.step()
    return spreads[0], spreads[-1], loss.item()


def test_gradients_on_both_sides_collapse_and_the_monitor_says_so_once(caplog):
    head = build((8, 12), TEACHER_SDF="shared", WEIGHT=1.0).train()
    head.__class__ = GradientsOnBothSides
    first, last, loss = imitate(head, 300, caplog)
    assert last < 0.05 * first and loss < 0.01, "the lowest loss, and nothing learned"
    (record,) = [x for x in caplog.records if x.name == "projects.kd.heads.sdf"]
    assert record.getMessage().startswith("KD.SDF: the teacher's embedding collapses")


def test_with_the_moving_average_it_does_not(caplog):
    head = build((8, 12), EMA_DECAY=0.995, WEIGHT=1.0).train()
    first, last, _ = imitate(head, 100, caplog)
    assert last > 0.5 * first
    assert head.first_spread.item() == pytest.approx(first)
    assert not [x for x in caplog.records if x.name == "projects.kd.heads.sdf"]


def test_the_spread_is_the_targets_and_costs_nothing_between_logged_steps(monkeypatch):
    head = build().train()
    ctx = make_context(**RAGGED)
    ctx.log_scalars = True
    _, teacher, mask = head.stage_pair(ctx, "res5")
    expected = spread(head.embed_teacher("res5", teacher, mask), mask).item()
    with EventStorage(0) as storage:
        head(ctx)
    assert storage.latest()["kd/sdf_target_std"][0] == pytest.approx(expected)

    def refuse(*_):
        raise AssertionError("the device was asked")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    head(make_context(**RAGGED))


# --- stages, resolutions, weights, refusals -----------------------------------------------------


def info_with(**strides):
    """A detector whose backbone has stages of given (channels, stride)."""
    info = toy_info(6)
    shapes = {k: ShapeSpec(channels=c, stride=s) for k, (c, s) in strides.items()}
    info.model.backbone.bottom_up.output_shape = lambda: shapes
    return info


def test_stages_go_by_place_or_by_stride():
    student = info_with(stem=(4, 4), late=(16, 32), early=(8, 16))
    teacher = info_with(res4=(20, 16), res5=(24, 32))
    head = build(student=student, teacher=teacher)
    assert (head.levels, head.teacher_stages) == (("late",), {"late": "res5"})
    assert head.adapters["late"].weight.shape == (24, 16, 1, 1)
    assert head.decouplers["late"].middle.weight.shape == (8, 8, 3, 3)
    assert build(student=student, teacher=teacher, LEVELS=("early",)).teacher_stages == {
        "early": "res4"
    }
    # dilated stages share a stride: the last one is the deepest
    assert build(student=info_with(res4=(8, 16), res5=(8, 16))).levels == ("res5",)


def test_widths_of_the_paper_sized_pair():
    head = build(
        student=info_with(res5=(320, 32)), teacher=info_with(res5=(2048, 32)), EMBED_DIM=256
    )
    module = head.decouplers["res5"]
    assert module.middle.weight.shape == (512, 512, 3, 3)
    assert [phi.weight.shape for phi in module.project] == [(256, 2048)] * 3
    assert head.adapters["res5"].weight.shape == (2048, 320, 1, 1)


@pytest.mark.parametrize(
    ("preset", "taps", "weight"),
    [
        ("paper", ("features", "dense", "bottom_up"), 0.01),
        ("paper", ("features", "bottom_up"), 0.07),
    ],
)
def test_presets_go_by_the_kind_of_student(preset, taps, weight):
    student = toy_info(6, taps=taps)
    assert build(student=student, PRESET=preset).weight == weight
    assert build(student=student, PRESET=preset, WEIGHT=3.0).weight == 3.0
    assert build(student=student).weight > weight, "balanced is the default"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"TEACHER_SDF": "both"}, r"KD\.SDF\.TEACHER_SDF: 'both'.*ema, shared, frozen"),
        ({"PRESET": "none"}, r"KD\.SDF\.PRESET: 'none'.*paper, balanced"),
        ({"WEIGHT": -2.0}, r"KD\.SDF\.WEIGHT is -2\.0"),
        ({"DILATIONS": []}, r"KD\.SDF\.DILATIONS: \[\]"),
        ({"DILATIONS": [1, 0]}, r"KD\.SDF\.DILATIONS: \[1, 0\]"),
        ({"EMBED_DIM": 1}, r"KD\.SDF\.EMBED_DIM is 1"),
        ({"EMA_DECAY": 1.0}, r"KD\.SDF\.EMA_DECAY is 1\.0"),
        ({"LEVELS": ("p5",)}, r"KD\.SDF\.LEVELS: p5 .*res3, res4, res5"),
    ],
)
def test_wrong_values_are_refused_in_one_line(node, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(**node)
    assert "\n" not in str(error.value)


def test_a_backbone_without_stages_is_refused():
    student = toy_info(6)
    del student.model.backbone.bottom_up
    with pytest.raises(ConfigError, match=r"^KD\.HEADS: SDF reads .*student.*ToyDetector") as error:
        build(student=student)
    assert "\n" not in str(error.value)
