"""The decoder of ICD: finds encoded instances in the teacher's features.

Shapes: Q instances of all images together, L tokens of one image, M heads of d channels, (C, h, w)
the valid cells of one level.
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
        tokens: Sequence[Sequence[torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor, list[list[Read]]]:
        """Decode the instances of all images.

        Args:
            vectors: (Q, E) encoded instances, image after image.
            counts: instances of each image.
            tokens: per image the levels (C, h, w), valid cells only.

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
        tokens: Sequence[Sequence[torch.Tensor]],
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

    def keys(self, levels: Sequence[torch.Tensor], position: torch.Tensor) -> torch.Tensor:
        """(L, M, d) keys: ``W_k (tokens + W_p P)``.

        P of a cell is its encoded row beside its encoded column, so its part of the key is a sum
        of one vector a row and one a column: two small products in place of one over all tokens.
        """
        by_row, by_column = (self.key.weight @ position).split(AXIS_FEATURES, dim=1)
        parts = []
        for level in levels:
            _, h, w = level.shape
            keys = F.linear(level.flatten(1).T, self.key.weight).unflatten(0, (h, w))
            table = (AXIS_FEATURES, keys.device, keys.dtype)
            keys.add_(F.linear(sine_table(h, *table), by_row)[:, None])
            keys.add_(F.linear(sine_table(w, *table), by_column))
            parts.append(keys.flatten(0, 1))
        return torch.cat(parts).unflatten(1, (self.heads, -1))


def project(linear: nn.Linear, levels: Sequence[torch.Tensor], heads: int) -> torch.Tensor:
    """(L, M, d) projection of the cells of all levels (C, h, w), row after row."""
    parts = [F.linear(level.flatten(1).T, linear.weight, linear.bias) for level in levels]
    return torch.cat(parts).unflatten(1, (heads, -1))


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
