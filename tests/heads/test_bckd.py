"""BCKD keeps to the contract; its terms are those of the teacher's dense outputs."""

from __future__ import annotations

import pytest
import torch
from detectron2.utils.events import EventStorage
from kd_testing import CHANNELS, STRIDES, head_cfg, toy_info, toy_retinanet
from prediction_contract import DenseContract, prediction_context

from projects.kd.errors import ConfigError
from projects.kd.functional.bckd import disagreement, giou_kd, qfl_kd
from projects.kd.heads import build_imitation_heads
from projects.kd.predict.dense import decode


class TestBCKD(DenseContract):
    name = "BCKD"


def build(student=None, teacher=None, common=None, **node):
    sides = student or toy_retinanet(), teacher or toy_retinanet()
    infos = [toy_info(CHANNELS, model=model) for model in sides]
    return build_imitation_heads(head_cfg("BCKD", common, **node), *infos)["BCKD"]


def test_terms_are_those_of_the_teachers_tap_over_positives():
    ctx = prediction_context()
    with EventStorage():
        losses = build(WEIGHT=2.0, CLS_WEIGHT=3.0, BOX_WEIGHT=5.0)(ctx)
    model = ctx.student
    anchors = model.anchor_generator(list(ctx.student_features.values()))
    labels = torch.stack(model.label_anchors(anchors, ctx.gt)[0])
    parts = labels.split([len(x) for x in anchors], dim=1)
    logits, boxes, positives = [], [], torch.zeros(2)
    both = (x["dense"] for x in (ctx.student_outputs, ctx.teacher_outputs))
    ours, theirs = ([(x, y) for x, y in zip(d.logits, d.boxes, strict=True)] for d in both)
    for level, label, anchor, own, other in zip(STRIDES, parts, anchors, ours, theirs, strict=True):
        inside = ctx.valid_mask(level)
        grid = (*own[0].shape[-2:], 4)
        counted = (label >= 0).unflatten(1, grid).permute(0, 3, 1, 2) & inside
        found = (label >= 0) & (label < 2)
        positives += (found.unflatten(1, grid).permute(0, 3, 1, 2) & inside).flatten(1).sum(1)
        pair = [x.unflatten(1, (4, 2)) for x in (own[0], other[0])]
        logits.append((*pair, counted))
        decoded = [decode(x, anchor, model.box2box_transform, None) for x in (own[1], other[1])]
        boxes.append((*decoded, disagreement(*pair, counted)))
    total = positives.clamp(min=1).sum()
    assert total > 2
    torch.testing.assert_close(losses["loss_kd_bckd_cls"], 6.0 * qfl_kd(logits, total))
    torch.testing.assert_close(losses["loss_kd_bckd_box"], 10.0 * giou_kd(boxes, total))


def test_without_boxes_the_normaliser_is_one_an_image():
    ctx = prediction_context(boxes=0)
    with EventStorage():
        loss = build(MASK_PADDING=False)(ctx)["loss_kd_bckd_cls"]
    pairs = zip(
        *(x["dense"].logits for x in (ctx.student_outputs, ctx.teacher_outputs)), strict=True
    )
    levels = [(*(x.unflatten(1, (4, 2)) for x in pair), None) for pair in pairs]
    torch.testing.assert_close(loss, qfl_kd(levels, 2.0))


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"CLS_WEIGHT": -2.0}, "KD.BCKD.CLS_WEIGHT is -2"),
        ({"BOX_WEIGHT": -1.0}, "KD.BCKD.BOX_WEIGHT is -1"),
        ({"LEVELS": ("p9",)}, "KD.BCKD.LEVELS"),
    ],
)
def test_wrong_keys(node, words):
    with pytest.raises(ConfigError, match=words):
        build(**node)


def test_other_classes_and_anchors_are_refused():
    teacher = toy_retinanet()
    teacher.num_classes = 3
    with pytest.raises(ConfigError, match="KD.BCKD: the student has 2 classes and the teacher 3"):
        build(teacher=teacher)
    teacher = toy_retinanet()
    for anchors in teacher.anchor_generator.cell_anchors:
        anchors.mul_(1.3)
    with pytest.raises(ConfigError, match=r"KD.BCKD.*anchors.*MODEL.ANCHOR_GENERATOR"):
        build(teacher=teacher)
