"""Heads through which CSA's assistant predicts: who trains each, where it starts, whose it is."""

from __future__ import annotations

import itertools

import kd_models
import pytest
import torch
from detectron2.utils.events import EventStorage
from heads.test_csa import TestCSA as ContractOfCSA
from heads.test_csa import build, parts, stir
from kd_detectors import detector_cfg, detector_distill_cfg, full_batch
from kd_testing import CHANNELS, toy_retinanet
from prediction_contract import prediction_context
from torch import nn

from projects.kd.analysis.assistant import AssistantDetector
from projects.kd.errors import ConfigError
from projects.kd.predict import predictor_for

SMALL = {"KD__CSA__DIM": 16, "KD__CSA__HEADS": 4, "SOLVER__MAX_ITER": 90}
FAMILIES = ["RetinaNet", "FCOS", "GFL", "Mask R-CNN", "Cascade R-CNN"]


class TestCopy(ContractOfCSA):
    node = {**ContractOfCSA.node, "HEAD": "copy"}


class TestTeacher(ContractOfCSA):
    node = {**ContractOfCSA.node, "HEAD": "teacher", "LEVELS": ("p3", "p4")}
    levels = ("p3", "p4")

    def test_floor_when_student_equals_teacher(self):
        """Without a residual it starts from what it reads, not from what the student says."""

    def test_levels_are_limited_by_the_config(self):
        """The other tests are of a head without an assistant on p5."""
        assert self.head().levels == ("p3", "p4")


def wrapper(name, teachers, head="copy", **overrides):
    """A tiny student of a family; its weights are not those that its heads were built with."""
    overrides = {**SMALL, "KD__CSA__HEAD": head, **overrides}
    model = kd_models.build_wrapper(
        detector_distill_cfg(name, teachers[name], ("CSA",), **overrides)
    )
    with torch.no_grad():  # as loading a checkpoint does
        for parameter in model.student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {
        name: kd_models.write_teacher(tmp_path_factory.mktemp("teacher"), detector_cfg(name))
        for name in FAMILIES
    }


def batch(name):
    return full_batch() if name == "Mask R-CNN" else kd_models.make_batch()


def head_modules(model, paths):
    return [p for path in paths for p in model.get_submodule(path).parameters()]


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "name"),
    [*itertools.product(["copy", "teacher"], FAMILIES), ("average", "RetinaNet")],
)
def test_which_loss_reaches_which_part(head, name, teachers):
    """Also where several stages or branches are; masks have no part in it."""
    model = wrapper(name, teachers, head)
    stir(model)
    model.teacher.model.requires_grad_(True)  # nothing may reach it even so
    losses = kd_models.losses_at(model, batch(name), 50)
    csa = model.heads["CSA"]
    columns = {k: v for k, v in parts(model).items() if k != "CSA"}
    columns["attention"] = list(csa.attention.parameters())
    columns["own head"] = list(csa.head.parameters())
    rows = {
        "loss_kd_csa": ["student backbone", "neck", "student head"],
        "loss_aux_csa": ["attention", *(["own head"] if head == "copy" else [])],
    }
    for prefix, reached in rows.items():
        total = sum(v for k, v in losses.items() if k.startswith(prefix))
        assert total > 0
        for column, parameters in columns.items():
            wanted = [p for p in parameters if p.requires_grad]
            if not wanted:
                continue
            gradients = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
            found = [g is not None and bool(g.any()) for g in gradients]
            assert any(found) == (column in reached), f"{prefix}: {column}"
            if column == "own head":
                assert all(found) == (column in reached), "every parameter of it"
    assert bool(columns["own head"]) == (head != "teacher")
    optimized = [p for p in csa.aux_parameters() if p.requires_grad]
    assert len(optimized) == len(columns["attention"]) + (
        len(columns["own head"]) if head == "copy" else 0
    )


# --- where it starts ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RetinaNet", "Cascade R-CNN"])
@pytest.mark.parametrize("head", ["copy", "average"])
def test_it_starts_from_the_weights_that_training_starts_from(head, name, teachers):
    """Not from those of the student as it was built; and then teaches nothing at first."""
    model = wrapper(name, teachers, head)
    csa = model.heads["CSA"]
    paths = predictor_for(model.student).modules
    own, mine = head_modules(model.student, paths), list(csa.head.parts.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(own, mine, strict=True))
    losses = kd_models.losses_at(model, batch(name), 50)
    assert all(torch.equal(a, b) for a, b in zip(own, mine, strict=True))
    assert all(a is not b for a, b in zip(own, mine, strict=True))
    for key, loss in losses.items():
        if key.startswith("loss_kd"):
            assert loss.item() == pytest.approx(0, abs=1e-6), key
    with torch.no_grad():
        own[0].add_(1.0)
    kd_models.losses_at(model, batch(name), 51)
    assert not torch.equal(own[0], mine[0]), "once"
    again = wrapper(name, teachers, head)
    again.heads.load_state_dict(model.heads.state_dict())
    before = [p.clone() for p in mine]
    kd_models.losses_at(again, batch(name), 52)
    if head == "copy":
        loaded = again.heads["CSA"].head.parts.parameters()
        assert all(torch.equal(a, b) for a, b in zip(before, loaded, strict=True)), "resumed"


