"""Pairing of levels, the shared canvas, and the padding of a batch."""

import kd_models
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList
from torch import nn

from projects.kd import ConfigError
from projects.kd.levels import (
    canvas_size,
    common_divisibility,
    default_levels,
    padded_to,
    pair_levels,
    scaled_divisibility,
    scaled_size,
)


class Backbone(nn.Module):
    """Shapes without layers."""

    def __init__(self, divisibility=32, **strides):
        super().__init__()
        self.size_divisibility = divisibility
        self.strides = strides

    def output_shape(self):
        return {level: ShapeSpec(channels=8, stride=s) for level, s in self.strides.items()}


@pytest.fixture(scope="module")
def backbones():
    return {
        arch: kd_models.build(kd_models.tiny_cfg(arch)).backbone
        for arch in ("RetinaNet", "GeneralizedRCNN")
    }


def test_equal_detectors_share_all_levels(backbones):
    for arch, levels in (("RetinaNet", "34567"), ("GeneralizedRCNN", "23456")):
        expected = {f"p{level}": f"p{level}" for level in levels}
        pairs = pair_levels([], backbones[arch], backbones[arch])
        assert pairs == expected
        assert list(pairs) == list(expected), "finest first"


def test_top_block_levels_of_different_kinds_are_not_paired(backbones):
    # RetinaNet's p6 is a convolution of res5, R-CNN's p6 a subsampled p5
    common = {"p3": "p3", "p4": "p4", "p5": "p5"}
    assert pair_levels([], backbones["RetinaNet"], backbones["GeneralizedRCNN"]) == common
    assert pair_levels([], backbones["GeneralizedRCNN"], backbones["RetinaNet"]) == common


def test_pairs_go_by_stride_and_not_by_name():
    student = Backbone(fine=4, coarse=16)
    teacher = Backbone(p2=4, p3=8, p4=16)
    assert pair_levels([], student, teacher) == {"fine": "p2", "coarse": "p4"}


def test_level_map_wins_and_is_sorted_by_stride():
    student, teacher = Backbone(p3=8, p4=16), Backbone(p2=4, p3=8, p4=16)
    pairs = pair_levels([["p4", "p3"], ["p3", "p2"]], student, teacher)
    assert list(pairs.items()) == [("p3", "p2"), ("p4", "p3")]


@pytest.mark.parametrize(
    ("level_map", "side", "level"),
    [([["p9", "p3"]], "student", "p9"), ([["p3", "p8"]], "teacher", "p8")],
)
def test_unknown_levels_of_a_map_are_named(level_map, side, level):
    with pytest.raises(ConfigError, match=rf"KD\.LEVEL_MAP: the {side} has no level {level}; .*p3"):
        pair_levels(level_map, Backbone(p3=8), Backbone(p3=8))


def test_no_shared_level_lists_both_sides():
    with pytest.raises(ConfigError) as error:
        pair_levels([], Backbone(p3=8), Backbone(res5=32))
    for part in ("KD.LEVEL_MAP", "share no level", "p3 (stride 8)", "res5 (stride 32)"):
        assert part in str(error.value)


def test_canvas_is_the_one_of_image_list():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        sizes = [tuple(x) for x in torch.randint(1, 90, (3, 2), generator=generator).tolist()]
        images = [torch.zeros(3, *size) for size in sizes]
        for divisibility in (0, 1, 32, 48):
            expected = ImageList.from_tensors(images, divisibility).tensor.shape[-2:]
            assert canvas_size(sizes, divisibility) == tuple(expected)
        square = ImageList.from_tensors(
            images, 32, padding_constraints={"square_size": 128, "size_divisibility": 32}
        )
        assert canvas_size(sizes, 32, 128) == tuple(square.tensor.shape[-2:])


def test_common_divisibility():
    class Resizable(Backbone):
        size_divisibility = property(lambda self: self._size_divisibility, lambda self, value: None)

    resizable = Resizable(p3=8)
    resizable._size_divisibility = 32
    assert common_divisibility(resizable, 48) == 96
    assert common_divisibility(resizable, 1) == 32
    assert common_divisibility(Backbone(0, p3=8), 1) == 1
    assert common_divisibility(Backbone(32, p3=8), 16) == 32
    assert common_divisibility(Backbone(32, p3=8), 48) == 32, "the teacher pads further"
    deaf = Backbone(32, p3=8)
    deaf._size_divisibility = 32  # as SimpleFeaturePyramid: nothing reads it
    assert common_divisibility(deaf, 48) == 32 and deaf._size_divisibility == 32
    with pytest.raises(ConfigError, match=r"KD\.TEACHER\.INPUT_SCALE.* 48.* 32"):
        common_divisibility(Backbone(32, p3=8), 48, scale=2.0)


