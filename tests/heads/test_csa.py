"""CSA keeps to the contract; gradients cell by cell, the first step, and what it refuses."""

from __future__ import annotations

import kd_models
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from kd_testing import CHANNELS, head_cfg, toy_info, toy_retinanet
from prediction_contract import PredictionContract, prediction_context
from torch import nn

from projects.kd.errors import ConfigError
from projects.kd.heads import build_imitation_heads
from projects.kd.heads.csa import read_rates
from projects.kd.predict import predictor_for
from projects.kd.predict.dense import flatten_cells

SMALL = {"DIM": 16, "HEADS": 4}
ARCHS = ["RetinaNet", "GeneralizedRCNN"]


class TestCSA(PredictionContract):
    name = "CSA"
    node = SMALL
    # detection losses count the padding of a batch as background, as the student's own do
    blind_to_canvas = "loss_kd"
    averages_teacher = False
    may_skip_levels = True  # boxes are taught on levels with an assigned object

    def padded(self, ctx):
        """The student's features are what its own head reads."""
        levels = zip(
            ctx.student_features, *ctx.student_outputs["dense"].parts().values(), strict=True
        )
        logits = [(level, x) for level, *both in levels for x in both]
        return [*logits, *ctx.teacher_features.items()]

    @pytest.mark.parametrize("scale", [1.0, 2.0])
    def test_a_teachers_padding_has_no_influence(self, scale):
        """Also where the assistant has learned to look at the teacher."""
        found = []
        for spoiler in (0.0, float("nan")):
            head = self.head()
            nn.init.normal_(head.attention.output.weight, generator=torch.manual_seed(0))
            ctx = self.context(teacher_scale=scale)
            with torch.no_grad():
                for level, x in ctx.teacher_features.items():
                    x.masked_fill_(~ctx.teacher_valid_mask(level), spoiler)
            found.append(self.run(head, ctx)[0])
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def build(student=None, teacher=None, common=None, **node):
    infos = (
        toy_info(CHANNELS, model=student or toy_retinanet()),
        toy_info(CHANNELS + 2, model=teacher or toy_retinanet(CHANNELS + 2)),
    )
    torch.manual_seed(0)
    return build_imitation_heads(head_cfg("CSA", common, **{**SMALL, **node}), *infos)["CSA"]


def wrapper(folder, arch="RetinaNet", scale=1.0, teacher=None, student=None, **overrides):
    """A tiny student with an assistant, half of whose schedule is over at iteration 50."""
    files = kd_models.write_teacher(folder, kd_models.tiny_cfg(arch, **(teacher or {})))
    overrides = {
        "KD__CSA__DIM": 16,
        "KD__CSA__HEADS": 4,
        "SOLVER__MAX_ITER": 90,
        "KD__TEACHER__INPUT_SCALE": scale,
        **(student or {}),
        **overrides,
    }
    return kd_models.build_wrapper(kd_models.distill_cfg(files, arch, ("CSA",), **overrides))


def stir(model, std=0.05):
    """An assistant that has learned something: its output projection is not 0."""
    with torch.no_grad():
        model.heads["CSA"].attention.output.weight.normal_(
            std=std, generator=torch.Generator().manual_seed(1)
        )


# --- gradients -----------------------------------------------------------------------------------


def parts(model):
    """The columns of the gradient table."""
    student = model.student
    backbone = dict(student.backbone.named_parameters())
    head = [p for name, p in student.named_parameters() if not name.startswith("backbone.")]
    return {
        "teacher": list(model.teacher.model.parameters()),
        "student backbone": [p for n, p in backbone.items() if n.startswith("bottom_up.")],
        "neck": [p for n, p in backbone.items() if not n.startswith("bottom_up.")],
        "student head": head,
        "CSA": list(model.heads.parameters()),
    }


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("arch", ARCHS)
def test_gradient_table(arch, scale, tmp_path):
    """Which loss reaches which part: every cell."""
    model = wrapper(tmp_path, arch, scale)
    stir(model)
    model.teacher.model.requires_grad_(True)  # nothing may reach it even so
    batch = kd_models.make_batch(teacher_scale=scale)
    losses = kd_models.losses_at(model, batch, 50)
    rows = {
        "task": ([k for k in losses if "csa" not in k], "student backbone, neck, student head"),
        "aux": ([k for k in losses if k.startswith("loss_aux_csa")], "CSA"),
        "cls": (["loss_kd_csa_cls"], "student backbone, neck, student head"),
        "box": (["loss_kd_csa_box"], "student backbone, neck, student head"),
    }
    if arch == "GeneralizedRCNN":
        rows["rpn"] = (["loss_kd_csa_rpn"], "student backbone, neck, student head")
    assert {key for keys, _ in rows.values() for key in keys} == set(losses)
    for row, (keys, reached) in rows.items():
        for column, parameters in parts(model).items():
            gradients = torch.autograd.grad(
                sum(losses[key] for key in keys), parameters, retain_graph=True, allow_unused=True
            )
            found = any(g is not None and bool(g.any()) for g in gradients)
            assert found == (column in reached.split(", ")), f"{row}: {column}"
            if not found and (row == "aux" or column in ("teacher", "CSA")):
                assert all(g is None for g in gradients), f"{row}: {column} is in the graph"


