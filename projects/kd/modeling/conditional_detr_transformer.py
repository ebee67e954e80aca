"""Encoder and decoder of Conditional DETR (Meng et al., ICCV 2021) with the official names.

Shapes: N images, S tokens (cells of one feature map, row by row), Q queries, D width, M attention
heads, L decoder layers. All tensors are batch first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..functional.decoded import Attention, Memory

TEMPERATURE = 10000


@dataclass(frozen=True)
class DecoderStates:
    """What the decoder makes of one group of queries.

    Attributes:
        hidden: (L, N, Q, D), each layer's output after the shared norm.
        reference: (Q, 2), (x, y) before the sigmoid, shared by images and layers.
        self_attention, cross_attention: per layer; None unless asked for.
    """

    hidden: torch.Tensor
    reference: torch.Tensor
    self_attention: list[Attention] | None
    cross_attention: list[Attention] | None


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int):
        super().__init__()
        widths = [inputs, *[hidden] * (layers - 1), outputs]
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def sine_features(position: torch.Tensor, features: int) -> torch.Tensor:
    """(..., 2) positions (x, y) in radians to (..., 2 * features): y's sines and cosines, then x's.

    Even features are sines and odd ones cosines of position / 10000^(2 floor(i / 2) / features).
    Source: the paper, and DETR's encoding of the image.
    """
    i = torch.arange(features, device=position.device)
    periods = TEMPERATURE ** (2 * torch.div(i, 2, rounding_mode="floor") / features)
    angles = position.flip(-1)[..., None] / periods
    even, odd = angles[..., 0::2].sin(), angles[..., 1::2].cos()
    return torch.stack([even, odd], dim=-1).flatten(-3)


def image_positions(valid: torch.Tensor, features: int) -> torch.Tensor:
    """Sine encoding of the cells of a feature map.

    Args:
        valid: (N, rows, columns) bool. Positions count valid cells and are divided by their number,
            so that the last valid row and column lie at 2 pi, as in DETR.
        features: number of features per axis.

    Returns:
        (N, rows * columns, 2 * features).
    """
    y, x = (valid.cumsum(axis, dtype=torch.float32) for axis in (1, 2))
    y = y / (y[:, -1:] + 1e-6) * (2 * math.pi)
    x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    return sine_features(torch.stack([x, y], dim=-1), features).flatten(1, 2)


def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(N, T, D) to (N, M, T, D / M)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class AttentionOutput(nn.Module):
    """Fused attention over projected queries, keys and values, and the output projection."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = dropout

    def forward(self, query, key, value, valid: torch.Tensor | None = None) -> torch.Tensor:
        """(N, M, Q, d), (N, M, K, d), (N, M, K, D / M) and (N, K) bool to (N, Q, D)."""
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if valid is None else valid[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Post-norm self-attention and feed-forward layer; positions are added to queries and keys."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, position, padding: torch.Tensor | None) -> torch.Tensor:
        """(N, S, D) tokens and positions, (N, S) bool padding to (N, S, D)."""
        query = x + position
        mixed, _ = self.self_attn(query, query, x, key_padding_mask=padding, need_weights=False)
        x = self.norm1(x + self.dropout(mixed))
        hidden = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm2(x + self.dropout(hidden))


class Encoder(nn.Module):
    """A stack of :class:`EncoderLayer` without a final norm."""

    def __init__(self, layers: int, dim: int, heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(dim, heads, ffn_dim, dropout) for _ in range(layers)
        )

    def forward(self, x, position, valid: torch.Tensor | None) -> torch.Tensor:
        """As :meth:`EncoderLayer.forward`, with the valid tokens in place of the padding."""
        padding = None if valid is None else ~valid
        for layer in self.layers:
            x = layer(x, position, padding)
        return x


class DecoderLayer(nn.Module):
    """Self-attention, conditional cross-attention (paper, section 3.3), feed-forward; post-norm.

    Args:
        dim, heads, ffn_dim, dropout: as in :class:`Transformer`.
        first: only the first layer adds the query embedding to the content queries of the
            cross-attention, and the positions to its content keys.
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int, dropout: float, first: bool):
        super().__init__()
        self.heads = heads
        self.sa_qcontent_proj = nn.Linear(dim, dim)
        self.sa_qpos_proj = nn.Linear(dim, dim)
        self.sa_kcontent_proj = nn.Linear(dim, dim)
        self.sa_kpos_proj = nn.Linear(dim, dim)
        self.sa_v_proj = nn.Linear(dim, dim)
        self.self_attn = AttentionOutput(dim, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.ca_qcontent_proj = nn.Linear(dim, dim)
        self.ca_qpos_proj = nn.Linear(dim, dim) if first else None
        self.ca_kcontent_proj = nn.Linear(dim, dim)
        self.ca_kpos_proj = nn.Linear(dim, dim)
        self.ca_v_proj = nn.Linear(dim, dim)
        self.ca_qpos_sine_proj = nn.Linear(dim, dim)
        self.cross_attn = AttentionOutput(dim, dropout)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def project(self, tokens: torch.Tensor, position: torch.Tensor):
        """Keys (N, M, S, 2 D / M) and values (N, M, S, D / M) of (N, S, D) tokens."""
        content, spatial = self.ca_kcontent_proj(tokens), self.ca_kpos_proj(position)
        if self.ca_qpos_proj is not None:
            content = content + spatial
        key = torch.cat([_split(content, self.heads), _split(spatial, self.heads)], dim=-1)
        return key, _split(self.ca_v_proj(tokens), self.heads)

    def forward(self, x, embedding, sine, key, value, valid):
        """One layer.

        Args:
            x: (N, Q, D) content queries.
            embedding: (Q, D) query embedding.
            sine: (N, Q, D) or (Q, D), the transformed encoding of the reference points.
            key, value, valid: of :class:`Memory`.

        Returns:
            (N, Q, D), and the two :class:`Attention` of self- and cross-attention.
        """
        own_query = _split(self.sa_qcontent_proj(x) + self.sa_qpos_proj(embedding), self.heads)
        own_key = _split(self.sa_kcontent_proj(x) + self.sa_kpos_proj(embedding), self.heads)
        mixed = self.self_attn(own_query, own_key, _split(self.sa_v_proj(x), self.heads))
        x = self.norm1(x + self.dropout(mixed))

        content = self.ca_qcontent_proj(x)
        if self.ca_qpos_proj is not None:
            content = content + self.ca_qpos_proj(embedding)
        spatial = self.ca_qpos_sine_proj(sine).expand_as(content)
        query = torch.cat([_split(content, self.heads), _split(spatial, self.heads)], dim=-1)
        x = self.norm2(x + self.dropout(self.cross_attn(query, key, value, valid)))

        hidden = self.linear2(self.dropout(F.relu(self.linear1(x))))
        x = self.norm3(x + self.dropout(hidden))
        return x, Attention(own_query, own_key), Attention(query, key, valid)


class Decoder(nn.Module):
    """The decoder; groups of queries share its parameters and a memory, one call for each group.

    Queries of different calls cannot see each other, so groups never interact.
    """

    def __init__(self, layers: int, dim: int, heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(dim, heads, ffn_dim, dropout, first=k == 0) for k in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.query_scale = MLP(dim, dim, dim, 2)
        self.ref_point_head = MLP(dim, dim, 2, 2)
        if layers == 1:  # never asked then, and distributed training waits for every gradient
            self.query_scale.requires_grad_(False)

    def project(self, tokens, position, valid, grid) -> Memory:
        """Keys and values of all layers, from (N, S, D) tokens and positions."""
        pairs = [layer.project(tokens, position) for layer in self.layers]
        return Memory([key for key, _ in pairs], [value for _, value in pairs], valid, grid)

    def forward(
        self, embedding: torch.Tensor, memory: Memory, keep_attention: bool = False
    ) -> DecoderStates:
        """Run one group of queries.

        Args:
            embedding: (Q, D) query embeddings.
            memory: of :meth:`project`.
            keep_attention: give the attentions of all layers (queries and keys; no map is made).
        """
        reference = self.ref_point_head(embedding)
        sine = sine_features(reference.float().sigmoid() * (2 * math.pi), embedding.shape[-1] // 2)
        x = embedding.new_zeros(len(memory.values[0]), *embedding.shape)
        hidden, own, cross = [], [], []
        for k, layer in enumerate(self.layers):
            transformed = sine if k == 0 else sine * self.query_scale(x)
            x, *attentions = layer(
                x, embedding, transformed, memory.keys[k], memory.values[k], memory.valid
            )
            hidden.append(self.norm(x))
            own.append(attentions[0])
            cross.append(attentions[1])
        kept = (own, cross) if keep_attention else (None, None)
        return DecoderStates(torch.stack(hidden), reference, *kept)


class Transformer(nn.Module):
    """Encoder and decoder.

    Args:
        dim: D, a multiple of twice the number of heads and of 4.
        heads: M.
        encoder_layers, decoder_layers: their numbers.
        ffn_dim: width of the feed-forward layers.
        dropout: of attention weights, feed-forward layers and residual branches.
    """

    def __init__(
        self,
        dim: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.dim = dim
        self.encoder = Encoder(encoder_layers, dim, heads, ffn_dim, dropout)
        self.decoder = Decoder(decoder_layers, dim, heads, ffn_dim, dropout)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def encode(self, feature: torch.Tensor, valid: torch.Tensor, padded: bool) -> Memory:
        """Encode a feature map for the decoder.

        Args:
            feature: (N, D, rows, columns).
            valid: (N, rows, columns) bool on the device of ``feature``.
            padded: whether ``valid`` is False anywhere; without padding no mask is needed.
        """
        rows, columns = feature.shape[-2:]
        position = image_positions(valid, self.dim // 2)
        tokens = feature.flatten(2).transpose(1, 2)
        mask = valid.flatten(1) if padded else None
        if mask is not None:  # nobody attends to padding, but 0 * inf would be seen all the same
            tokens = tokens.masked_fill(~mask[..., None], 0.0)
        tokens = self.encoder(tokens, position, mask)
        return self.decoder.project(tokens, position, mask, (rows, columns))
