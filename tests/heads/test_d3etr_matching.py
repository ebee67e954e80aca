"""Which of the student's queries D3ETR pairs with which of the teacher's."""

import numpy as np
import pytest
import torch
from heads.test_d3etr import RAGGED, build, models, pairs_of
from kd_detr import LEVEL, detr_context

from projects.kd.errors import TrainingError
from projects.kd.functional.set_prediction import assign
from projects.kd.functional.set_targets import Targets, to_matches
from projects.kd.heads import d3etr as d3etr_module


def test_a_copy_of_the_teacher_matches_itself_in_every_layer():
    student, teacher = models(same=True)
    ctx = detr_context(student, teacher, same=True, **RAGGED)
    head = build(student, teacher, AUX_DET_WEIGHT=0.0)
    for pairs in pairs_of(head, ctx):
        assert torch.equal(pairs.student, pairs.teacher)
        assert torch.equal(pairs.student, torch.arange(8).expand(2, 8))
    losses = head(ctx)
    assert all(abs(loss.item()) < 1e-5 for loss in losses.values())
    # L1 has a kink at 0, so the gradients of the boxes are left out
    smooth = losses["loss_kd_d3etr_self"] + losses["loss_kd_d3etr_cross"]
    smooth.backward()
    assert ctx.student_features[LEVEL].grad.abs().max() < 1e-5


def test_matching_finds_a_permutation_of_the_queries():
    student, teacher = models(same=True)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        student.query_embed.weight.copy_(teacher.query_embed.weight[order])
    ctx = detr_context(student, teacher, same=True, **RAGGED)
    head = build(student, teacher, FIXED=False)
    for pairs in pairs_of(head, ctx):
        assert torch.equal(pairs.teacher, order[pairs.student])
    assert all(abs(loss.item()) < 1e-4 for loss in head(ctx).values())


def test_only_the_teachers_best_queries_are_matched():
    student, teacher = models()
    ctx = detr_context(student, teacher, **RAGGED)
    head = build(student, teacher, MATCH={"TOPK": 3})
    scores = ctx.teacher_outputs["decoded"].logits.sigmoid().amax(-1)
    for k, pairs in enumerate(pairs_of(head, ctx)):
        assert pairs.student.shape == (2, 3)
        for image in range(2):
            best = set(scores[k, image].topk(3).indices.tolist())
            assert set(pairs.teacher[image].tolist()) == best


def test_all_assignments_of_a_step_take_one_copy(monkeypatch):
    student, teacher = models()
    ctx = detr_context(student, teacher, **RAGGED)
    head = build(student, teacher)
    calls = []

    def counted(costs, what):
        calls.append(len(costs))
        return assign(costs, what)

    monkeypatch.setattr(d3etr_module, "assign", counted)
    head(ctx)
    assert calls == [2 * 2 + 2 * 2], "two layers of two images, adaptive and ground truth"


def test_nan_in_a_cost_is_a_clear_error():
    student, teacher = models()
    with torch.no_grad():
        teacher.class_embed.bias[0] = float("nan")
    ctx = detr_context(student, teacher, **RAGGED)
    with pytest.raises(TrainingError, match="KD.D3ETR: the cost matrix"):
        build(student, teacher)(ctx)


@pytest.mark.parametrize(("where", "replaced"), [("last", [1]), ("all", [0, 1])])
def test_the_teachers_assignment_is_used_where_it_should(where, replaced):
    student, teacher = models()
    ctx = detr_context(student, teacher, **RAGGED)
    head = build(student, teacher, AUX_ASSIGN_LAYERS=where, AUX_DET_WEIGHT=0.5)
    theirs = ctx.teacher_outputs["decoded"]
    second = head.second_group(ctx, ctx.student_outputs["decoded"])
    targets = Targets.of(ctx.gt, torch.device("cpu"))
    criterion = student.criterion
    own = assign(criterion.costs(second.logits, second.boxes, targets))
    other = assign(criterion.costs(theirs.logits, theirs.boxes, targets))
    assert not all(np.array_equal(a, b) for a, b in zip(own, other, strict=True))
    chosen = [other[i] if i // 2 in replaced else own[i] for i in range(4)]
    losses = criterion.losses(second.logits, second.boxes, targets, to_matches(chosen, targets))
    expected = 0.5 * sum(value.sum() for value in losses.values())
    torch.testing.assert_close(head(ctx)["loss_kd_d3etr_aux"], expected)
    plain = criterion.losses(second.logits, second.boxes, targets, to_matches(own, targets))
    assert not torch.isclose(expected, 0.5 * sum(value.sum() for value in plain.values()))
