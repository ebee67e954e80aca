"""The parts of SDF against loops, other implementations and finite differences."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from kd_testing import wave

from projects.kd.functional.sdf import embed, group_norm, normalise_cells, spread

# image sizes in cells on a grid of 4 x 5
EXTENTS = ((3, 5), (4, 2), (1, 1))


def make_mask():
    mask = torch.zeros(3, 1, 4, 5, dtype=torch.bool)
    for image, (rows, columns) in enumerate(EXTENTS):
        mask[image, :, :rows, :columns] = True
    return mask


def parameters(channels):
    return wave("student", channels), wave("teacher", channels)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_masked_group_norm_is_that_of_the_image_alone(groups):
    values, (weight, bias) = wave("teacher", 3, 6, 4, 5), parameters(6)
    found = group_norm(values, groups, weight, bias, make_mask())
    for image, (rows, columns) in enumerate(EXTENTS):
        alone = values[image : image + 1, :, :rows, :columns]
        expected = F.group_norm(alone, groups, weight, bias, 1e-5)
        torch.testing.assert_close(found[image : image + 1, :, :rows, :columns], expected)
    everything = torch.ones(3, 1, 4, 5, dtype=torch.bool)
    torch.testing.assert_close(
        group_norm(values, groups, weight, bias, everything),
        group_norm(values, groups, weight, bias),
    )


def test_gradient_of_the_masked_group_norm():
    values = wave("student", 2, 4, 3, 2).requires_grad_()
    weight, bias = (x.requires_grad_() for x in parameters(4))
    mask = torch.ones(2, 1, 3, 2, dtype=torch.bool)
    mask[0, :, 1:] = False

    def inside(*args):
        return group_norm(*args[:1], 2, *args[1:], mask) * mask

    assert torch.autograd.gradcheck(inside, (values, weight, bias))
    inside(values, weight, bias).square().sum().backward()
    assert not values.grad.masked_select(~mask).any()


def test_an_image_without_cells_gives_the_bias():
    values, (weight, bias) = wave("student", 1, 4, 2, 2), parameters(4)
    found = group_norm(values, 2, weight, bias, torch.zeros(1, 1, 2, 2, dtype=torch.bool))
    assert torch.equal(found, bias[None, :, None, None].expand_as(found))


def test_cells_are_normalised_over_their_channels():
    values = wave("teacher", 2, 5, 3, 4)
    found = normalise_cells(values)
    for n, y, x in itertools.product(range(2), range(3), range(4)):
        cell = values[n, :, y, x]
        deviation = ((cell - cell.mean()).square().mean() + 1e-5).sqrt()
        torch.testing.assert_close(found[n, :, y, x], (cell - cell.mean()) / deviation)


@pytest.mark.parametrize("normalise", [True, False])
def test_embedding_concatenates_the_projected_branches(normalise):
    branches = [wave("student", 2, 3, 2, 2), wave("teacher", 2, 3, 2, 2)]
    weights = [wave("teacher", 4, 3), wave("student", 4, 3)]
    found = embed(branches, weights, normalise)
    assert found.shape == (2, 8, 2, 2)
    for index, (branch, weight) in enumerate(zip(branches, weights, strict=True)):
        expected = torch.einsum("dc,nchw->ndhw", weight, branch)
        expected = normalise_cells(expected) if normalise else expected
        torch.testing.assert_close(found[:, 4 * index : 4 * index + 4], expected)


def test_spread_is_the_deviation_over_cells():
    values, mask = wave("teacher", 3, 6, 4, 5), make_mask()
    cells = values.permute(0, 2, 3, 1)[mask[:, 0]]
    expected = cells.var(0, unbiased=False).mean().sqrt()
    torch.testing.assert_close(spread(values, mask), expected)
    torch.testing.assert_close(spread(values, torch.ones_like(mask)), spread(values))
    constant = torch.ones(2, 6, 4, 5) * torch.arange(6.0)[:, None, None]
    assert spread(constant) < 1e-6, "the same in every cell"
    assert spread(values[:1, :, :1, :1]) == 0 == spread(values, torch.zeros_like(mask))
