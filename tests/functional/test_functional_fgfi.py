"""FGFI's masks against a loop over boxes and anchors, its convolution against the dense one."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from kd_testing import random_boxes, wave

from projects.kd.analysis.measure import peak_bytes
from projects.kd.functional.fgfi import (
    AnchorGrid,
    anchor_masks,
    best_ious,
    conv3x3_at,
    gather_cells,
    grid_masks,
    imitation_error,
)

OCTAVE = [2 ** (k / 3) for k in range(3)]
GOLDEN_BOXES = torch.tensor([[10.0, 12, 42, 40], [30, 4, 94, 60], [70, 40, 80, 52]])


def make_grids(sizes, strides, maps, ratios=(0.5, 1.0, 2.0), offset=0.0):
    """Grids of detectron2's anchors, and its generator."""
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[list(ratios)], strides=list(strides), offset=offset
    )
    grids = [
        AnchorGrid(shapes, stride, size, offset)
        for shapes, stride, size in zip(generator.cell_anchors, strides, maps, strict=True)
    ]
    return grids, generator


def golden_grids():
    sizes = [[32 * x for x in OCTAVE], [64 * x for x in OCTAVE]]
    return make_grids(sizes, (8, 16), [(8, 12), (4, 6)])


def retinanet_grids():
    sizes = [[side * x for x in OCTAVE] for side in (32, 64, 128, 256, 512)]
    maps = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    return make_grids(sizes, (8, 16, 32, 64, 128), maps)


def loop_ious(box, grid):
    """The IoU with each anchor in Python's float64: {(row, column): [one a shape]}."""
    gx1, gy1, gx2, gy2 = box.tolist()
    start = grid.offset * grid.stride
    ious = {}
    for row in range(grid.size[0]):
        for column in range(grid.size[1]):
            ious[row, column] = []
            for ax1, ay1, ax2, ay2 in grid.shapes.tolist():
                x1, x2 = (a + start + column * grid.stride for a in (ax1, ax2))
                y1, y2 = (a + start + row * grid.stride for a in (ay1, ay2))
                width = max(min(x2, gx2) - max(x1, gx1), 0.0)
                height = max(min(y2, gy2) - max(y1, gy1), 0.0)
                shared = width * height
                both = (x2 - x1) * (y2 - y1) + (gx2 - gx1) * (gy2 - gy1)
                ious[row, column].append(shared / (both - shared))
    return ious


def loop_masks(boxes, grids, psi, per_level):
    """The definition, one box and one anchor at a time, for one image."""
    masks = [torch.zeros(grid.size, dtype=torch.bool) for grid in grids]
    for box in boxes:
        levels = [loop_ious(box, grid) for grid in grids]
        bests = [max(max(values) for values in level.values()) for level in levels]
        for mask, level, best in zip(masks, levels, bests, strict=True):
            limit = psi * (best if per_level else max(bests))
            for cell, values in level.items():
                mask[cell] |= any(value > limit for value in values)
    return masks


def assert_same(found, expected, what=""):
    for level, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"level {level} {what}"


def test_golden_maximum_ious():
    expected = [[0.777778, 0.21875], [0.719955, 0.825095], [0.117188, 0.029297]]
    found = best_ious(GOLDEN_BOXES, golden_grids()[0])
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("per_level", "counts"), [(True, [44, 24]), (False, [39, 9])])
def test_golden_mask_sizes(per_level, counts):
    masks = grid_masks([GOLDEN_BOXES], golden_grids()[0], 0.5, per_level)
    assert [int(mask.sum()) for mask in masks] == counts


def test_golden_errors_and_joint_normaliser():
    masks = grid_masks([GOLDEN_BOXES], golden_grids()[0])
    errors, cells = [], 0
    for mask in masks:
        student, teacher = (wave(n, 1, 3, *mask.shape[1:]) for n in ("student", "teacher"))
        pair = gather_cells(student, mask), gather_cells(teacher, mask)
        errors.append(imitation_error(*pair).item())
        cells += int(mask.sum())
    assert errors == pytest.approx([924.06911158, 164.69806148], rel=1e-9)
    per_level = [e / (2 * int(m.sum())) for e, m in zip(errors, masks, strict=True)]
    assert per_level == pytest.approx([11.84703989, 9.14989230], rel=1e-8)
    assert sum(errors) / (2 * cells) == pytest.approx(11.34132472, rel=1e-8)