@pytest.mark.parametrize("arch", ARCHS)
def test_one_backward_pass_of_the_sum_is_as_good_as_two(arch, tmp_path):
    model = wrapper(tmp_path, arch)
    stir(model)
    losses = kd_models.losses_at(model, kd_models.make_batch(), 50)
    auxiliary = sum(v for k, v in losses.items() if k.startswith("loss_aux"))
    others = sum(v for k, v in losses.items() if not k.startswith("loss_aux"))
    for loss, group in ((auxiliary, model.heads), (others, model.student)):
        alone = torch.autograd.grad(loss, list(group.parameters()), retain_graph=True)
        together = torch.autograd.grad(
            auxiliary + others, list(group.parameters()), retain_graph=True
        )
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# --- the first step, and the student's own state -------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_at_its_start_the_assistant_says_what_the_student_says(arch, tmp_path):
    model = wrapper(tmp_path, arch)
    with EventStorage(50) as storage:
        ctx, losses = model.observe(kd_models.make_batch())
        head, predictor = model.heads["CSA"], predictor_for(model.student)
        assigned = predictor.assign(ctx)
        ours, theirs = predictor.student(ctx), predictor.predict(head.assist(ctx), assigned)
        own = head(ctx)
        assert any(name.startswith("assistant/") for name in storage.latest())
    if arch == "RetinaNet":
        pairs = zip(ours.logits + ours.box_maps, theirs.logits + theirs.box_maps, strict=True)
        # the same anchors and labels: the same loss, by the same normaliser
        for name, loss in losses.items():
            torch.testing.assert_close(own[f"loss_aux_csa_{name.removeprefix('loss_')}"], loss)
    else:
        pairs = list(zip(ours.stages[0], theirs.stages[0], strict=True))
        pairs += zip(ours.proposals.logits, theirs.proposals.logits, strict=True)
        for name in ("cls", "box_reg"):  # the proposal network samples its anchors anew
            torch.testing.assert_close(own[f"loss_aux_csa_{name}"], losses[f"loss_{name}"])
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    scheduled = {key: loss for key, loss in own.items() if key.startswith("loss_kd")}
    for loss in scheduled.values():
        assert loss.item() == pytest.approx(0, abs=1e-6)
    sum(scheduled.values()).backward()
    gradients = [p.grad for p in model.student.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() and g.abs().max() < 1e-4 for g in gradients)


@pytest.mark.parametrize("arch", ARCHS)
def test_in_mixed_precision_its_head_rounds_as_the_students_does(arch, tmp_path):
    """In fp32 it would differ from the student by rounding before it has learned anything."""
    model = wrapper(tmp_path, arch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = kd_models.losses_at(model, kd_models.make_batch(), 50)
    sum(losses.values()).backward()
    for key, loss in losses.items():
        if key.startswith("loss_kd"):
            assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0, abs=1e-6)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_running_statistics_and_normalisers_are_the_students_alone(arch, tmp_path):
    """A step with an assistant leaves every buffer as a step without one does."""
    norm = {"MODEL__RETINANET__NORM": "BN", "MODEL__ROI_BOX_HEAD__NORM": "BN"}
    norm["MODEL__ROI_BOX_HEAD__NUM_CONV"] = 1
    norm["MODEL__ROI_BOX_HEAD__CONV_DIM"] = 8
    model = wrapper(tmp_path, arch, student=norm)
    stir(model)
    plain = kd_models.build(kd_models.tiny_cfg(arch, **norm)).train()
    plain.load_state_dict(model.student.state_dict())
    for step in range(2):
        torch.manual_seed(0)  # proposals are drawn
        kd_models.losses_at(model, kd_models.make_batch(seed=step), step)
        torch.manual_seed(0)
        kd_models.losses_at(plain, kd_models.make_batch(seed=step), step)
    ours, theirs = dict(model.student.named_buffers()), dict(plain.named_buffers())
    assert any("head" in name and "running_mean" in name for name in ours)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=name)
    assert getattr(model.student, "loss_normalizer", 0) == getattr(plain, "loss_normalizer", 0)
    assert "_ema_update" not in vars(model.student)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("arch", ARCHS)
def test_odd_sizes_and_other_widths(arch, scale, tmp_path):
    teacher = {"MODEL__FPN__OUT_CHANNELS": 24}
    model = wrapper(tmp_path, arch, scale, teacher=teacher)
    stir(model)
    for sizes in (((61, 73), (45, 40)), ((33, 32),)):
        for boxes in (2, 0):
            batch = kd_models.make_batch(sizes, boxes, teacher_scale=scale)
            losses = kd_models.losses_at(model, batch, 89)
            sum(losses.values()).backward()
            assert all(loss.isfinite() for loss in losses.values())
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


# --- levels, rates, idleness ---------------------------------------------------------------------


