"""FGD: focal and global distillation (Yang et al., CVPR 2022, arXiv 2111.11837).

Shapes: N images, C channels, (H, W) cells of a level; m = cells of an image that take part (H * W,
or those inside of a mask). Boxes are XYXY in pixels of the student's input. Formulas as in the
released code, which was executed on the inputs of the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .precision import full_precision


class FGDTerms(NamedTuple):
    """The four terms of a level, scalars without their weights, each divided by N."""

    foreground: torch.Tensor
    background: torch.Tensor
    attention: torch.Tensor
    context: torch.Tensor


def box_scales(boxes: Sequence[torch.Tensor], size: tuple[int, int], stride: int) -> torch.Tensor:
    """``max over the boxes on a cell of 1 / (cells that the box touches)``, 0 without a box.

    A box touches rows ``floor(y1 / stride)`` to ``ceil(y2 / stride)``, both included, and columns
    alike; cells outside of the map count, as published (a box over the whole map has
    ``1 / ((H + 1) (W + 1))``). Departure: published code scales boxes by map size over image size,
    which stretches them over a batch's padding; here it is the stride. Painted from the largest box
    to the smallest, so that the last value on a cell is its maximum.

    Args:
        boxes: per image (G, 4) on the CPU; G may be 0.
        size: (H, W).
        stride: pixels a cell.

    Returns:
        (N, H, W) fp32 on the CPU.
    """
    result = np.zeros((len(boxes), *size), dtype=np.float32)
    for image, own in zip(result, boxes, strict=True):
        corners = own.numpy().astype(np.float64) / stride
        low = np.floor(corners[:, :2]).astype(np.int64)
        end = np.ceil(corners[:, 2:]).astype(np.int64) + 1
        area = (end - low).prod(1)
        for k in np.argsort(-area, kind="stable"):
            (x, y), (x_end, y_end) = low[k].clip(min=0), end[k].clip(min=0)
            image[y:y_end, x:x_end] = 1.0 / area[k]
    return torch.from_numpy(result)


def background_scales(foreground: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """1 / (number of cells without a box) on these cells of an image, 0 on the others.

    Args:
        foreground: (N, H, W) of :func:`box_scales`, 0 where no box is.
        mask: (N, 1, H, W) bool, cells outside are no background; None = all count.

    Returns:
        (N, H, W); all 0 for an image that boxes cover, as published.
    """
    empty = foreground == 0
    if mask is not None:
        empty = empty & mask[:, 0]
    count = empty.sum((1, 2), keepdim=True).clamp(min=1)
    return empty.to(foreground.dtype) / count


@full_precision
def attentions(
    features: torch.Tensor, temperature: float, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spatial and channel attention of a map.

    ``A^S = m softmax_x(mean_c |F| / T)`` and ``A^C = C softmax_c(mean_x |F| / T)``; both have a
    mean of 1 over what takes part.

    Args:
        features: (N, C, H, W), 0 outside of the mask.
        temperature: T.
        mask: (N, 1, H, W) bool of the m cells, at least one an image; None = all.

    Returns:
        (N, H, W), 0 outside of the mask, and (N, C).
    """
    strength = features.abs()
    spatial = strength.mean(1).flatten(1) / temperature
    cells = _cells(features, mask)
    if mask is not None:
        spatial = spatial.masked_fill(~mask.flatten(1), float("-inf"))
    spatial = spatial.softmax(1) * cells[:, None]
    channel = strength.sum((2, 3)) / (cells[:, None] * temperature)
    return spatial.view(features[:, 0].shape), channel.softmax(1) * features.shape[1]


@full_precision
def fgd_terms(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_context: torch.Tensor,
    teacher_context: torch.Tensor,
    foreground: torch.Tensor,
    background: torch.Tensor,
    temperature: float,
    mask: torch.Tensor | None = None,
) -> FGDTerms:
    """The terms of FGD at one level.

    ::

        fg   = 1/N sum_{n,x} F A^S_T sum_c A^C_T (S - T)^2           (bg: with B for F)
        att  = 1/N (sum |A^C_S - A^C_T| + sum |A^S_S - A^S_T|)
        glob = 1/N sum (S + u_s - T - u_t)^2

    The teacher's attentions weigh fg and bg; the student's have a gradient in att alone. Sums over
    channels and cells: fg has a mass of about one a box, att and glob grow with H * W.

    The same values at less cost (ours): fg and bg are two dot products with one map (N, H, W);
    glob, published as the difference of two maps with context, is
    ``sum (S-T)^2 + 2 (u_s-u_t) . sum_x (S-T) + m |u_s-u_t|^2`` an image.

    Args:
        student: (N, C, H, W), 0 outside of the mask.
        teacher: (N, C, H, W), 0 outside of the mask; gets no gradient.
        student_context, teacher_context: u (N, C), what the context blocks add to each cell.
        foreground, background: F and B, (N, H, W); 0 outside of the mask.
        temperature: of the attentions.
        mask: (N, 1, H, W) bool, cells outside take no part (ours); None = all, as published.

    Returns:
        Scalars; all 0 for equal maps and contexts.
    """
    teacher = teacher.detach()
    spatial, channel = attentions(student, temperature, mask)
    target_spatial, target_channel = attentions(teacher, temperature, mask)
    distance = (channel - target_channel).abs().sum() + (spatial - target_spatial).abs().sum()
    weights = target_channel, target_spatial * foreground, target_spatial * background
    front, back, squares, totals = _Differences.apply(student, teacher, *weights)
    gap = student_context - teacher_context
    cells = _cells(student, mask)
    context = squares + 2 * (gap * totals).sum() + (cells * gap.square().sum(1)).sum()
    return FGDTerms(*(term / len(student) for term in (front, back, distance, context)))


def _cells(features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(N,) cells that take part."""
    if mask is not None:
        return mask.sum((1, 2, 3)).to(features.dtype)
    return features.new_full((len(features),), features[0, 0].numel())


class _Differences(torch.autograd.Function):
    """Two weighted sums of squared differences, the plain one, and (N, C) sums of differences.

    Keeps the two maps, which others keep anyway, and the small weights.
    """

    @staticmethod
    def forward(ctx, student, teacher, channel, foreground, background):
        ctx.save_for_backward(student, teacher, channel, foreground, background)
        difference = student - teacher
        totals = difference.sum((2, 3))
        squares = difference.square_().flatten(2)
        cells = (channel[:, None] @ squares).view(foreground.shape)
        return (cells * foreground).sum(), (cells * background).sum(), squares.sum(), totals

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_front, grad_back, grad_squares, grad_totals):
        student, teacher, channel, foreground, background = ctx.saved_tensors
        cells = grad_front * foreground + grad_back * background
        slope = (channel[:, :, None, None] * cells[:, None]).add_(grad_squares).mul_(2)
        slope.mul_(student - teacher).add_(grad_totals[:, :, None, None])
        return slope, None, None, None, None