@pytest.mark.parametrize("seed", range(12))
def test_grid_masks_equal_the_double_loop(seed):
    """Random anchors, maps, offsets and boxes; some boxes cross or leave the image."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    strides = [(4, 8), (8, 16), (8, 32)][draw(0, 3)]
    maps = [(draw(1, 9), draw(1, 12)), (draw(1, 5), draw(1, 5))]
    sizes = [[s * (1 + 5 * torch.rand((), generator=generator).item())] * 2 for s in strides]
    sizes[1] = sizes[1][:1]  # levels may differ in their number of anchors
    offset = (0.0, 0.5, 0.3)[draw(0, 3)]
    psi = (0.5, 0.1, 0.83)[draw(0, 3)]
    ratios = (0.4, 1.7)[: draw(1, 3)]
    grids, generated = make_grids(sizes, strides, maps, ratios, offset)
    boxes = random_boxes(7, 64, 96, generator, smallest=1.0)
    boxes[:2] += torch.tensor([60.0, 40, 60, 40])
    boxes[2] = torch.tensor([-50.0, -70, 300, 200])
    # exactly shifted anchors: detectron2 rounds them to fp32
    start = [
        torch.stack(torch.meshgrid(*(torch.arange(n) for n in g.size), indexing="ij"), -1).flip(-1)
        for g in grids
    ]
    anchors = [
        ((s * g.stride + offset * g.stride).double().repeat(1, 1, 2)[:, :, None] + g.shapes)
        .double()
        .flatten(0, 2)
        for s, g in zip(start, grids, strict=True)
    ]
    rounded = [level.tensor for level in generated([torch.zeros(1, 1, *m) for m in maps])]
    for exact, d2 in zip(anchors, rounded, strict=True):
        torch.testing.assert_close(exact.float(), d2, rtol=1e-6, atol=1e-4)
    for per_level in (False, True):
        expected = [mask[None] for mask in loop_masks(boxes, grids, psi, per_level)]
        assert any(mask.any() for mask in expected)
        found = grid_masks([boxes], grids, psi, per_level)
        assert_same(found, expected, f"per_level={per_level}")
        assert_same(anchor_masks([boxes], anchors, maps, psi, per_level), expected)


@pytest.mark.parametrize("per_level", [False, True])
def test_grid_and_general_masks_agree_on_large_images(per_level):
    """All IoUs with all anchors of RetinaNet at 800x1333, in float64."""
    grids, _ = retinanet_grids()
    generator = torch.Generator().manual_seed(3)
    boxes = random_boxes(12, 800, 1333, generator, smallest=6)
    anchors = []
    for grid in grids:
        rows, columns = (torch.arange(n, dtype=torch.float64) * grid.stride for n in grid.size)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        shift = torch.stack([x, y, x, y], -1)[:, :, None]
        anchors.append((shift + grid.shapes.double()).flatten(0, 2))
    found = grid_masks([boxes], grids, 0.5, per_level)
    expected = anchor_masks([boxes], anchors, [g.size for g in grids], 0.5, per_level)
    assert_same(found, expected)
    assert sum(int(mask.sum()) for mask in found) > 100


def test_general_masks_of_detectron2s_own_anchors():
    grids, generator = golden_grids()
    maps = [grid.size for grid in grids]
    anchors = [level.tensor for level in generator([torch.zeros(1, 1, *m) for m in maps])]
    masks = anchor_masks([GOLDEN_BOXES], anchors, maps)
    assert [int(mask.sum()) for mask in masks] == [39, 9]


def test_an_iou_of_exactly_half_the_best_is_left_out():
    # the box is an anchor (IoU 1); a shape of half its area inside it has IoU 1/2 exactly
    shapes = torch.tensor([[-16.0, -16, 16, 16], [-16, -8, 16, 8]])
    box = torch.tensor([[0.0, 0, 32, 32]])
    lone = AnchorGrid(shapes[1:], 32, (2, 2), 0.5)
    full = AnchorGrid(shapes[:1], 32, (2, 2), 0.5)
    for psi, selected in ((0.5, 0), (0.4999, 1)):
        first, second = grid_masks([box], [full, lone], psi)
        assert first[0].tolist() == [[True, False], [False, False]]
        assert int(second.sum()) == selected
        anchors = [
            torch.tensor([[0.0, 0, 32, 32], [32, 0, 64, 32], [0, 32, 32, 64], [32, 32, 64, 64]]),
            torch.tensor([[0.0, 8, 32, 24], [32, 8, 64, 24], [0, 40, 32, 56], [32, 40, 64, 56]]),
        ]
        assert_same(anchor_masks([box], anchors, [(2, 2)] * 2, psi), [first, second])


@pytest.mark.parametrize(("psi", "selected"), [(0.6, 1), (0.5999, 5)])
def test_neighbours_with_an_iou_of_exactly_the_limit_are_left_out(psi, selected):
    """Shifted by a quarter of its side, an anchor has IoU 0.75 / 1.25 = 0.6 with its old place."""
    grid = AnchorGrid(torch.tensor([[-16.0, -16, 16, 16]]), 8, (7, 7), 0.0)
    box = torch.tensor([[8.0, 8, 40, 40]])
    (mask,) = grid_masks([box], [grid], psi)
    assert int(mask.sum()) == selected and mask[0, 3, 3]


def test_a_batch_is_its_images_and_pieces_change_nothing():
    grids, _ = golden_grids()
    generator = torch.Generator().manual_seed(0)
    boxes = [random_boxes(n, 64, 96, generator) for n in (5, 0, 9)]
    together = grid_masks(boxes, grids)
    assert_same(grid_masks(boxes, grids, piece_bytes=1), together)
    for image, own in enumerate(boxes):
        alone = grid_masks([own], grids)
        assert_same([level[image] for level in together], [level[0] for level in alone])
    union = torch.cat(boxes)
    everything = grid_masks([union], grids)
    assert_same(everything, [level.any(0, keepdim=True) for level in together])


@pytest.mark.parametrize("per_level", [False, True])
def test_nothing_is_selected_without_area_or_contact(per_level):
    grids, generator = golden_grids()
    boxes = torch.tensor([[5.0, 5, 5, 20], [7, 7, 7, 7], [5000, 5000, 5100, 5200]])
    maps = [grid.size for grid in grids]
    anchors = [level.tensor for level in generator([torch.zeros(1, 1, *m) for m in maps])]
    for own in (boxes, boxes[:0]):
        for masks in (
            grid_masks([own], grids, 0.5, per_level),
            anchor_masks([own], anchors, maps, 0.5, per_level),
        ):
            assert not any(mask.any() for mask in masks)
            assert [tuple(mask.shape) for mask in masks] == [(1, 8, 12), (1, 4, 6)]


@pytest.mark.parametrize("per_level", [False, True])
@pytest.mark.parametrize("kind", ["random", "whole image"])
def test_masks_of_900_boxes_stay_under_64_megabytes(kind, per_level):
    grids, _ = retinanet_grids()
    boxes = random_boxes(900, 800, 1333, torch.Generator().manual_seed(0))
    if kind == "whole image":
        boxes = torch.tensor([[0.0, 0, 1333, 800]]).repeat(900, 1)
    peak = peak_bytes(lambda: grid_masks([boxes], grids, 0.5, per_level))
    assert 0 < peak < 64 * 2**20


def test_general_masks_hold_one_box_at_a_time():
    grids, generator = retinanet_grids()
    maps = [grid.size for grid in grids]
    anchors = [level.tensor for level in generator([torch.zeros(1, 1, *m) for m in maps])]
    assert sum(map(len, anchors)) == 201_600
    few, many = (
        peak_bytes(lambda n=n: anchor_masks([GOLDEN_BOXES.repeat(n, 1)], anchors, maps))
        for n in (2, 5)
    )
    assert few < 64 * 2**20 and many < 1.05 * few


def test_gather_cells_reads_in_the_order_of_the_mask():
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    for mask in (torch.rand(3, 5, 6) > 0.5, torch.zeros(3, 5, 6, dtype=torch.bool)):
        rows = gather_cells(x, mask)
        assert torch.equal(rows, x.permute(0, 2, 3, 1)[mask])
        weights = torch.randn_like(rows)
        found = torch.autograd.grad((rows * weights).sum(), x)[0]
        expected = torch.zeros(3, 5, 6, 4)
        expected[mask] = weights
        assert torch.equal(found, expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("images", [1, 2])
def test_sparse_convolution_equals_the_dense_one(images, padded, share):
    torch.manual_seed(0)
    x = torch.randn(images, 5, 7, 9, dtype=torch.float64, requires_grad=True)
    conv = torch.nn.Conv2d(5, 4, 3, padding=1).double()
    mask = torch.rand(images, 7, 9) < share
    valid = torch.ones_like(mask)
    if padded:
        valid[0, :, 6:] = False
        valid[-1, 5:] = False
        mask = mask & valid
    found = conv3x3_at(x, conv.weight, conv.bias, mask, valid if padded else None)
    expected = conv(x.masked_fill(~valid[:, None], 0.0)).permute(0, 2, 3, 1)[mask]
    torch.testing.assert_close(found, expected)
    parameters = (x, conv.weight, conv.bias)
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), parameters)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    mask = torch.rand(2, 4, 5) > 0.6

    def loss(x, weight, bias):
        return imitation_error(conv3x3_at(x, weight, bias, mask), gather_cells(teacher, mask))

    assert torch.autograd.gradcheck(loss, (x, weight, bias))


def test_sums_are_exact_enough_in_half_precision():
    """A sum over many cells that would overflow fp16."""
    student = torch.full((3000, 256), 4.0, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = imitation_error(student, torch.zeros_like(student))
        x = torch.randn(1, 8, 6, 6)
        weight, bias = torch.randn(4, 8, 3, 3), torch.randn(4)
        mask = torch.rand(1, 6, 6) > 0.5
        rows = conv3x3_at(x, weight, bias, mask)
    assert error.dtype == torch.float32 and error.item() == 16 * 3000 * 256
    torch.testing.assert_close(rows, F.conv2d(x, weight, bias, padding=1).permute(0, 2, 3, 1)[mask])


def test_scale_of_boxes_and_anchors_does_not_matter():
    """IoU has no unit: everything doubled gives the same cells."""
    generator = torch.Generator().manual_seed(5)
    boxes = random_boxes(6, 64, 96, generator)
    sizes = [[20.0, 33.0], [70.0]]
    small, _ = make_grids(sizes, (8, 16), [(8, 12), (4, 6)])
    large, _ = make_grids([[2 * x for x in s] for s in sizes], (16, 32), [(8, 12), (4, 6)])
    assert_same(grid_masks([2 * boxes], large), grid_masks([boxes], small))
    assert math.isclose(best_ious(boxes, small).max(), best_ious(2 * boxes, large).max())
