"""The cross-scale assistant's attention: queries of the student, keys and values of the teacher.

Shapes as in :mod:`~projects.kd.functional.csa`; C and Ct are the widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..functional.csa import attend, cell_encoding, pad_to_rate, token_mask

OWN_PLACE = 10.0  # nats by which a query's own place stands out at the start, with positions


class CrossScaleAttention(nn.Module):
    """Multi-scale cross-attention, one block for all levels (ScaleKD, CVPR 2023, as reviewed)::

        Q_i = F_student W_i^Q
        K_i = MSC(F_teacher, r_i) W_i^K,   V_i = MSC(F_teacher, r_i) W_i^V,   V_i <- V_i + P(V_i)
        out = concat_i softmax(Q_i K_i^T / sqrt d) V_i  W^O

    MSC aggregates the teacher's cells at the rate of the attention head's group: depth-wise r x r
    convolution of stride r, 1x1 convolution, layer norm, GELU; nothing at rate 1. P is a depth-wise
    3x3 convolution. Source: Shunted Transformer, from which the paper takes the block. A review's
    prose has Q and K of the teacher; its equations are the ones above, and only they give an output
    on the student's grid for any teacher resolution. Ours: MSC is depth-wise (a full 16x16
    convolution has 16.8 M weights), W^Q, W^O and P are shared by levels while MSC, W^K and W^V
    belong to a level and group, as they depend on its rate; W^O starts at 0, for a residual around
    the block.

    Args:
        student_channels, teacher_channels: C and Ct.
        rates: level to the rates of its groups of attention heads.
        dim: width of queries, keys and values.
        heads: M; every level's number of groups divides it.
        local_enhancement: False leaves P out.
        positions: add :func:`cell_encoding`, times a learned factor for each attention head, to
            queries and keys.
        output_channels: width of the result, whose W^O does not start at 0; None = C.
    """

    def __init__(
        self,
        *,
        student_channels: int,
        teacher_channels: int,
        rates: Mapping[str, Sequence[int]],
        dim: int = 256,
        heads: int = 8,
        local_enhancement: bool = True,
        positions: bool = False,
        output_channels: int | None = None,
    ):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(student_channels, dim)
        self.sources = nn.ModuleDict(
            {
                level: nn.ModuleList(
                    Source(teacher_channels, dim // len(groups), rate) for rate in groups
                )
                for level, groups in rates.items()
            }
        )
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if local_enhancement else None
        self.output = nn.Linear(dim, output_channels or student_channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if output_channels is None:
            nn.init.zeros_(self.output.weight)
        self.position_scale = None
        if positions:  # an encoding of d channels has the squared norm d / 2
            scale = (2 * OWN_PLACE / (dim // heads) ** 0.5) ** 0.5
            self.position_scale = nn.Parameter(torch.full((heads,), scale))

    def forward(
        self,
        level: str,
        student: torch.Tensor,
        teacher: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the level reads from the teacher, (N, C, H, W), or of ``output_channels``.

        Args:
            level: its name.
            student: (N, C, H, W).
            teacher: (N, Ct, Ht, Wt), any grid.
            mask: (N, 1, Ht, Wt) bool of the teacher's valid cells, None = all.
        """
        if mask is not None:
            teacher = torch.where(mask, teacher, 0.0)
        grid = student.shape[-2:]
        queries = self.query(student.flatten(2).transpose(1, 2))
        queries = queries.unflatten(2, (self.heads, -1)).transpose(1, 2)
        if self.position_scale is not None:
            queries = self._placed(queries, grid, (1.0, 1.0), self.position_scale)
        groups = self.sources[level]
        share = self.heads // len(groups)
        step = tuple(a / b for a, b in zip(grid, teacher.shape[-2:], strict=True))
        parts = []
        for index, source in enumerate(groups):
            keys, values = source(teacher)
            own = token_mask(mask, source.rate)
            values = self._enhanced(values, own, index * values.shape[1])
            size = keys.shape[-2:]
            keys, values = (_by_head(x, share) for x in (keys, values))
            part = slice(index * share, (index + 1) * share)
            if self.position_scale is not None:
                steps = tuple(x * source.rate for x in step)
                keys = self._placed(keys, size, steps, self.position_scale[part])
            parts.append(attend(queries[:, part], keys, values, own))
        read = torch.cat(parts, dim=1).transpose(1, 2).flatten(2)
        return self.output(read).transpose(1, 2).unflatten(2, grid)

    def _enhanced(self, values, mask, first: int):
        """``V + P(V)`` of channels ``first`` and following, (N, c, h, w)."""
        if self.local is None:
            return values
        part = slice(first, first + values.shape[1])
        inside = values if mask is None else torch.where(mask, values, 0.0)
        weight, bias = self.local.weight[part], self.local.bias[part]
        return values + F.conv2d(inside, weight, bias, padding=1, groups=values.shape[1])

    def _placed(self, values, grid, step, scale):
        """``values`` (N, m, T, d) with the encoding of their cells added."""
        encoding = cell_encoding(*grid, step, values.shape[-1], values)
        return values + scale[:, None, None] * encoding


class Source(nn.Module):
    """Keys and values of one group of attention heads at one level.

    Args:
        channels: Ct.
        width: of the keys, and of the values.
        rate: r.
    """

    def __init__(self, channels: int, width: int, rate: int):
        super().__init__()
        self.rate = rate
        if rate > 1:
            self.gather = nn.Conv2d(channels, channels, rate, stride=rate, groups=channels)
            self.mix = nn.Linear(channels, channels)
            self.norm = nn.LayerNorm(channels)
        self.key = nn.Linear(channels, width)
        self.value = nn.Linear(channels, width)

    def forward(self, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, both (N, width, h, w), of (N, Ct, Ht, Wt)."""
        if self.rate > 1:
            teacher = self.gather(pad_to_rate(teacher, self.rate))
        grid = teacher.shape[-2:]
        tokens = teacher.flatten(2).transpose(1, 2)
        if self.rate > 1:
            tokens = F.gelu(self.norm(self.mix(tokens)))
        keys, values = self.key(tokens), self.value(tokens)
        return tuple(x.transpose(1, 2).unflatten(2, grid) for x in (keys, values))


def _by_head(values: torch.Tensor, heads: int) -> torch.Tensor:
    """(N, m * d, h, w) to (N, m, h * w, d)."""
    return values.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)
