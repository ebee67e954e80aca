"""DIST on the regions of two-stage detectors: values, stages, and what it refuses."""

import pytest
import torch
from kd_regions import region_context, region_info, toy_rcnn
from kd_testing import CHANNELS, head_cfg
from modern_inputs import rows

from projects.kd.errors import ConfigError
from projects.kd.functional.dist import relation_losses
from projects.kd.heads import build_imitation_heads
from projects.kd.heads.region_logits import RegionLogits


def build(student=None, teacher=None, **node):
    infos = (region_info(toy_rcnn() if x is None else x) for x in (student, teacher))
    return build_imitation_heads(head_cfg("DIST", **node), *infos)["DIST"]


def test_golden_numbers_through_the_head(monkeypatch):
    student, teacher, classes = rows()
    monkeypatch.setattr(RegionLogits, "read", lambda self, ctx: [(student, teacher, classes)])
    losses = build(WEIGHT=2.0, INTRA_WEIGHT=3.0)(None)
    assert losses["loss_kd_dist_inter"].item() == pytest.approx(2 * 0.89324808, abs=2e-8)
    assert losses["loss_kd_dist_intra"].item() == pytest.approx(6 * 0.91681243, abs=5e-8)


def test_stages_are_averaged(monkeypatch):
    student, teacher, classes = rows()
    stages = [(student, teacher, classes), (teacher, 2 * student, classes)]
    monkeypatch.setattr(RegionLogits, "read", lambda self, ctx: stages)
    found = build()(None)
    for name, place in (("inter", 0), ("intra", 1)):
        terms = [relation_losses(a.softmax(1), b.softmax(1))[place] for a, b, _ in stages]
        torch.testing.assert_close(found[f"loss_kd_dist_{name}"], sum(terms) / 2)


def test_rows_are_the_students_regions_in_both_detectors():
    student, teacher = toy_rcnn(), toy_rcnn(CHANNELS + 2, seed=1)
    ctx = region_context(student, teacher)
    head = build(student, teacher)
    losses = head(ctx)
    with torch.no_grad():
        heads = teacher.roi_heads
        boxes = [x.proposal_boxes for x in ctx.student_outputs["sampled_proposals"]]
        pooled = heads.box_pooler(list(ctx.teacher_features.values()), boxes)
        target, _ = heads.box_predictor(heads.box_head(pooled))
    logits, _ = ctx.student_outputs["box"]
    expected = relation_losses(logits.softmax(1), target.softmax(1))
    torch.testing.assert_close(tuple(losses.values()), expected)
    sum(losses.values()).backward()
    assert logits.grad.any() and all(p.grad is None for p in teacher.parameters())
    assert all(x.grad is None for x in ctx.teacher_features.values())


@pytest.mark.parametrize("count", [0, 1])
def test_a_step_with_less_than_two_regions(count):
    student = toy_rcnn()
    ctx = region_context(student, student, count, sizes=((64, 64),), boxes=0)
    losses = build(student, student)(ctx)
    sum(losses.values()).backward()
    assert losses["loss_kd_dist_intra"] == 0.0 and ctx.student_outputs["box"][0].grad is not None
    assert bool(losses["loss_kd_dist_inter"] > 0) == bool(count)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"LEVELS": ("p3",)}, "KD.DIST.LEVELS: regions are compared"),
        ({"MASK_PADDING": True}, "KD.DIST.MASK_PADDING: regions have no padding"),
        ({"INTER_WEIGHT": -2.0}, "KD.DIST.INTER_WEIGHT"),
    ],
)
def test_wrong_keys(node, words):
    with pytest.raises(ConfigError, match=words):
        build(**node)
