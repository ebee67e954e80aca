"""Mimic keeps to the contract; its masks against a loop over cells."""

import pytest
import torch
from head_contract import HeadContract
from kd_testing import head_cfg, make_context, toy_info

from projects.kd.errors import ConfigError
from projects.kd.heads import build_imitation_heads
from projects.kd.heads.mimic import box_mask


class TestMimic(HeadContract):
    name = "Mimic"


class TestMimicInBoxes(HeadContract):
    name = "Mimic"
    node = {"MASK": "gt_box"}
    may_skip_levels = True

    def context(self, boxes=3, **kwargs):
        return make_context(boxes=12 * boxes, **kwargs)

    def test_without_mask_padding_padded_cells_take_part(self):
        ctx = self.context()
        for level in ctx.student_features:
            assert not (box_mask(ctx, level) & ~ctx.valid_mask(level)).any(), "no box is in padding"


def test_box_mask_equals_a_loop_over_cells():
    ctx = make_context(boxes=4)
    for level, stride in ctx.strides.items():
        mask = box_mask(ctx, level)
        for image, instances in enumerate(ctx.gt):
            for row in range(mask.shape[2]):
                for column in range(mask.shape[3]):
                    y, x = (row + 0.5) * stride, (column + 0.5) * stride
                    inside = any(
                        x1 <= x < x2 and y1 <= y < y2
                        for x1, y1, x2, y2 in instances.gt_boxes.tensor.tolist()
                    )
                    assert mask[image, 0, row, column] == inside


def test_value_is_the_mean_over_levels():
    head = build_imitation_heads(head_cfg("Mimic"), toy_info(), toy_info())["Mimic"]
    ctx = make_context(sizes=((64, 64),), canvas=(64, 64))
    expected = [
        (ctx.student_features[level] - ctx.teacher_features[level]).square().mean()
        for level in ctx.student_features
    ]
    torch.testing.assert_close(head(ctx)["loss_kd_mimic"], torch.stack(expected).mean())


def test_unknown_mask_names_its_key():
    with pytest.raises(ConfigError, match="KD.MIMIC.MASK"):
        build_imitation_heads(head_cfg("Mimic", MASK="boxes"), toy_info(), toy_info())
