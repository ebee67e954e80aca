"""D3ETR's random queries (KD-DETR): the group keeps to the contract; forms, layers, refusals."""

import pytest
import torch
from head_contract import HeadContract
from kd_detr import detr_context, info, toy_detr
from kd_testing import CHANNELS, head_cfg

from projects.kd.errors import ConfigError
from projects.kd.functional.d3etr import prediction_loss
from projects.kd.functional.kd_detr import kd_detr_loss, random_queries
from projects.kd.heads import build_imitation_heads
from projects.kd.seeding import STEP, seed_generators

ALONE = {"ADAPTIVE": False, "FIXED": False, "RANDOM": 6}
RAGGED = {"sizes": ((40, 56), (64, 33)), "canvas": (64, 64)}


def models(wide=False, layers=2):
    teacher = {"dim": 24} if wide else {}
    return toy_detr(seed=0), toy_detr(CHANNELS + 4 * wide, seed=1, layers=layers, **teacher)


def build(student, teacher, **node):
    cfg = head_cfg("D3ETR", **{**ALONE, **node})
    return build_imitation_heads(cfg, info(student), info(teacher))["D3ETR"].train()


def run(head, ctx):
    seed_generators(STEP, 0, 0, 0, 0)
    return HeadContract.run(head, ctx)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("form", "loss"), [("d3etr", prediction_loss), ("kd_detr", kd_detr_loss)])
def test_both_sides_decode_the_same_queries_from_their_own_memories(wide, form, loss):
    student, teacher = models(wide)
    ctx = detr_context(student, teacher, **RAGGED)
    head = build(student, teacher, PRED_FORM=form, WEIGHT=2.0)
    losses, total = run(head, ctx)
    assert list(losses) == ["loss_kd_d3etr_pred"]
    seed_generators(STEP, 0, 0, 0, 0)
    queries = random_queries(teacher.query_embed.weight, 6)
    own = queries if head.adapter_queries is None else head.adapter_queries(queries)
    assert (head.adapter_queries is None) != wide
    ours = student.decode(ctx.student_outputs["decoded"].memory, own)
    with torch.no_grad():
        theirs = teacher.decode(ctx.teacher_outputs["decoded"].memory, queries)
    expected = 2 * loss(ours.logits, ours.boxes, theirs.logits, theirs.boxes).sum()
    torch.testing.assert_close(total, expected)
    total.backward()
    assert ctx.student_features["p4"].grad.any() and ctx.teacher_features["p4"].grad is None
    assert all(p.grad is None for p in teacher.parameters())
    assert student.query_embed.weight.grad is None, "the student's own queries are not distilled"
    if wide:
        assert head.adapter_queries.weight.grad.any()


def test_the_group_adds_to_the_others_terms():
    student, teacher = models()
    ctx = detr_context(student, teacher, **RAGGED)
    alone, others, joint = (
        run(build(student, teacher, **node), ctx)[0]
        for node in ({}, {"FIXED": True, "RANDOM": 0}, {"FIXED": True})
    )
    for name, loss in joint.items():
        expected = others[name] + alone.get(name, 0.0)
        torch.testing.assert_close(loss, expected)


def test_equal_detectors_give_zero_and_draws_differ_from_step_to_step():
    student, teacher = toy_detr(seed=0), toy_detr(seed=0)
    ctx = detr_context(student, teacher, same=True, **RAGGED)
    assert run(build(student, teacher), ctx)[1].item() == pytest.approx(0, abs=1e-5)
    student, teacher = models()
    head, ctx = build(student, teacher), detr_context(student, teacher, **RAGGED)
    first, again = run(head, ctx)[1], run(head, ctx)[1]
    seed_generators(STEP, 0, 1, 0, 0)
    assert first == again != head(ctx)["loss_kd_d3etr_pred"]


@pytest.mark.parametrize(("layers", "expected"), [("layer_map", [1, 3]), ("last", [3, 3])])
def test_layers_that_are_compared(layers, expected):
    student, teacher = models(layers=4)
    ctx = detr_context(student, teacher, **RAGGED)
    head = build(student, teacher, LAYERS=layers)
    decoded = ctx.student_outputs["decoded"], ctx.teacher_outputs["decoded"]
    assert head.layers_of(*decoded) == expected
    assert run(head, ctx)[1].isfinite()


def test_without_boxes_and_without_annotations():
    student, teacher = models()
    ctx = detr_context(student, teacher, boxes=0, **RAGGED)
    head = build(student, teacher)
    assert not head.needs_boxes
    ctx.gt = None
    assert run(head, ctx)[1] > 0


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"RANDOM": 0}, "KD.D3ETR: ADAPTIVE and FIXED are both False and RANDOM is 0"),
        ({"RANDOM": -1}, "KD.D3ETR.RANDOM is -1"),
        ({"RANDOM_LAW": "uniform"}, "KD.D3ETR.RANDOM_LAW.*teacher, normal"),
        ({"LAYERS": "first"}, "KD.D3ETR.LAYERS.*layer_map, last"),
        ({"PRED_FORM": "l2"}, "KD.D3ETR.PRED_FORM.*d3etr, kd_detr"),
        ({"LOSS": {"PRED": 0.0}}, "KD.D3ETR.LOSS.PRED is 0, and random queries"),
    ],
)
def test_wrong_keys(node, words):
    with pytest.raises(ConfigError, match=words):
        build(*models(), **node)
