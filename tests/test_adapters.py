"""Channel adapters and the resizing of teacher features."""

import itertools

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from projects.kd import ConfigError, ModelInfo, build_adapters
from projects.kd.adapters import align_spatial, build_adapter


@pytest.mark.parametrize(
    ("kind", "ours", "theirs", "expected"),
    [
        ("auto", 4, 4, None),
        ("auto", 4, 6, 1),
        ("none", 4, 4, None),
        ("conv1x1", 4, 4, 1),
        ("conv1x1", 4, 6, 1),
        ("conv3x3", 4, 6, 3),
    ],
)
def test_kinds(kind, ours, theirs, expected):
    adapter = build_adapter(kind, ours, theirs)
    x = torch.randn(2, ours, 5, 7)
    if expected is None:
        assert adapter(x) is x
        assert not list(adapter.parameters())
        return
    assert isinstance(adapter, nn.Conv2d) and adapter.kernel_size == (expected, expected)
    assert adapter(x).shape == (2, theirs, 5, 7)
    assert (adapter(x) < 0).any(), "FPN outputs are signed, the adapter must reach below 0"


def test_norm_and_relu_follow_where_asked():
    adapter = build_adapter("conv1x1_bn_relu", 4, 6)
    x = torch.randn(2, 4, 5, 7)
    mapped = torch.einsum("oi,nihw->nohw", adapter[0].weight.flatten(1), x)
    var, mean = torch.var_mean(mapped, (0, 2, 3), correction=0, keepdim=True)
    expected = ((mapped - mean) / (var + adapter[1].eps).sqrt()).clamp(min=0)
    torch.testing.assert_close(adapter(x), expected, atol=1e-5, rtol=1e-4)


def test_refusals_name_the_key():
    with pytest.raises(ConfigError, match=r"^KD\.FGFI\.ADAPTER: 'conv5x5'"):
        build_adapter("conv5x5", 4, 4, "KD.FGFI.ADAPTER")
    with pytest.raises(ConfigError, match=r"^KD\.ADAPTER\.TYPE: 'none'.* 4 .* 6"):
        build_adapter("none", 4, 6)


def test_one_adapter_a_level():
    shapes = {"p3": ShapeSpec(channels=4, stride=8), "p4": ShapeSpec(channels=4, stride=16)}
    wider = {"p3": ShapeSpec(channels=4, stride=8), "p4": ShapeSpec(channels=6, stride=16)}
    ours = ModelInfo(nn.Module(), shapes, frozenset())
    theirs = ModelInfo(nn.Module(), wider, frozenset())
    adapters = build_adapters("auto", ["p3", "p4"], ours, theirs)
    assert isinstance(adapters["p3"], nn.Identity)
    assert adapters["p4"].weight.shape == (6, 4, 1, 1)


def test_equal_grids_are_not_touched():
    teacher = torch.randn(1, 3, 4, 6)
    assert align_spatial(teacher, torch.empty(1, 8, 4, 6)) is teacher


def test_whole_multiples_are_block_means():
    teacher = torch.arange(2 * 4 * 6, dtype=torch.float64).reshape(1, 2, 4, 6)
    result = align_spatial(teacher, torch.empty(1, 1, 2, 2))
    expected = torch.stack(
        [
            torch.stack([teacher[0, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((1, 2))])
            for i in range(2)
            for j in range(2)
        ],
        dim=-1,
    ).reshape(1, 2, 2, 2)
    torch.testing.assert_close(result, expected)


def test_other_sizes_are_bilinear_with_half_pixel_centres():
    teacher = torch.tensor([[[[0.0, 1.0, 2.0]]]])
    result = align_spatial(teacher, torch.empty(1, 1, 1, 2))
    # centres of the two cells lie at 0.75 and 2.25 of 3, that is 0.25 and 1.75 in cell indices
    torch.testing.assert_close(result, torch.tensor([[[[0.25, 1.75]]]]))
    larger = align_spatial(torch.tensor([[[[0.0, 1.0]]]]), torch.empty(1, 1, 1, 4))
    torch.testing.assert_close(larger, torch.tensor([[[[0.0, 0.25, 0.75, 1.0]]]]))


@pytest.mark.parametrize("wanted", [(3, 4), (2, 6), (9, 10)])
def test_cells_outside_of_the_mask_take_no_part_in_a_mean(wanted):
    """Brute force for whole multiples; a constant stays one for all sizes."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 3, 6, 12, generator=generator)
    valid = torch.zeros(2, 1, 6, 12, dtype=torch.bool)
    valid[0, :, :3, :7] = valid[1, :, :5, :] = True
    spoiled = teacher.masked_fill(~valid, float("nan"))
    result = align_spatial(spoiled, torch.zeros(2, 1, *wanted), valid)
    assert result.isfinite().all()
    constant = torch.full_like(teacher, 2.5).masked_fill(~valid, float("inf"))
    flat = align_spatial(constant, torch.zeros(2, 1, *wanted), valid)
    torch.testing.assert_close(flat[flat != 0], torch.full_like(flat[flat != 0], 2.5))
    assert (flat != 0).any()
    if 6 % wanted[0] or 12 % wanted[1]:
        return
    height, width = 6 // wanted[0], 12 // wanted[1]
    for n, row, column in itertools.product(range(2), range(wanted[0]), range(wanted[1])):
        rows = slice(row * height, (row + 1) * height)
        columns = slice(column * width, (column + 1) * width)
        inside = valid[n, 0, rows, columns]
        block = teacher[n, :, rows, columns][:, inside]
        expected = block.mean(1) if inside.any() else torch.zeros(3)
        torch.testing.assert_close(result[n, :, row, column], expected)
