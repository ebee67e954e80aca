"""The decoupler of SDF: one residual bottleneck, seen at several dilations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..functional.sdf import embed, group_norm


class MaskedGroupNorm(nn.GroupNorm):
    """GroupNorm of up to 32 groups of at least four channels, over the cells inside a mask."""

    def __init__(self, channels: int):
        groups = (g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 4)
        super().__init__(next(groups, 1), channels)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """See :func:`~projects.kd.functional.sdf.group_norm`."""
        return group_norm(x, self.num_groups, self.weight, self.bias, mask)


class ScaleDecoupler(nn.Module):
    """One residual bottleneck, seen at several dilations with the same weights.

    ``E(u) = concat_r LN(phi_r(relu(u + g_r(u))))`` with g_r = 1x1, 3x3 of dilation r, 1x1, each
    followed by a norm, the first two by a ReLU as well. Dilations, sharing and concatenation as a
    public summary of the paper has them; widths, norm and the form of phi are ours.

    Args:
        channels: C of the input.
        width: channels inside of the bottleneck.
        embed_dim: D of each branch's projection phi_r, which is not shared.
        dilations: r.
        normalise: False leaves LN out.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        embed_dim: int,
        dilations: Sequence[int] = (1, 2, 3),
        normalise: bool = True,
    ):
        super().__init__()
        self.dilations = tuple(dilations)
        self.normalise = normalise
        self.reduce = nn.Conv2d(channels, width, 1, bias=False)
        self.reduce_norm = MaskedGroupNorm(width)
        self.middle = nn.Conv2d(width, width, 3, bias=False)
        self.middle_norm = MaskedGroupNorm(width)
        self.expand = nn.Conv2d(width, channels, 1, bias=False)
        self.expand_norm = MaskedGroupNorm(channels)
        self.project = nn.ModuleList(
            nn.Linear(channels, embed_dim, bias=False) for _ in self.dilations
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embed the cells of a map.

        Args:
            x: (N, C, H, W), finite outside of the mask too.
            mask: (N, 1, H, W) bool; cells outside are no neighbours and count in no norm, and what
                the result holds there means nothing. None = all cells.

        Returns:
            (N, R * D, H, W).
        """
        reduced = F.relu(self.reduce_norm(self.reduce(x), mask))  # the same for all branches
        if mask is not None:
            reduced = reduced * mask
        branches = []
        for rate in self.dilations:
            inner = F.conv2d(reduced, self.middle.weight, padding=rate, dilation=rate)
            inner = F.relu(self.middle_norm(inner, mask))
            branches.append(F.relu(x + self.expand_norm(self.expand(inner), mask)))
        return embed(branches, [phi.weight for phi in self.project], self.normalise)
