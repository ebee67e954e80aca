"""Sums over cells that mean the same at every image size, for losses published as bare sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..context import DistillContext, ModelInfo
from ..errors import ConfigError

OF_LEVELS = -1.0  # KD.<HEAD>.AREA_REF: the levels' cells of an image of PUBLISHED_SIZE
PUBLISHED_SIZE = (800, 1344)  # the padded 800x1333 that published weights were made for


def add_area_key(node) -> None:
    """The key of heads with a sum over cells."""
    # The sum over cells is multiplied by AREA_REF / (cells of the batch's levels), so that a weight
    # means the same at every image size. -1 = the levels' cells at 800x1344, for which weights are
    # published (22400 for p3 to p7, 89250 for p2 to p5); 0 = the bare sum, as published.
    node.AREA_REF = OF_LEVELS


@dataclass(frozen=True)
class AreaReference:
    """The factor of a sum over the cells of all levels (ours: see :func:`add_area_key`).

    Attributes:
        cells: of the reference; 0 = factor 1, :data:`OF_LEVELS` = those of the batch's maps, were
            its canvas of :data:`PUBLISHED_SIZE`.
        masked: cells in the padding take no part, and are not counted.
    """

    cells: float
    masked: bool

    @classmethod
    def from_node(cls, node, key: str, student: ModelInfo, levels: Sequence[str]) -> AreaReference:
        """Read AREA_REF; ConfigError names ``key`` for a negative one."""
        cells = float(node.AREA_REF)
        if cells == OF_LEVELS and levels:
            strides = [student.shapes[level].stride for level in levels]
            cells = float(sum(_cells(PUBLISHED_SIZE, stride) for stride in strides))
        elif cells < 0 and cells != OF_LEVELS:
            raise ConfigError(f"{key}.AREA_REF is {cells:g}, it must be a number from 0 on, or -1")
        return cls(cells, node.MASK_PADDING)

    def of_levels(self, ctx: DistillContext, levels: Sequence[str]) -> float:
        """The factor of a sum over the student's cells of some levels."""
        if not self.cells:
            return 1.0
        if self.masked:
            count = sum(_cells(s, ctx.stride(x)) for s in ctx.image_sizes for x in levels)
            return self.cells * len(ctx.image_sizes) / count
        return self.cells / sum(ctx.student_features[x][0, 0].numel() for x in levels)

    def of_map(self, ctx: DistillContext, values: torch.Tensor) -> float:
        """The factor of a sum over a map (N, C, H, W) that covers the canvas."""
        if not self.cells:
            return 1.0
        canvas = ctx.canvas[0] * ctx.canvas[1]
        seen = canvas
        if self.masked:
            seen = sum(h * w for h, w in ctx.image_sizes) / len(ctx.image_sizes)
        if self.cells == OF_LEVELS:
            return PUBLISHED_SIZE[0] * PUBLISHED_SIZE[1] / seen
        return self.cells / (values[0, 0].numel() * seen / canvas)


def _cells(size: tuple[int, int], stride: int) -> int:
    return -(-size[0] // stride) * -(-size[1] // stride)
