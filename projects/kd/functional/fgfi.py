"""FGFI: fine-grained feature imitation near objects (Wang et al., CVPR 2019).

Shapes: N images, M boxes, S anchor shapes (all levels together), (H, W) cells of a level,
C channels, P cells in a mask. Boxes and anchors are XYXY in pixels of the network's input.

The imitation mask follows section 3 of the paper, with two departures that detectron2 imposes:
boxes span ``x2 - x1`` (the original code counts ``x2 - x1 + 1`` pixels), and there are several
levels (the paper has one; no rule for pyramids was ever published).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .precision import full_precision

# Bound of the temporaries of grid_masks, reckoned as if each box selected all rows of all levels.
GRID_PIECE_BYTES = 32 * 2**20
_BYTES_OF_ROW = 160
# anchor_masks reads its temporaries over and over: on a CPU pieces that fit the cache are faster
# (one box at a time for 200,000 anchors).
ANCHOR_PIECE_BYTES = 8 * 2**20


class AnchorGrid(NamedTuple):
    """Anchors of one level: the same shapes around every cell.

    Attributes:
        shapes: (A, 4) XYXY in pixels, around the reference point of cell (0, 0).
        stride: pixels between reference points, in both directions.
        size: (H, W).
        offset: reference point of cell (0, 0) in strides from the corner of the image.
    """

    shapes: torch.Tensor
    stride: float
    size: tuple[int, int]
    offset: float = 0.0


def grid_masks(
    boxes: Sequence[torch.Tensor],
    grids: Sequence[AnchorGrid],
    psi: float = 0.5,
    per_level: bool = False,
    piece_bytes: int = GRID_PIECE_BYTES,
) -> list[torch.Tensor]:
    """Imitation masks for anchors on regular grids.

    A cell is in the mask when one of its anchors has ``IoU > psi * best`` (strictly) with a box,
    ``best`` being that box's maximum IoU over all anchors, those that cross the border of the
    image included. A box that touches no anchor, or has no area, selects nothing.

    The overlap with the anchors of one shape is a product of two functions of one coordinate, both
    rising to a peak and falling again. So the maximum is found beside the two peaks, and the
    cells of a row that pass form an interval, whose ends are computed: the cost does not depend on
    H * W (ours). All of it is exact in float64 for fp32 boxes and anchors, and equals
    the loop over all boxes and anchors to the last bit.

    Args:
        boxes: per image (M_i, 4).
        grids: one a level.
        psi: threshold factor.
        per_level: ``best`` within each level instead of over all levels (which users of the
            original code report to hurt).
        piece_bytes: bound of the temporaries, by working through the boxes in pieces.

    Returns:
        Per level (N, H, W) bool.
    """
    device = grids[0].shapes.device
    table = _ShapeTable(grids, device)
    # number of intervals that begin, less those that end, at a cell; one column past the last cell
    areas = [len(boxes) * grid.size[0] * (grid.size[1] + 1) for grid in grids]
    steps = torch.zeros(sum(areas), dtype=torch.int32, device=device)
    table.place(areas)
    counts = torch.tensor([len(b) for b in boxes])
    image = torch.arange(len(boxes)).repeat_interleave(counts).to(device)
    everything = torch.cat([b.to(torch.float64) for b in boxes]) if len(boxes) else image
    piece = max(1, piece_bytes // (table.total_rows * _BYTES_OF_ROW))
    for start in range(0, len(image), piece):
        part = slice(start, start + piece)
        _mark_rows(steps, everything[part], image[part], table, psi, per_level)
    masks = []
    for part, grid in zip(steps.split(areas), grids, strict=True):
        rows = part.view(len(boxes), grid.size[0], grid.size[1] + 1)
        masks.append(rows.cumsum(2, dtype=torch.int32)[..., :-1] > 0)
    return masks


class _ShapeTable:
    """The anchor shapes of all levels as float64 columns (S,), with the grid of each."""

    def __init__(self, grids: Sequence[AnchorGrid], device):
        numbers = [len(grid.shapes) for grid in grids]
        self.per_level = numbers
        self.total_rows = max(1, sum(n * g.size[0] for n, g in zip(numbers, grids, strict=True)))
        facts = torch.tensor(
            [(g.stride, g.stride * g.offset, *g.size) for g in grids], dtype=torch.float64
        )
        self._numbers = torch.tensor(numbers)
        facts = facts.repeat_interleave(self._numbers, dim=0).to(device)
        shapes = torch.cat([g.shapes.to(torch.float64) for g in grids])
        self.area = (shapes[:, 2] - shapes[:, 0]) * (shapes[:, 3] - shapes[:, 1])
        self.stride = facts[:, 0]
        self.x1, self.y1, self.x2, self.y2 = (shapes + facts[:, 1:2]).T
        self.rows, self.columns = facts[:, 2], facts[:, 3]

    def place(self, areas: Sequence[int]) -> None:
        """Say where each level begins in a flat buffer."""
        starts = torch.tensor([0, *areas[:-1]]).cumsum(0).repeat_interleave(self._numbers)
        self.start = starts.to(self.stride.device)


def _overlap(low, high, other_low, other_high):
    return (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp_(min=0)


def _peak(low, high, shape_low, shape_high, stride, cells):
    """The cell of a line with the largest overlap, and that overlap.

    Overlap over position is symmetric about the place where the centres agree, so one of the two
    cells beside it is a maximum.
    """
    centre = ((low + high) - (shape_low + shape_high)) / (2 * stride)
    before = torch.minimum(centre.floor().clamp_(min=0), cells - 1)
    after = torch.minimum((centre.floor_() + 1).clamp_(min=0), cells - 1)
    first = _overlap(low, high, shape_low + before * stride, shape_high + before * stride)
    second = _overlap(low, high, shape_low + after * stride, shape_high + after * stride)
    return torch.where(second > first, after, before), torch.maximum(first, second)


def _peaks(boxes, table):
    """The best column, largest overlaps in x and in y, and sums of areas, all (m, S)."""
    x1, y1, x2, y2 = boxes.T[..., None]
    best_x, width = _peak(x1, x2, table.x1, table.x2, table.stride, table.columns)
    height = _peak(y1, y2, table.y1, table.y2, table.stride, table.rows)[1]
    return best_x, width, height, (x2 - x1) * (y2 - y1) + table.area


def best_ious(boxes: torch.Tensor, grids: Sequence[AnchorGrid]) -> torch.Tensor:
    """Each box's maximum IoU with the anchors of each level.

    Args:
        boxes: (M, 4).
        grids: one a level.

    Returns:
        (M, levels) float64.
    """
    table = _ShapeTable(grids, boxes.device)
    _, width, height, both = _peaks(boxes.to(torch.float64), table)
    iou = width * height / (both - width * height)
    return torch.stack([level.amax(1) for level in iou.split(table.per_level, 1)], dim=1)


def _mark_rows(steps, boxes, image, table, psi, per_level) -> None:
    """Add to ``steps`` the intervals of cells that the boxes (m, 4) select."""
    best_x, width, height, both = _peaks(boxes, table)
    shared = width * height
    iou = shared / (both - shared)
    if per_level:
        best = [
            part.amax(1, keepdim=True).expand_as(part) for part in iou.split(table.per_level, 1)
        ]
        limit = psi * torch.cat(best, dim=1)
    else:
        limit = (psi * iou.amax(1, keepdim=True)).expand_as(iou)

    box, shape = (iou > limit).nonzero(as_tuple=True)
    limit, both, width, best_x = (x[box, shape] for x in (limit, both, width, best_x))
    x1, y1, x2, y2 = boxes[box].T
    stride = table.stride[shape]
    # IoU > limit  <=>  intersection > needed; used for places only, the test itself stays the IoU
    needed = limit * both / (1 + limit)
    short = needed / width
    top = ((y1 + short - table.y2[shape]) / stride).floor_().clamp_(min=0)
    bottom = ((y2 - short - table.y1[shape]) / stride).ceil_()
    bottom = torch.minimum(bottom, table.rows[shape] - 1)
    many = (bottom - top + 1).clamp_(min=0).long()

    pair = torch.arange(len(many), device=many.device).repeat_interleave(many)
    ahead = many.cumsum(0) - many
    row = torch.arange(len(pair), device=many.device) - ahead[pair] + top[pair]
    at = shape[pair]
    low = row * table.stride[at]
    height = _overlap(y1[pair], y2[pair], table.y1[at] + low, table.y2[at] + low)
    shared = width[pair] * height
    passing = (shared / (both[pair] - shared) > limit[pair]).nonzero().squeeze(1)

    pair, row, height, at = pair[passing], row[passing], height[passing], at[passing]
    x1, x2, limit, both = x1[pair], x2[pair], limit[pair], both[pair]
    stride, shape_x1, shape_x2 = table.stride[at], table.x1[at], table.x2[at]

    def passes(column):
        low = column * stride
        shared = _overlap(x1, x2, shape_x1 + low, shape_x2 + low).mul_(height)
        return shared / (both - shared) > limit

    def end(guess, inwards, middle):
        # rounding may put the guess one cell off: the outermost of three that passes is the end
        between = torch.maximum if inwards < 0 else torch.minimum
        edge = table.columns[at] - 1
        outer, centre, inner = (
            torch.minimum(between(guess + k * inwards, middle).clamp_(min=0), edge)
            for k in range(3)
        )
        return torch.where(passes(outer), outer, torch.where(passes(centre), centre, inner))

    short = needed[pair] / height
    middle = best_x[pair]
    left = end(((x1 + short - shape_x2) / stride).floor_(), 1, middle)
    right = end(((x2 - short - shape_x1) / stride).ceil_(), -1, middle)
    line = image[box[pair]] * table.rows[at] + row
    line = table.start[at] + (line * (table.columns[at] + 1)).long()
    one = torch.ones((), dtype=steps.dtype, device=steps.device).expand(len(line))
    steps.index_add_(0, line + left.long(), one)
    steps.index_add_(0, line + right.long() + 1, one, alpha=-1)


def anchor_masks(
    boxes: Sequence[torch.Tensor],
    anchors: Sequence[torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    psi: float = 0.5,
    per_level: bool = False,
    piece_bytes: int = ANCHOR_PIECE_BYTES,
) -> list[torch.Tensor]:
    """:func:`grid_masks` for any anchors, by computing every IoU in the anchors' precision.

    Args:
        boxes: per image (M_i, 4).
        anchors: per level (H * W * A, 4), the anchors of a cell next to each other.
        sizes: per level (H, W).
        psi, per_level, piece_bytes: as in :func:`grid_masks`.

    Returns:
        Per level (N, H, W) bool.
    """
    lengths = [len(a) for a in anchors]
    flat = torch.cat(list(anchors))
    x1, y1, x2, y2 = flat.T
    area = (x2 - x1) * (y2 - y1)
    found = torch.zeros(len(boxes), len(flat), dtype=torch.bool, device=flat.device)
    piece = max(1, piece_bytes // max(1, len(flat) * 4 * flat.element_size()))
    for image, own in enumerate(boxes):
        for part in own.to(flat.dtype).split(piece) if len(own) else ():
            low_x, low_y, high_x, high_y = part.T[..., None]
            shared = _overlap(low_x, high_x, x1, x2).mul_(_overlap(low_y, high_y, y1, y2))
            iou = shared / ((high_x - low_x) * (high_y - low_y) + area - shared)
            levels = iou.split(lengths, 1) if per_level else [iou]
            passing = [x > psi * x.amax(1, keepdim=True) for x in levels]
            found[image] |= torch.cat(passing, 1).any(0)
    return [
        part.view(len(boxes), *size, -1).any(3)
        for part, size in zip(found.split(lengths, 1), sizes, strict=True)
    ]


def gather_cells(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Features of the cells in a mask.

    Args:
        x: (N, C, H, W).
        mask: (N, H, W) bool.

    Returns:
        (P, C) in the order of ``mask.nonzero()``; differentiable.
    """
    cells = mask.flatten(1).nonzero()
    if len(x) == 1:
        return x[0].flatten(1).index_select(1, cells[:, 1]).T
    many = mask.flatten(1).sum(1).tolist()
    rows = [
        image.flatten(1).index_select(1, index).T
        for image, index in zip(x, cells[:, 1].split(many), strict=True)
    ]
    return torch.cat(rows)


