"""DIST keeps to the contract; what it compares, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from kd_testing import CHANNELS, head_cfg, toy_info, toy_retinanet
from prediction_contract import DenseContract, prediction_context

from projects.kd.errors import ConfigError
from projects.kd.functional.dist import relation_losses
from projects.kd.heads import build_imitation_heads


class TestDIST(DenseContract):
    name = "DIST"
    tolerance = 1e-5

    def student_leaves(self, ctx, head):
        """Logits alone."""
        found = zip(ctx.student_features, ctx.student_outputs["dense"].logits, strict=True)
        return [(level, x) for level, x in found if level in head.levels]


def build(teacher=None, **node):
    infos = [toy_info(CHANNELS, model=x) for x in (toy_retinanet(), teacher or toy_retinanet())]
    return build_imitation_heads(head_cfg("DIST", **node), *infos)["DIST"]


@pytest.mark.parametrize("mask_padding", [True, False])
def test_rows_are_cells_and_columns_classes_of_anchors(mask_padding):
    ctx = prediction_context()
    head = build(MASK_PADDING=mask_padding, WEIGHT=2.0, INTER_WEIGHT=3.0, INTRA_WEIGHT=0.5)
    losses = head(ctx)
    expected = torch.zeros(2)
    sides = (x["dense"].logits for x in (ctx.student_outputs, ctx.teacher_outputs))
    for level, *pair in zip(ctx.student_features, *sides, strict=True):
        rows = [x.sigmoid().permute(0, 2, 3, 1).flatten(0, 2) for x in pair]
        if mask_padding:
            rows = [x[ctx.valid_mask(level).flatten()] for x in rows]
        expected += torch.stack(relation_losses(*rows))
    torch.testing.assert_close(losses["loss_kd_dist_inter"], 6.0 * expected[0])
    torch.testing.assert_close(losses["loss_kd_dist_intra"], 1.0 * expected[1])


def test_a_batch_without_ground_truth_will_do():
    ctx = prediction_context()
    ctx.gt = None
    assert not build().needs_boxes
    assert all(x.isfinite() for x in build()(ctx).values())


def test_wrong_keys_and_other_classes_are_refused():
    with pytest.raises(ConfigError, match="KD.DIST.INTRA_WEIGHT is -2"):
        build(INTRA_WEIGHT=-2.0)
    teacher = toy_retinanet()
    teacher.num_classes = 3
    with pytest.raises(ConfigError, match="KD.DIST: the student has 2 classes and the teacher 3"):
        build(teacher=teacher)
