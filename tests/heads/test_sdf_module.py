"""The module of SDF against its definition: dilations, shared and own weights, groups."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from projects.kd.heads.sdf_decoupler import MaskedGroupNorm, ScaleDecoupler


def conv3x3_loop(x, weight, rate, inside):
    """Dilated 3x3 convolution by the definition; neighbours outside of the image are 0."""
    n, _, rows, columns = x.shape
    out = torch.zeros(n, len(weight), rows, columns, dtype=x.dtype)
    for image in range(n):
        for y in range(rows):
            for x0 in range(columns):
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        v, u = y + rate * dy, x0 + rate * dx
                        if 0 <= v < rows and 0 <= u < columns and inside[image, 0, v, u]:
                            tap = weight[:, :, dy + 1, dx + 1]
                            out[image, :, y, x0] += tap @ x[image, :, v, u]
    return out


@pytest.mark.parametrize("masked", [False, True])
def test_module_equals_the_definition(masked):
    torch.manual_seed(0)
    module = ScaleDecoupler(6, 8, 5, dilations=(1, 2, 3)).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    inside = torch.ones(2, 1, 5, 4, dtype=torch.bool)
    if masked:
        inside[0, :, 3:] = inside[1, :, :, 2:] = False

    def normed(values, norm):
        return norm(values, inside)

    point = torch.einsum
    reduced = F.relu(
        normed(point("mc,nchw->nmhw", module.reduce.weight[..., 0, 0], x), module.reduce_norm)
    )
    expected = []
    for rate, phi in zip((1, 2, 3), module.project, strict=True):
        inner = conv3x3_loop(reduced, module.middle.weight, rate, inside)
        inner = F.relu(normed(inner, module.middle_norm))
        inner = point("cm,nmhw->nchw", module.expand.weight[..., 0, 0], inner)
        branch = F.relu(x + normed(inner, module.expand_norm))
        embedded = point("dc,nchw->nhwd", phi.weight, branch)
        expected.append(F.layer_norm(embedded, (5,)).permute(0, 3, 1, 2))
    found = module(x, inside if masked else None)
    torch.testing.assert_close(found * inside, torch.cat(expected, 1) * inside)


def test_the_convolutions_are_shared_and_the_projections_are_not():
    torch.manual_seed(0)
    sizes = {}
    for dilations in ((1,), (1, 2, 3), (1, 2, 3, 4)):
        module = ScaleDecoupler(16, 8, 4, dilations)
        sizes[len(dilations)] = sum(p.numel() for p in module.parameters())
    assert sizes[3] - sizes[1] == 2 * 16 * 4 and sizes[4] - sizes[3] == 16 * 4
    module, x = ScaleDecoupler(16, 8, 4), torch.randn(1, 16, 9, 9)
    before = module(x)
    parts = before.split(4, 1)
    assert not any(torch.allclose(parts[i], parts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    with torch.no_grad():
        module.middle.weight[0, 0, 0, 0] += 1.0
    changed = (module(x) - before).abs().amax((0, 2, 3)).split(4)
    assert all(part.max() > 1e-4 for part in changed), "the 3x3 is every branch's"
    with torch.no_grad():
        module.middle.weight[0, 0, 0, 0] -= 1.0
        module.project[1].weight[0] += 1.0
    changed = (module(x) - before).abs().amax((0, 2, 3)).split(4)
    assert [bool(part.max() > 1e-4) for part in changed] == [False, True, False]


@pytest.mark.parametrize(
    ("channels", "groups"), [(2048, 32), (512, 32), (128, 32), (64, 16), (40, 8), (12, 2), (7, 1)]
)
def test_groups_have_four_channels_at_least(channels, groups):
    assert MaskedGroupNorm(channels).num_groups == groups