@full_precision
def conv3x3_at(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """A 3x3 convolution with zero padding, evaluated at the cells of a mask only.

    Equal to ``gather_cells(conv2d(x * valid, weight, bias, padding=1), mask)`` up to rounding; the
    9 neighbours of each cell become one row of a matrix product, so the work is P instead of
    N * H * W rows.

    Args:
        x: (N, C, H, W).
        weight: (C', C, 3, 3).
        bias: (C',).
        mask: (N, H, W) bool.
        valid: (N, H, W) bool, other cells count as 0; None = all.

    Returns:
        (P, C').
    """
    n, channels, h, w = x.shape
    # every input cell that is read becomes one row, however many neighbours read it
    near = F.max_pool2d(mask.to(x.dtype), 3, stride=1, padding=1) > 0
    if valid is not None:
        near = near & valid
    rows = gather_cells(x, near)
    rows = torch.cat([rows, rows.new_zeros(1, channels)])  # the last row stands for the outside
    number = torch.full((n, h + 2, w + 2), len(rows) - 1, device=x.device)
    number[:, 1:-1, 1:-1][near] = torch.arange(len(rows) - 1, device=x.device)
    image, y, column = mask.nonzero(as_tuple=True)
    corner = (image * (h + 2) + y) * (w + 2) + column
    shift = torch.arange(3, device=x.device)
    around = (shift[:, None] * (w + 2) + shift).flatten()
    patches = F.embedding(number.flatten()[corner[:, None] + around], rows)
    kernel = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
    return F.linear(patches.flatten(1), kernel, bias)


@full_precision
def imitation_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over cells and channels of the squared difference.

    Args:
        student: (P, C) through the adapter.
        teacher: (P, C), no gradient.

    Returns:
        Scalar. The loss is the sum of this over levels and images divided by
        ``2 * N_p``, N_p = selected cells over all levels and the whole batch; there is no division
        by channels.
    """
    return (student - teacher).square().sum()
