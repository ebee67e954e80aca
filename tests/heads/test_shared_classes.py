"""Dense heads on class outputs with a teacher that knows some of the student's classes, and others.

The oracle is a student that never had the classes which the teacher lacks.
"""

from __future__ import annotations

import copy
import dataclasses

import kd_models
import pytest
import torch
from dense_toys import toy_fcos, toy_gfl
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from kd_testing import CHANNELS, head_cfg, toy_info, toy_retinanet
from prediction_contract import prediction_context

from projects.kd.engine.inherit import inherit
from projects.kd.errors import ConfigError
from projects.kd.heads import build_imitation_heads
from projects.kd.modeling.class_layers import choose_classes
from projects.kd.predict import predictor_for
from projects.kd.shared_classes import ALL, SharedClasses

DENSE = ("OutputKD", "BCKD", "CrossKD", "DIST", "CWD", "PI")


# --- from a config: superset, another order, all in order ----------------------------------------


def rows_of_retinanet(state: dict, chosen: list[int], total: int) -> dict:
    """A RetinaNet's weights with some of its classes, one row after another (one anchor)."""
    cut = dict(state)
    for name in ("head.cls_score.weight", "head.cls_score.bias"):
        assert len(state[name]) == total
        cut[name] = torch.stack([state[name][k] for k in chosen])
    return cut


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A teacher of six classes and the same with classes 4, 2 and 5 alone, as files."""
    found = {}
    whole = kd_models.build(kd_models.tiny_cfg(MODEL__RETINANET__NUM_CLASSES=6), seed=1)
    for name, chosen in (("six", list(range(6))), ("three", [4, 2, 5])):
        cfg = kd_models.tiny_cfg(MODEL__RETINANET__NUM_CLASSES=len(chosen))
        model = kd_models.build(cfg)
        model.load_state_dict(rows_of_retinanet(whole.state_dict(), chosen, 6))
        cfg.DATASETS.TRAIN = ()  # pairs of numbers need no names
        folder = tmp_path_factory.mktemp(name)
        found[name] = kd_models.write_teacher(folder, cfg, model)
    return found


def wrapper_of(teacher, class_map, heads=DENSE):
    targets = {f"KD__{head.upper()}__TARGET": "dense" for head in ("CWD", "PI") if head in heads}
    cfg = kd_models.distill_cfg(
        teacher, heads=heads, KD__TEACHER__CLASS_MAP=class_map, DATASETS__TRAIN=(), **targets
    )
    return kd_models.build_wrapper(cfg)


def test_a_teacher_of_more_classes_is_the_teacher_without_the_others(teachers):
    batch = kd_models.make_batch(sizes=((64, 64),))
    mapped = wrapper_of(teachers["six"], [[2, 5], [0, 4], [1, 2]])
    found = kd_models.losses_at(mapped, batch)
    expected = kd_models.losses_at(wrapper_of(teachers["three"], []), batch)
    assert len([x for x in found if x.startswith("loss_kd_")]) == 10
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}
    # inheriting copies the rows of the student's classes
    inherit(mapped.student, mapped.teacher.model, ("head.",))
    reduced = torch.load(teachers["three"][1])["model"]
    assert torch.equal(mapped.student.head.cls_score.weight, reduced["head.cls_score.weight"])


def test_a_map_of_all_classes_in_order_changes_no_bit(teachers):
    batch = kd_models.make_batch(sizes=((64, 64),))
    losses = []
    for class_map in ([], [[0, 0], [1, 1], [2, 2]]):
        model = wrapper_of(teachers["three"], class_map)
        assert model.teacher.shared.get("thing_classes", ALL).known is None
        losses.append(kd_models.losses_at(model, batch))
    assert all(torch.equal(losses[0][k], losses[1][k]) for k in losses[0])
    kept = torch.load(teachers["three"][1])["model"]
    assert all(torch.equal(x, kept[k]) for k, x in model.teacher.model.state_dict().items())


def test_without_a_map_other_numbers_are_refused(teachers):
    with pytest.raises(ConfigError, match=r"3 classes and the teacher 6; .*KD.TEACHER.CLASS_MAP"):
        wrapper_of(teachers["six"], [], heads=("BCKD",))


# --- dense heads and classes that the teacher lacks ----------------------------------------------


TOYS = {"RetinaNet": (toy_retinanet, (1,)), "FCOS": (toy_fcos, (1, 4, 6)), "GFL": (toy_gfl, (0, 5))}


def known_only(maps, shared, anchors):
    """(N, A * K, H, W) to (N, A * K', H, W), channel by channel."""
    columns = [a * shared.total + k for a in range(anchors) for k in shared.known]
    return [x[:, columns].detach().clone().requires_grad_() for x in maps]


def dense_case(toy, known):
    """Sides and context of a student of K classes; and of one that has the shared ones alone."""
    student = toy(CHANNELS)
    total = student.num_classes
    shared = SharedClasses(known, total)
    anchors = student.anchor_generator.num_cell_anchors[0]
    ctx = prediction_context(toy=toy)
    for n, instances in enumerate(ctx.gt):
        instances.gt_classes = (torch.arange(len(instances)) + n) % total
    teacher = ctx.teacher.model
    choose_classes(teacher, {"thing_classes": known})
    theirs = ctx.teacher_outputs["dense"]
    theirs = dataclasses.replace(theirs, logits=known_only(theirs.logits, shared, anchors))
    ctx.teacher_outputs["dense"] = theirs
    reduced = copy.copy(ctx)
    reduced.student = copy.deepcopy(ctx.student)
    choose_classes(reduced.student, {"thing_classes": known})
    ours = ctx.student_outputs["dense"]
    reduced.student_outputs = dict(ctx.student_outputs)
    own = dataclasses.replace(ours, logits=known_only(ours.logits, shared, anchors))
    reduced.student_outputs["dense"] = own
    kept = [x[torch.tensor([k in known for k in x.gt_classes.tolist()])] for x in ctx.gt]
    assert 0 < sum(map(len, kept)) < sum(map(len, ctx.gt))
    reduced.gt = kept

    def assign(ctx_of_reduced):
        """Labels of the student with all classes: those of the others are ignored."""
        full = predictor_for(ctx.student).assign(ctx)
        place = {k: known.index(k) for k in known} | {total: len(known), -1: -1}
        labels = [
            torch.tensor([place.get(k, -1) for k in x.tolist()], dtype=x.dtype) for x in full.labels
        ]
        candidates = tuple(
            type(c)(*(part[[k in known for k in x.gt_classes.tolist()]] for part in c))
            for c, x in zip(full.candidates, ctx.gt, strict=bool(full.candidates))
        )
        return dataclasses.replace(full, labels=labels, candidates=candidates)

    predictor_for(reduced.student).assign = assign
    return shared, ctx, reduced


def dense_losses(name, ctx, shared=None):
    node = {"TARGET": "dense"} if name in ("CWD", "PI") else {}
    infos = [toy_info(CHANNELS, model=model) for model in (ctx.student, ctx.teacher.model)]
    if shared is not None:
        infos[1] = dataclasses.replace(infos[1], shared={"thing_classes": shared})
    head = build_imitation_heads(head_cfg(name, **node), *infos)[name]
    if name == "CrossKD":  # its towers have one convolution: it crosses at the levels
        assert head.depth == 0
    with EventStorage():
        return head(ctx)


@pytest.mark.parametrize(
    ("arch", "name"),
    [(arch, name) for arch in TOYS for name in DENSE] + [("GFL", "LD")],
)
def test_dense_heads_leave_out_what_the_teacher_does_not_know(arch, name):
    toy, known = TOYS[arch]
    shared, ctx, reduced = dense_case(toy, known)
    found, expected = dense_losses(name, ctx, shared), dense_losses(name, reduced)
    assert found and found.keys() == expected.keys()
    for key in found:
        assert expected[key] > 0
        torch.testing.assert_close(found[key], expected[key])
    if name == "CrossKD":
        return
    logits = ctx.student_outputs["dense"].logits
    gradients = torch.autograd.grad(sum(found.values()), logits, allow_unused=True)
    anchors = ctx.student.anchor_generator.num_cell_anchors[0]
    split = [x.unflatten(1, (anchors, shared.total)) for x in gradients if x is not None]
    others = [k for k in range(shared.total) if k not in known]
    assert all(not x[:, :, others].any() for x in split)
    assert any(x[:, :, list(known)].any() for x in split)


# --- the pieces ----------------------------------------------------------------------------------


def test_choosing_and_widening_are_inverse():
    shared = SharedClasses((1, 3), 4)
    values = torch.randn(2, 3 * 4, 2, 2)
    chosen = shared.of_anchors(values)
    assert torch.equal(chosen, values[:, [1, 3, 5, 7, 9, 11]])
    assert torch.equal(shared.of_anchors(shared.of_all_anchors(chosen)), chosen)
    assert not shared.of_all_anchors(chosen)[:, ::2].any()
    classes = torch.tensor([0, 1, 2, 3, 4])
    assert shared.lacking(classes).tolist() == [True, False, True, False, False]
    assert not shared.lacking(torch.tensor([-1]))
    assert shared.places(classes)[[1, 3, 4]].tolist() == [0, 1, 2]
    assert shared.own(torch.tensor([1, 0])).tolist() == [3, 1]
    kept, rows = shared.regions(classes, torch.arange(5))
    assert kept.tolist() == [0, 1, 2] and rows.tolist() == [1, 3, 4]
    probability = torch.randn(3, 5)
    softmax = probability.softmax(1)[:, [1, 3, 4]]
    torch.testing.assert_close(
        shared.with_background(probability).softmax(1), softmax / softmax.sum(1, keepdim=True)
    )
    for given in (values, classes):
        assert ALL.of_anchors(given) is ALL.logits(given, 0) is ALL.places(given) is given


def test_an_assistant_behind_the_teachers_head_needs_all_classes():
    student, teacher = toy_retinanet(), toy_retinanet()
    choose_classes(teacher, {"thing_classes": [1]})
    shared = {"thing_classes": SharedClasses((1,), 2)}
    infos = toy_info(model=student), dataclasses.replace(toy_info(model=teacher), shared=shared)
    with pytest.raises(ConfigError, match=r"KD.CSA.HEAD 'teacher': .*KD.TEACHER.CLASS_MAP"):
        build_imitation_heads(head_cfg("CSA", HEAD="teacher", DIM=8, HEADS=4), *infos)


def test_detections_of_a_mapped_teacher_have_the_students_numbers(teachers):
    from projects.kd.commands.evaluate.teacher import in_students_numbers

    model = wrapper_of(teachers["six"], [[2, 5], [0, 4]], heads=("BCKD",))
    batch = kd_models.make_batch(sizes=((64, 64),))
    with torch.no_grad():
        before = model.teacher.model(batch)[0]["instances"]
        in_students_numbers(model.teacher)
        after: Instances = model.teacher.model(batch)[0]["instances"]
    assert set(before.pred_classes.tolist()) == {0, 1}
    assert after.pred_classes.tolist() == [(0, 2)[k] for k in before.pred_classes.tolist()]
