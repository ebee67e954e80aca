"""SDF: scale-decoupled feature distillation of ScaleKD (Zhu et al., CVPR 2023).

Shapes: N images, C channels, (H, W) cells of a backbone stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

EPSILON = 1e-5  # added to variances, as torch's norms do


def group_norm(
    values: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Group normalisation whose statistics are those of the cells inside a mask.

    Source: Wu and He, ECCV 2018; the mask is ours (the padding of a batch would enter the mean of
    every cell).

    Args:
        values: (N, C, H, W), finite everywhere.
        groups: divides C.
        weight, bias: (C,).
        mask: (N, 1, H, W) bool; None = all cells, torch's own function.

    Returns:
        (N, C, H, W); outside of the mask the bias.
    """
    if mask is None:
        return F.group_norm(values, groups, weight, bias, EPSILON)
    inside = mask[:, None]  # (N, 1, 1, H, W)
    grouped = values.unflatten(1, (groups, -1))
    count = inside.sum((2, 3, 4), keepdim=True).clamp(min=1) * grouped.shape[2]
    mean = (grouped * inside).sum((2, 3, 4), keepdim=True) / count
    centred = (grouped - mean) * inside
    variance = centred.square().sum((2, 3, 4), keepdim=True) / count
    normal = (centred * (variance + EPSILON).rsqrt()).flatten(1, 2)
    return normal * weight[:, None, None] + bias[:, None, None]


def normalise_cells(values: torch.Tensor) -> torch.Tensor:
    """Layer normalisation without parameters over the channels of every cell.

    Args:
        values: (N, D, H, W).

    Returns:
        The same shape, mean 0 and (biased) variance 1 over D in every cell.
    """
    last = values.permute(0, 2, 3, 1)
    return F.layer_norm(last, last.shape[-1:], eps=EPSILON).permute(0, 3, 1, 2)


def embed(
    branches: Sequence[torch.Tensor], projections: Sequence[torch.Tensor], normalise: bool
) -> torch.Tensor:
    """Project every branch, normalise it, and concatenate: ``concat_r LN(phi_r(branch_r))``.

    The normalisation is ours: without parameters and branch by branch it bounds the loss, and a
    student learned twice as much of the teacher with it in a small experiment.

    Args:
        branches: R tensors (N, C, H, W).
        projections: R weights (D, C) of the linear maps phi_r, without bias (a norm over D follows,
            and a common offset of both sides does not change their difference).
        normalise: False leaves the normalisation out.

    Returns:
        (N, R * D, H, W).
    """
    embedded = [
        F.conv2d(branch, weight[:, :, None, None])
        for branch, weight in zip(branches, projections, strict=True)
    ]
    return torch.cat([normalise_cells(x) if normalise else x for x in embedded], 1)


def spread(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How much an embedding varies from cell to cell: its standard deviation over all cells.

    Args:
        values: (N, D, H, W).
        mask: (N, 1, H, W) bool, the cells that count; None = all.

    Returns:
        Scalar: root of the variance (biased) over images and cells, averaged over channels. 0 for
        an embedding that is the same in every cell, and without cells.
    """
    if mask is None:
        return values.var((0, 2, 3), unbiased=False).mean().sqrt()
    count = mask.sum().clamp(min=1)
    mean = (values * mask).sum((0, 2, 3), keepdim=True) / count
    return (((values - mean) * mask).square().sum() / (count * values.shape[1])).sqrt()