def test_levels_without_an_assistant_are_the_students():
    head, ctx = build(LEVELS=("p4",)), prediction_context(channels=(CHANNELS, CHANNELS + 2))
    nn.init.normal_(head.attention.output.weight)
    features = head.assist(ctx)
    for level, x in ctx.student_features.items():
        assert torch.equal(features[level], x) == (level != "p4")
        assert not features["p3"].requires_grad
    assert set(head.attention.sources) == {"p4"}


def test_boxes_are_taught_where_an_object_is_assigned_only():
    head, ctx = build(), prediction_context(channels=(CHANNELS, CHANNELS + 2))
    nn.init.normal_(head.attention.output.weight)
    predictor = predictor_for(ctx.student)
    with EventStorage():
        loss = head(ctx)["loss_kd_csa_box"]
        labels = torch.stack(predictor.assign(ctx).labels)
    gradients = torch.autograd.grad(loss, ctx.student_outputs["dense"].boxes)
    taught = torch.cat(flatten_cells(gradients, 4), dim=1).any(2)
    positive = (labels >= 0) & (labels < predictor.num_classes)
    assert positive.any() and torch.equal(taught, positive)


def test_rates_of_the_config():
    strides = {"p3": 8, "p4": 16}
    assert read_rates([], strides, 2.0) == {"p3": (16, 8), "p4": (8, 4)}
    assert read_rates([["p4", 2, 1, 1]], strides, 1.0) == {"p3": (8, 4), "p4": (2, 1, 1)}
    head = build(RATES=[["p3", 2, 2, 1, 1]])
    assert [source.rate for source in head.attention.sources["p3"]] == [2, 2, 1, 1]
    larger = build(common={"TEACHER": {"INPUT_SCALE": 2.0}})
    assert [source.rate for source in larger.attention.sources["p3"]] == [16, 8]


def test_while_idle_it_has_no_gradient_and_does_not_step():
    head = build(IDLE_ITERS=3)
    assert [head.aux_active(i) for i in range(5)] == [False] * 3 + [True] * 2
    for iteration in (2, 3):
        ctx = prediction_context(channels=(CHANNELS, CHANNELS + 2))
        ctx.iteration = iteration
        head.zero_grad()
        with EventStorage():
            sum(head(ctx).values()).backward()
        gradients = [p.grad for p in head.parameters()]
        assert all(g is not None for g in gradients), "DDP waits for each"
        assert any(g.any() for g in gradients) == (iteration == 3)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"RATES": [["p9", 2, 1]]}, "KD.CSA.RATES: .*p9.*p3, p4, p5"),
        ({"RATES": [["p3", 0]]}, "KD.CSA.RATES: .*integers from 1 on"),
        ({"RATES": [["p3", 1.5]]}, "KD.CSA.RATES"),
        ({"RATES": [["p3"]]}, "KD.CSA.RATES"),
        ({"RATES": ["p3"]}, "KD.CSA.RATES"),
        ({"RATES": [["p3", 4, 2, 1]]}, "KD.CSA.HEADS is 4.*p3 has 3"),
        ({"HEADS": 0}, "KD.CSA.HEADS"),
        ({"DIM": 18}, "KD.CSA.DIM is 18.*HEADS"),
        ({"DIM": 20, "POSITIONS": True}, "KD.CSA.DIM is 20.*POSITIONS"),
        ({"IDLE_ITERS": -1}, "KD.CSA.IDLE_ITERS"),
        ({"PRESET": "best"}, "KD.CSA.PRESET.*paper, balanced"),
        ({"LEVELS": ("p7",)}, "KD.CSA.LEVELS"),
    ],
)
def test_wrong_keys(node, words):
    with pytest.raises(ConfigError, match=words):
        build(**node)


def test_detectors_that_it_cannot_work_with():
    with pytest.raises(ConfigError, match=r"CSA does not work .*GeneralizedRCNN.*RetinaNet"):
        build_imitation_heads(head_cfg("CSA"), toy_info(), toy_info())
    student = toy_retinanet()
    student.head_in_features = ["p3", "p4"]
    assert build(student).levels == ("p3", "p4")
    with pytest.raises(ConfigError, match=r"KD.CSA.LEVELS.*p5 not among.*predicts from: p3, p4"):
        build(student, LEVELS=("p4", "p5"))
    teacher = toy_retinanet(CHANNELS + 2)
    teacher.backbone.output_shape()["p4"] = ShapeSpec(channels=3, stride=16)
    with pytest.raises(ConfigError, match=r"teacher's differ in width: p3 8, p4 3, p5 8"):
        build(teacher=teacher)


def test_teachers_of_another_family_are_as_good(tmp_path):
    """The assistant reads a teacher's features alone: any classes, anchors and stages."""
    files = kd_models.write_teacher(tmp_path, kd_models.tiny_cfg("GeneralizedRCNN"))
    settings = {"KD__CSA__DIM": 16, "KD__CSA__HEADS": 4, "SOLVER__MAX_ITER": 90}
    model = kd_models.build_wrapper(kd_models.distill_cfg(files, "RetinaNet", ("CSA",), **settings))
    stir(model)
    assert model.heads["CSA"].levels == ("p3", "p4", "p5"), "not the levels of the top blocks"
    losses = kd_models.losses_at(model, kd_models.make_batch(), 50)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
