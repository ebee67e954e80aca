"""The decoder of ICD: finds encoded instances in the teacher's features.

Shapes: Q instances of all images together, L tokens of one image (the cells of all its levels), M
heads of d channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..functional.icd import POINT_FEATURES, SCALE_BINS, sine_table

AXIS_FEATURES = 128  # of a token's encoded row, and of its column


class Read(NamedTuple):
    """What a layer read in one image: queries (Q_n, M, d), keys and values (L, M, d)."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class Cells(NamedTuple):
    """The cells of one level that lie in one image.

    Attributes:
        feature: (C, H, W), with the padding of the batch below and to the right.
        size: (h, w) of the part that is the image.
    """

    feature: torch.Tensor
    size: tuple[int, int]


class InstanceDecoder(nn.Module):
    """Queries from encoded instances, attention over the teacher's tokens, and a prediction.

    Instances do not see one another. Source: released code of ICD.

    Args:
        num_classes: length of the class one-hot.
        channels: C of the teacher.
        dim: width, shared by ``heads`` attention heads.
        layers: number of :class:`DecoderLayer`.
        ffn_dim: width of their feed-forward part.
    """

    def __init__(
        self, *, num_classes: int, channels: int, dim: int, heads: int, layers: int, ffn_dim: int
    ):
        super().__init__()
        self.encoder = _mlp(num_classes + 2 * (POINT_FEATURES + SCALE_BINS), dim, dim)
        # added to the tokens where keys are made of them
        self.position = nn.Linear(2 * AXIS_FEATURES, channels, bias=False)
        self.layers = nn.ModuleList(
            DecoderLayer(channels, dim, heads, ffn_dim) for _ in range(layers)
        )
        self.predictor = _mlp(dim, dim, 5)

    def forward(
        self,
        vectors: torch.Tensor,
        counts: Sequence[int],
        tokens: Sequence[Sequence[Cells]],
    ) -> tuple[torch.Tensor, torch.Tensor, list[list[Read]]]:
        """Decode the instances of all images.

        Args:
            vectors: (Q, E) encoded instances, image after image.
            counts: instances of each image.
            tokens: per image the cells of each level.

        Returns:
            (Q,) logits of "is in the image"; (Q, 4) relative distances to the left, top, right and
            bottom side; per layer and image what was read.
        """
        x = self.encoder(vectors)
        reads = []
        for layer in self.layers:
            x, read = layer(x, counts, tokens, self.position.weight)
            reads.append(read)
        predicted = self.predictor(x)
        return predicted[:, 0], predicted[:, 1:].sigmoid(), reads


class DecoderLayer(nn.Module):
    """Attention, norm, feed-forward, norm (post-norm, no dropout).

    A bias of the keys, or of the position embedding, would add the same to all logits of a query
    and cancel in the softmax; there is none (the released code has both).

    Args:
        channels: C of the teacher.
        dim: width, shared by ``heads`` attention heads.
        ffn_dim: width of the feed-forward part.
    """

    def __init__(self, channels: int, dim: int, heads: int, ffn_dim: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(channels, dim, bias=False)
        self.value = nn.Linear(channels, dim)
        self.out = nn.Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))
        self.ffn_norm = nn.LayerNorm(dim)
        for projection in (self.query, self.key, self.value):  # as of one packed projection
            bound = math.sqrt(6 / (projection.in_features + 3 * dim))
            nn.init.uniform_(projection.weight, -bound, bound)
        for projection in (self.query, self.value, self.out):
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        x: torch.Tensor,
        counts: Sequence[int],
        tokens: Sequence[Sequence[Cells]],
        position: torch.Tensor,
    ) -> tuple[torch.Tensor, list[Read]]:
        """One layer; see :meth:`InstanceDecoder.forward`.

        Images are attended to one after the other, each with its own numbers of instances and
        tokens: nothing is spent on padding, and the fused kernel needs no mask.

        Args:
            x: (Q, dim).
            counts, tokens: as there.
            position: (C, 2 * AXIS_FEATURES) weight of the position embedding.
        """
        queries = self.query(x).unflatten(1, (self.heads, -1))
        reads = [
            Read(own, self.keys(levels, position), project(self.value, levels, self.heads))
            for own, levels in zip(queries.split(list(counts)), tokens, strict=True)
        ]
        x = self.attention_norm(x + self.out(torch.cat([attend(*read) for read in reads])))
        return self.ffn_norm(x + self.ffn(x)), reads

    def keys(self, levels: Sequence[Cells], position: torch.Tensor) -> torch.Tensor:
        """(L, M, d) keys: ``W_k (tokens + W_p P)``.

        P of a cell is its encoded row beside its encoded column, so its part of the key is a sum
        of one vector a row and one a column: two small products in place of one over all tokens.
        """
        by_row, by_column = (self.key.weight @ position).split(AXIS_FEATURES, dim=1)
        parts = []
        for cells in levels:
            keys = _CellLinear.apply(*cells, self.key.weight, None).unflatten(0, cells.size)
            table = (AXIS_FEATURES, keys.device, keys.dtype)
            rows = F.linear(sine_table(cells.size[0], *table), by_row)
            columns = F.linear(sine_table(cells.size[1], *table), by_column)
            parts.append((keys + rows[:, None]).add_(columns).flatten(0, 1))
        return torch.cat(parts).unflatten(1, (self.heads, -1))


def project(linear: nn.Linear, levels: Sequence[Cells], heads: int) -> torch.Tensor:
    """(L, M, d) projection of the cells of all levels, row after row."""
    parts = [_CellLinear.apply(*cells, linear.weight, linear.bias) for cells in levels]
    return torch.cat(parts).unflatten(1, (heads, -1))


class _CellLinear(torch.autograd.Function):
    """A linear layer on the cells of one level, (h * w, C'), that keeps the feature map alone.

    Where a batch has padding, the cut-out cells are a copy; it is made again for the backward pass.
    """

    @staticmethod
    def forward(ctx, feature, size, weight, bias):
        ctx.save_for_backward(feature, weight)
        ctx.size = size
        cells = _cut(feature, size)
        return cells @ weight.T if bias is None else torch.addmm(bias, cells, weight.T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        feature, weight = ctx.saved_tensors
        of_feature = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_feature = (weight.T @ gradient.T).unflatten(1, ctx.size)
            if feature.shape[1:] != ctx.size:
                rows, columns = (a - b for a, b in zip(feature.shape[1:], ctx.size, strict=True))
                of_feature = F.pad(of_feature, (0, columns, 0, rows))
        if ctx.needs_input_grad[2]:
            of_weight = gradient.T @ _cut(feature, ctx.size)
        if ctx.needs_input_grad[3]:
            of_bias = gradient.sum(0)
        return of_feature, None, of_weight, of_bias


def _cut(feature: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(h * w, C) cells; a view where nothing is cut off."""
    return feature[:, : size[0], : size[1]].flatten(1).T


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(Q, M * d) attention read-out of (Q, M, d) queries over (L, M, d) keys and values."""
    queries, keys, values = (x.transpose(0, 1)[None] for x in (queries, keys, values))
    result = F.scaled_dot_product_attention(queries, keys, values)
    return result[0].transpose(0, 1).flatten(1)


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, out),
    )
