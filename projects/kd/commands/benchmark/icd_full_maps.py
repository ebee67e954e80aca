"""ICD written straightforwardly, with full (heads, queries, tokens) maps: what the head must equal.

Batches are padded to the longest list of instances and all levels to the canvas, with masks; the
position embedding goes through full-size products; torch's autograd differentiates all of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention_part(queries, keys, values, student_values, real, token_mask, center=False):
    """From projections to the read-out and the distillation term.

    Args:
        queries: (N, Q, M, d).
        keys, values, student_values: (N, L, M, d).
        real: (N, Q) bool, real instances (others are fakes or padding).
        token_mask: (N, L) bool, cells inside the image.
        center: values lose their mean over those cells.

    Returns:
        (N, Q, M * d) read-out, and the scalar distillation term without its weight.
    """
    logits = torch.einsum("nqmd,nlmd->nmql", queries, keys) / queries.shape[-1] ** 0.5
    logits = logits.masked_fill(~token_mask[:, None, None], float("-inf"))
    maps = logits.softmax(-1)
    read = torch.einsum("nmql,nlmd->nqmd", maps, values).flatten(2)
    weights = (maps.detach() * real[:, None, :, None]).sum(2)  # (N, M, L)
    if center:
        inside = token_mask[..., None, None].to(values)
        values, student_values = (
            x - (x * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True)
            for x in (values, student_values)
        )
    width = (values.shape[-1],)
    teacher = F.layer_norm(values.detach(), width)
    error = (F.layer_norm(student_values, width) - teacher).square().mean(-1).transpose(1, 2)
    distance = (weights * error).sum(2) / weights.sum(2).clamp(min=1e-6)
    return read, distance.mean()


def position_embedding(mask: torch.Tensor, features: int) -> torch.Tensor:
    """(N, H, W, 2 * features) DETR sine embedding over the valid (N, H, W) area, y first."""
    exponent = 2 * (torch.arange(features) // 2) / features
    halves = []
    for axis in (1, 2):
        count = mask.cumsum(axis).double()
        last = count.select(axis, -1).unsqueeze(axis)
        place = count / (last + 1e-6) * 2 * torch.pi
        angles = place[..., None] / 10000**exponent
        pair = (angles[..., 0::2].sin(), angles[..., 1::2].cos())
        halves.append(torch.stack(pair, dim=-1).flatten(3))
    return torch.cat(halves, dim=3).float()


def losses(head, ctx, queries) -> dict[str, torch.Tensor]:
    """What ``head(ctx)`` returns for encoded instances that were drawn before.

    Args:
        head: an ICD head with attention "decoder", whose parameters are used.
        ctx: the step.
        queries: of ``head.queries(ctx)``.
    """
    decoder, levels = head.decoder, head.levels
    tokens, teacher, student, positions = [], [], [], []
    for level in levels:
        mask = ctx.valid_mask(level)[:, 0]
        if not head.mask_padding:
            mask = torch.ones_like(mask)
        tokens.append(mask.flatten(1))
        teacher.append(ctx.teacher_features[level].detach().flatten(2).transpose(1, 2))
        features = ctx.student_features[level]
        if ctx.iteration < head.detach_iters:
            features = features.detach()
        student.append(features.flatten(2).transpose(1, 2))
        positions.append(position_embedding(mask, 128).flatten(1, 2))
    tokens, teacher, student, positions = (
        torch.cat(parts, dim=1) for parts in (tokens, teacher, student, positions)
    )

    counts = [sum(pair) for pair in queries.counts]
    longest = max(counts)
    vectors = queries.encoded.vectors.split(counts)
    vectors = torch.stack([F.pad(part, (0, 0, 0, longest - len(part))) for part in vectors])
    real = torch.zeros(len(counts), longest, dtype=torch.bool)
    used = torch.zeros(len(counts), longest, dtype=torch.bool)
    for image, (number, fakes) in enumerate(queries.counts):
        real[image, :number] = True
        used[image, : number + fakes] = True

    x = decoder.encoder(vectors)
    terms = []
    for layer, student_values in zip(decoder.layers, head.student_values, strict=True):
        keys, values, own = (
            part.unflatten(2, (layer.heads, -1))
            for part in (
                layer.key(teacher + decoder.position(positions)),
                layer.value(teacher),
                student_values(student),
            )
        )
        wanted = layer.query(x).unflatten(2, (layer.heads, -1))
        read, term = attention_part(wanted, keys, values, own, real, tokens, head.center)
        terms.append(term)
        x = layer.attention_norm(x + layer.out(read))
        x = layer.ffn_norm(x + layer.ffn(x))
    predicted = decoder.predictor(x)

    logits = predicted[..., 0]
    conf = F.binary_cross_entropy_with_logits(logits, real.to(logits.dtype), reduction="none")
    error = (predicted[..., 1:].sigmoid()[used] - queries.encoded.sides).abs()
    error = error / queries.encoded.sizes.clamp(min=1e-7).repeat(1, 2)
    return {
        "loss_kd_icd": head.weight * sum(terms) / len(terms),
        "loss_aux_icd_conf": head.conf_weight * (conf * used).sum() / used.sum(),
        "loss_aux_icd_box": head.box_weight
        * (error.sum(1) * real[used]).sum()
        / real.sum().clamp(min=1e-6),
    }