def test_a_state_from_before_the_start_starts_anew(teachers):
    model = wrapper("RetinaNet", teachers, "copy")
    state = {k: v.clone() for k, v in model.heads.state_dict().items()}
    own, mine = (x.cls_score.bias for x in (model.student.head, model.heads["CSA"].head.parts[0]))
    kd_models.losses_at(model, batch("RetinaNet"), 0)
    with torch.no_grad():
        own.add_(1.0)
    model.heads.load_state_dict(state)
    kd_models.losses_at(model, batch("RetinaNet"), 1)
    assert torch.equal(own, mine)


def test_while_idle_a_copy_follows_the_student(teachers):
    model = wrapper("RetinaNet", teachers, "copy", KD__CSA__IDLE_ITERS=3)
    csa, student = model.heads["CSA"], model.student
    seen = []
    for iteration in range(5):
        kd_models.losses_at(model, batch("RetinaNet"), iteration)
        seen.append(torch.equal(csa.head.parts[0].cls_score.bias, student.head.cls_score.bias))
        with torch.no_grad():
            student.head.cls_score.bias.add_(0.1)
    assert seen == [True] * 4 + [False], "the last one is that of the first training iteration"


def test_the_average_counts_every_iteration_once(teachers):
    model = wrapper("RetinaNet", teachers, "average", KD__CSA__HEAD_DECAY=0.75)
    own = model.student.head.cls_score.bias
    mine = model.heads["CSA"].head.parts[0].cls_score.bias
    expected = None
    for iteration, passes in ((4, 2), (5, 1), (6, 3)):
        for _ in range(passes):
            kd_models.losses_at(model, batch("RetinaNet"), iteration)
        expected = own.detach().clone() if expected is None else 0.75 * expected + 0.25 * own
        torch.testing.assert_close(mine, expected)
        assert not mine.requires_grad
        with torch.no_grad():
            own.add_(1.0)
    model.eval()
    before = mine.clone()
    with torch.no_grad():
        model(batch("RetinaNet"))
    assert torch.equal(mine, before)


def test_batch_norms_of_the_copy_are_its_own_and_the_averages_the_students(tmp_path):
    norm = {"MODEL__RETINANET__NORM": "BN"}
    files = kd_models.write_teacher(tmp_path)
    for head, same in (("copy", False), ("average", True)):
        cfg = kd_models.distill_cfg(
            files, "RetinaNet", ("CSA",), **norm, **SMALL, KD__CSA__HEAD=head
        )
        model = kd_models.build_wrapper(cfg)
        stir(model, std=1.0)
        for iteration in (0, 1, 2):
            kd_models.losses_at(model, kd_models.make_batch(seed=iteration), iteration)
        theirs = dict(model.student.head.named_buffers())
        found = dict(model.heads["CSA"].head.parts[0].named_buffers())
        moving = [k for k in found if k.endswith("running_mean")]
        assert moving and all(torch.equal(found[k], theirs[k]) == same for k in moving)
        plain = kd_models.build(kd_models.tiny_cfg(**norm)).train()
        assert plain.state_dict().keys() == model.student.state_dict().keys()


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["copy", "average", "teacher"])
def test_after_steps_the_copy_has_learned_and_the_teacher_is_untouched(head, teachers):
    model = wrapper("RetinaNet", teachers, head)
    before = {k: v.clone() for k, v in model.teacher.model.state_dict().items()}
    kd_models.losses_at(model, batch("RetinaNet"), 50)
    state = {k: v.clone() for k, v in model.heads.state_dict().items()}
    kd_models.train_steps(model, batch("RetinaNet"), steps=3)
    after = model.teacher.model.state_dict()
    assert all(torch.equal(before[k], v) for k, v in after.items())
    moved = [k for k, v in model.heads.state_dict().items() if not torch.equal(state[k], v)]
    assert any("attention" in k for k in moved)
    own = [k for k in state if "head.parts" in k]
    assert bool(own) == (head != "teacher")
    assert all(k in moved for k in own if k.endswith("weight"))
    if head == "copy":
        pair = (
            model.heads["CSA"].head.parts[0].bbox_pred.weight,
            model.student.head.bbox_pred.weight,
        )
        assert not torch.equal(*pair), "it has its own way"


# --- the teacher's head ---------------------------------------------------------------------------


def reads_the_teacher(model, monkeypatch):
    """An attention that gives the teacher's features as they are."""
    attention = model.heads["CSA"].attention
    monkeypatch.setattr(attention, "forward", lambda level, student, teacher, mask=None: teacher)


