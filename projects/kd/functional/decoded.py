"""What the decoder of a detection transformer says, as heads read it.

Shapes: L decoder layers, N images, S tokens (cells of one feature map, row by row), Q queries, D
width, M attention heads, K classes (K keys of an attention); boxes (centre x, centre y, width,
height) as shares of the unpadded image. All tensors are batch first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attention:
    """What an attention map is made of; the map itself exists only when :meth:`map` is called.

    Attributes:
        query: (N, M, Q, d).
        key: (N, M, K, d).
        valid: (N, K) bool, False for keys in the padding of a batch; None = all are valid.
    """

    query: torch.Tensor
    key: torch.Tensor
    valid: torch.Tensor | None = None

    def map(self) -> torch.Tensor:
        """(N, M, Q, K) in fp32: after the softmax, before dropout; 0 at padded keys."""
        with torch.autocast(self.query.device.type, enabled=False):
            query, key = self.query.float(), self.key.float()
            logits = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
            if self.valid is not None:
                logits = logits.masked_fill(~self.valid[:, None, None], float("-inf"))
            return logits.softmax(-1)


@dataclass(frozen=True)
class Memory:
    """The encoded image, projected once for every decoder layer and all groups of queries.

    Attributes:
        keys: per decoder layer (N, M, S, 2 D / M), content and position side by side.
        values: per decoder layer (N, M, S, D / M).
        valid: (N, S) bool, None without padding.
        grid: (rows, columns), S = rows * columns.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    valid: torch.Tensor | None
    grid: tuple[int, int]


@dataclass(frozen=True)
class Decoded:
    """What the decoder says about one group of queries, in all its layers.

    Attributes:
        logits: (L, N, Q, K), before the sigmoid.
        boxes: (L, N, Q, 4) fp32.
        memory: what was attended to; another group can be decoded from it.
        self_attention, cross_attention: per layer; None unless asked for.
        autocast: precision in which it was computed, None without autocast.
    """

    logits: torch.Tensor
    boxes: torch.Tensor
    memory: Memory
    self_attention: list[Attention] | None = None
    cross_attention: list[Attention] | None = None
    autocast: torch.dtype | None = None