def test_padding_is_raised_inside_and_restored_after(backbones):
    backbone = backbones["RetinaNet"]
    assert backbone.size_divisibility == 32
    with padded_to(backbone, 64):
        assert backbone.size_divisibility == 64
    assert backbone.size_divisibility == 32
    with pytest.raises(ZeroDivisionError), padded_to(backbone, 64):
        raise ZeroDivisionError
    assert backbone.size_divisibility == 32
    with padded_to(Backbone(32, p3=8), 32):
        pass  # nothing to change, so a backbone without the attribute will do


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((3, 5), 0.5, (2, 3)),
        ((25, 33), 1.5, (38, 50)),
        ((1, 2), 0.1, (1, 1)),
        ((7, 9), 2, (14, 18)),
    ],
)
def test_sizes_are_rounded_halves_up(size, scale, expected):
    assert scaled_size(size, scale) == expected


SAME = {"p3": (8, 8), "p7": (128, 128)}
SHIFTED = {"p3": (8, 16), "p6": (64, 128)}


@pytest.mark.parametrize(
    ("scale", "strides", "padding", "expected"),
    [
        (1.0, SAME, 32, 32),
        (1.0, {"p3": (8, 24)}, 48, 48),  # at scale 1 nothing but the teacher's own rule
        (2.0, SAME, 32, 128),
        (2.0, {"p3": (8, 8), "p5": (32, 32)}, 32, 32),
        (3.0, SAME, 32, 128),
        (0.5, SAME, 32, 256),
        (2.0, SHIFTED, 32, 64),  # level l of the student with l + 1 of the teacher: equal grids
        (1.5, {"p3": (16, 24)}, 24, 16),
        (1 / 3, {"p3": (8, 8)}, 8, 24),
    ],
)
def test_grids_are_exact_multiples_on_the_smallest_canvas(scale, strides, padding, expected):
    found = scaled_divisibility(scale, strides, padding)
    assert found == expected

    def fits(side):
        theirs = round(scale * side)
        return (
            abs(theirs - scale * side) < 1e-6
            and theirs % padding == 0
            and all(side % a == 0 and theirs % b == 0 for a, b in strides.values())
        )

    if scale != 1:
        assert next(side for side in range(1, 10**4) if fits(side)) == found


@pytest.mark.parametrize("scale", [1.3, 1.5, 0.75, 2.001, 3.14159])
def test_scales_whose_grids_cannot_match_are_refused(scale):
    with pytest.raises(
        ConfigError, match=r"^KD\.TEACHER\.INPUT_SCALE .*p3.*KD\.LEVEL_MAP"
    ) as error:
        scaled_divisibility(scale, SAME, 32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [0.0, -2.0, float("nan"), float("inf")])
def test_scales_that_are_not_positive_are_refused(scale):
    with pytest.raises(ConfigError, match=r"^KD\.TEACHER\.INPUT_SCALE is .*positive"):
        scaled_divisibility(scale, SAME, 32)


def test_levels_that_no_detection_head_reads_are_not_distilled_by_default():
    pairs = {"p3": "p3", "p4": "p4", "p5": "p5"}
    student, teacher = nn.Module(), nn.Module()
    assert default_levels(pairs, student, teacher) == ["p3", "p4", "p5"]  # neither says
    student.head_in_features = ["p3", "p4"]
    assert default_levels(pairs, student, teacher) == ["p3", "p4"]
    teacher.proposal_generator, teacher.roi_heads = nn.Module(), nn.Module()
    teacher.proposal_generator.in_features = ["p4", "p5"]
    assert default_levels(pairs, student, teacher) == ["p4"]
    teacher.roi_heads.mask_in_features = ("p3",)
    assert default_levels(pairs, student, teacher) == ["p3", "p4"]
    student.head_in_features = ["p9"]  # nothing would be left
    assert default_levels(pairs, student, teacher) == ["p3", "p4", "p5"]


def test_a_head_takes_the_levels_that_are_read_unless_others_are_named(tmp_path):
    teacher = kd_models.write_teacher(tmp_path)
    cut = {"MODEL__RETINANET__IN_FEATURES": ["p3", "p4", "p5", "p6"]}
    cut["MODEL__ANCHOR_GENERATOR__SIZES"] = [[16], [32], [64], [128]]
    cfg = kd_models.distill_cfg(teacher, **cut)
    assert kd_models.build_wrapper(cfg).heads["Mimic"].levels == ("p3", "p4", "p5", "p6")
    cfg.KD.LEVELS = ("p7", "p3")
    assert kd_models.build_wrapper(cfg).heads["Mimic"].levels == ("p3", "p7")


def test_wrong_levels_are_named_with_the_map_and_with_the_key_that_no_head_reads(tmp_path):
    cfg = kd_models.distill_cfg(kd_models.write_teacher(tmp_path))
    cfg.KD.LEVEL_MAP, cfg.KD.MIMIC.LEVELS = [["p3", "p4"]], ("p4",)
    with pytest.raises(ConfigError, match=r"p4 not among .* share by KD\.LEVEL_MAP: p3"):
        kd_models.build_wrapper(cfg)
    cfg.KD.LEVEL_MAP, cfg.KD.LEVELS = [], ("p9",)  # Mimic has levels of its own
    with pytest.raises(ConfigError, match=r"^KD\.LEVELS: p9 not among"):
        kd_models.build_wrapper(cfg)