@pytest.mark.parametrize("name", FAMILIES)
def test_on_the_teachers_own_features_it_predicts_what_the_teacher_does(
    name, teachers, monkeypatch
):
    """The targets of OutputKD; as a detector, the teacher's detections."""
    model = wrapper(name, teachers, "teacher")
    reads_the_teacher(model, monkeypatch)
    csa, predictor = model.heads["CSA"], predictor_for(model.student)
    with EventStorage(50):
        ctx, _ = model.observe(batch(name))
        assigned = predictor.assign(ctx)
        found = csa.head.predict(ctx, csa.assist(ctx), assigned)
        theirs = predictor_for(model.teacher.model)
        expected = theirs.predict(ctx.teacher_features, assigned, constant=False)
    pairs = (
        zip(found.logits + found.box_maps, expected.logits + expected.box_maps, strict=True)
        if hasattr(found, "logits")
        else zip(sum(found.stages, ()), sum(expected.stages, ()), strict=True)
    )
    for ours, target in pairs:
        torch.testing.assert_close(ours, target)
    (example,) = kd_models.make_batch(((64, 96),))
    detector = AssistantDetector(model.eval()).eval()
    with torch.no_grad():
        (ours,), (target,) = detector([example]), model.teacher.model([example])
    ours, target = ours["instances"], target["instances"]
    assert len(ours) == len(target) > 0
    torch.testing.assert_close(ours.scores, target.scores)
    torch.testing.assert_close(ours.pred_boxes.tensor, target.pred_boxes.tensor)


def test_levels_without_an_assistant_have_the_teachers_features():
    """On the student's grid, the mean of a finer teacher's cells inside its image."""
    teacher = toy_retinanet(CHANNELS + 2)
    head = build(teacher=teacher, HEAD="teacher", LEVELS=("p4",))
    ctx = prediction_context(channels=(CHANNELS, CHANNELS + 2), teacher_scale=2.0)
    features = head.assist(ctx)
    assert {x.shape[1] for x in features.values()} == {CHANNELS + 2}
    for level in ("p3", "p5"):
        fine = ctx.teacher_features[level].detach()
        inside = ctx.teacher_valid_mask(level).float()
        total, count = (nn.functional.avg_pool2d(x, 2) for x in (fine * inside, inside))
        valid = ctx.valid_mask(level)
        expected = (total / count.clamp(min=0.25)).masked_select(valid)
        torch.testing.assert_close(features[level].masked_select(valid), expected)
        assert not features[level].requires_grad
    assert features["p4"].requires_grad
    assert head.attention.output.weight.any(), "nothing to protect: it does not start at 0"


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_teacher_of_its_scales_anchors_is_accepted(scale, tmp_path):
    sizes = [[scale * x] for x in (16, 32, 64, 128, 256)]
    files = kd_models.write_teacher(
        tmp_path, kd_models.tiny_cfg(MODEL__ANCHOR_GENERATOR__SIZES=sizes)
    )
    settings = {**SMALL, "KD__CSA__HEAD": "teacher", "KD__TEACHER__INPUT_SCALE": scale}
    model = kd_models.build_wrapper(kd_models.distill_cfg(files, "RetinaNet", ("CSA",), **settings))
    losses = kd_models.losses_at(model, kd_models.make_batch(teacher_scale=scale), 50)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if scale == 2.0:
        wrong = kd_models.distill_cfg(
            files, "RetinaNet", ("CSA",), **{**settings, "KD__TEACHER__INPUT_SCALE": 1.0}
        )
        with pytest.raises(ConfigError, match=r"^KD\.CSA\.HEAD 'teacher': .*p3, p4, p5, p6, p7"):
            kd_models.build_wrapper(wrong)


@pytest.mark.parametrize(
    ("name", "teacher", "words"),
    [
        ("RetinaNet", ("FCOS", {}), "predict different things"),
        ("RetinaNet", ("RetinaNet", {"MODEL__RETINANET__NUM_CLASSES": 5}), "3 classes .* 5"),
        ("GFL", ("GFL", {"MODEL__GFL__REG_MAX": 8}), "17 bins .* 9 .*REG_MAX"),
        (
            "Mask R-CNN",
            ("Mask R-CNN", {"MODEL__ROI_BOX_HEAD__POOLER_RESOLUTION": 5}),
            r"\(7, 7\).*\(5, 5\).*POOLER_RESOLUTION",
        ),
        (
            "RetinaNet",
            ("RetinaNet", {"MODEL__ANCHOR_GENERATOR__SIZES": [[16], [32], [64], [99], [256]]}),
            "only p3, p4, p5, p7 do",
        ),
    ],
)
def test_teachers_whose_head_does_not_fit(name, teacher, words, tmp_path):
    other, changes = teacher
    files = kd_models.write_teacher(tmp_path, detector_cfg(other, **changes))
    cfg = detector_distill_cfg(name, files, ("CSA",), **SMALL, KD__CSA__HEAD="teacher")
    with pytest.raises(ConfigError, match=rf"^KD\.CSA\.HEAD 'teacher': .*{words}") as error:
        kd_models.build_wrapper(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"HEAD": "own"}, r"KD\.CSA\.HEAD: 'own'.*student, copy, average, teacher"),
        ({"HEAD": "average", "HEAD_DECAY": 1.0}, r"KD\.CSA\.HEAD_DECAY is 1\.0"),
    ],
)
def test_wrong_keys(node, words):
    with pytest.raises(ConfigError, match=words):
        build(**node)
