"""Validity masks against brute force, scalars that heads log, and names of levels."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from torch import nn

from projects.kd import ConfigError, DistillContext, ModelInfo
from projects.kd.levels import scaled_size


def make_context(sizes, canvas, strides, **kwargs):
    features = {
        level: torch.zeros(len(sizes), 1, -(-canvas[0] // stride), -(-canvas[1] // stride))
        for level, stride in strides.items()
    }
    return DistillContext(
        iteration=0,
        image_sizes=sizes,
        canvas=canvas,
        gt=None,
        student_features=features,
        teacher_features=features,
        strides=strides,
        **kwargs,
    )


def test_masks_equal_a_loop_over_cells():
    generator = torch.Generator().manual_seed(0)
    strides = {"p3": 8, "p4": 16, "p7": 128}
    for _ in range(20):
        sizes = [tuple(x) for x in torch.randint(1, 200, (3, 2), generator=generator).tolist()]
        canvas = tuple(-(-max(s[axis] for s in sizes) // 32) * 32 for axis in (0, 1))
        ctx = make_context(sizes, canvas, strides)
        for level, stride in strides.items():
            mask = ctx.valid_mask(level)
            n, _, rows, columns = ctx.student_features[level].shape
            assert mask.shape == (n, 1, rows, columns) and mask.dtype == torch.bool
            for image, (height, width) in enumerate(sizes):
                for row in range(rows):
                    for column in range(columns):
                        # the cell's first pixel lies inside the image
                        inside = row * stride < height and column * stride < width
                        assert mask[image, 0, row, column] == inside
            assert ctx.has_padding(level) == (not mask.all())


def test_masks_are_computed_once():
    ctx = make_context([(30, 40)], (32, 64), {"p3": 8})
    assert ctx.valid_mask("p3") is ctx.valid_mask("p3")
    assert ctx.stride("p3") == 8


@pytest.mark.parametrize("size", [(56, 96), (64, 88), (57, 96), (64, 96)])
def test_padding_in_one_direction_is_seen(size):
    ctx = make_context([size, (64, 96)], (64, 96), {"p3": 8, "p4": 16})
    for level in ("p3", "p4"):
        assert ctx.has_padding(level) == (not ctx.valid_mask(level).all())
    assert ctx.has_padding("p3") == (size in ((56, 96), (64, 88)))


def test_an_unpadded_batch_is_valid_everywhere():
    ctx = make_context([(64, 96)] * 2, (64, 96), {"p3": 8, "p7": 128})
    assert ctx.valid_mask("p3").all() and ctx.valid_mask("p7").all()


@pytest.mark.parametrize("value", [torch.tensor(2.5, requires_grad=True), 2.5])
def test_scalars_are_logged_in_logging_iterations_only(value):
    with EventStorage(0) as storage:
        make_context([(8, 8)], (8, 8), {"p3": 8}).put_scalar("kd/x", value)
        assert "kd/x" not in storage.histories()
        make_context([(8, 8)], (8, 8), {"p3": 8}, log_scalars=True).put_scalar("kd/x", value)
        assert storage.latest()["kd/x"][0] == 2.5


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0, 0.5])
def test_the_teachers_masks_are_those_of_its_own_images(scale):
    generator = torch.Generator().manual_seed(0)
    strides = {"p3": 8, "p4": 16}
    for _ in range(10):
        sizes = [tuple(x) for x in torch.randint(1, 100, (3, 2), generator=generator).tolist()]
        canvas = tuple(-(-max(s[axis] for s in sizes) // 32) * 32 for axis in (0, 1))
        theirs = [scaled_size(size, scale) for size in sizes]
        ctx = make_context(sizes, canvas, strides, teacher_scale=scale)
        larger = make_context(theirs, scaled_size(canvas, scale), strides)
        ctx.teacher_features = larger.teacher_features
        for level in strides:
            mask = ctx.teacher_valid_mask(level)
            assert torch.equal(mask, larger.valid_mask(level))
            assert ctx.teacher_has_padding(level) == (not mask.all())
            assert mask is ctx.teacher_valid_mask(level)
            assert ctx.valid_mask(level).shape[-2:] == ctx.student_features[level].shape[-2:]


def test_a_teachers_own_strides_and_sizes_come_first():
    ctx = make_context([(20, 40)], (32, 64), {"p3": 8}, teacher_scale=2.0)
    ctx.teacher_features = {"p3": torch.zeros(1, 1, 4, 8)}
    ctx.teacher_strides, ctx.teacher_image_sizes = {"p3": 16}, [(33, 80)]
    assert ctx.teacher_valid_mask("p3")[0, 0].sum() == 3 * 5


def test_mask_of_a_map_over_the_canvas_equals_a_loop():
    sizes, canvas = [(20, 64), (32, 33)], (32, 64)
    ctx = make_context(sizes, canvas, {"p3": 8})
    for rows, columns in ((32, 64), (8, 16), (4, 8), (5, 7)):
        mask = ctx.canvas_mask((rows, columns))
        assert mask.shape == (2, 1, rows, columns)
        for image, (height, width) in enumerate(sizes):
            for row in range(rows):
                for column in range(columns):
                    inside = row * 32 / rows < height and column * 64 / columns < width
                    assert mask[image, 0, row, column] == inside
    assert torch.equal(ctx.canvas_mask((4, 8)), ctx.valid_mask("p3"))
    assert make_context([canvas], canvas, {"p3": 8}).canvas_mask((4, 8)) is None


def test_a_side_knows_its_own_names_of_the_paired_levels():
    shapes = {"p3": ShapeSpec(stride=8), "p4": ShapeSpec(stride=8)}  # a dilated backbone
    info = ModelInfo(nn.Module(), shapes, frozenset(), own_names={"p3": "res4", "p4": "res5"})
    assert info.paired_names(["res5", "res4"], "KD.X") == {"res5": "p4", "res4": "p3"}
    with pytest.raises(ConfigError, match="KD.LEVEL_MAP: KD.X needs .*student: p4$"):
        info.paired_names(["res4", "p4"], "KD.X")
    same = ModelInfo(nn.Module(), shapes, frozenset())
    assert same.paired_names(["p4"], "KD.X") == {"p4": "p4"}
