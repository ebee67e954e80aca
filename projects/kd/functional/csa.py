"""Multi-scale cross-attention of ScaleKD's assistant (Zhu et al., CVPR 2023): its mathematics.

Shapes: N images, (H, W) cells of the student, (Ht, Wt) of the teacher, (h, w) = ceil of these over
a rate r, M attention heads of d channels, T tokens = h * w.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

LEVEL_OF_RATE_ONE = 7  # log2 of the stride from which on the teacher's tokens are left as they are


def default_rates(stride: int, scale: float) -> tuple[int, int]:
    """Down-sampling rates of a level's two groups of attention heads.

    ``r = max(1, scale / 2 * 2^(7 - l))`` with ``2^l`` the stride, and ``max(1, r / 2)``: at strides
    8 to 128 (16, 8), (8, 4), (4, 2), (2, 1), (1, 1) for a teacher of double resolution, half of it
    for one of the student's. Ours: the published rates are not public; these keep at most some
    1000 tokens a group at 800 x 1344 pixels, and follow Shunted Transformer's pairs (r, r / 2).

    Args:
        stride: of the student's level, in its input pixels.
        scale: side of the teacher's input over that of the student's.
    """
    rate = max(1, round(scale / 2 * 2**LEVEL_OF_RATE_ONE / stride))
    return rate, max(1, rate // 2)


def pad_to_rate(values: torch.Tensor, rate: int) -> torch.Tensor:
    """Zeros below and to the right, until both sides of (N, C, Ht, Wt) are multiples of a rate."""
    bottom, right = (-side % rate for side in values.shape[-2:])
    return F.pad(values, (0, right, 0, bottom)) if bottom or right else values


def token_mask(mask: torch.Tensor | None, rate: int) -> torch.Tensor | None:
    """(N, 1, h, w) bool of tokens that see anything of the image; the others are no keys.

    A token at the border counts as long as one of its cells does, so that no row of the image is
    lost and every image has a key (ours).

    Args:
        mask: (N, 1, Ht, Wt) bool of valid cells, None = all.
        rate: r.
    """
    if mask is None or rate == 1:
        return mask
    return F.max_pool2d(pad_to_rate(mask.float(), rate), rate) > 0


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """``softmax(q k^T / sqrt d) v`` without ever holding the map [queries, keys].

    Source: the equation of multi-scale cross-attention as reviews of the paper give it (queries of
    the student, keys and values of the teacher). torch's kernels work in blocks, on a CPU as well,
    and with a mask.

    Args:
        queries: (N, M, H * W, d).
        keys, values: (N, M, T, d).
        mask: (N, 1, h, w) bool of the keys that count, None = all; each image needs one.

    Returns:
        (N, M, H * W, d).
    """
    if mask is not None:
        mask = mask.flatten(1)[:, None, None]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


def cell_encoding(
    rows: int, columns: int, step: tuple[float, float], features: int, like: torch.Tensor
) -> torch.Tensor:
    """Sines and cosines of the places of cells, for queries and keys of one level alike (ours).

    Places are counted in cells of the student's level: cell i of a grid with ``step`` s lies at
    ``(i + 1/2) s``. Wave lengths go from 4 to 1024 cells in equal ratios. The scalar product of two
    encodings is largest where the places are equal.

    Args:
        rows, columns: of the grid.
        step: of rows and of columns, in cells of the student's level.
        features: a multiple of 4; the first half encodes rows.
        like: gives type and device.

    Returns:
        (rows * columns, features).
    """
    count = features // 4
    exponents = torch.arange(count, dtype=like.dtype, device=like.device) / max(count - 1, 1)
    frequencies = 2 * math.pi / 4 * 256.0**-exponents
    axes = []
    for cells, size in zip((rows, columns), step, strict=True):
        place = (torch.arange(cells, dtype=like.dtype, device=like.device) + 0.5) * size
        angles = place[:, None] * frequencies
        axes.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    y = axes[0][:, None].expand(-1, columns, -1)
    x = axes[1][None].expand(rows, -1, -1)
    return torch.cat([y, x], dim=2).flatten(0, 1)
