"""D3ETR: decoder distillation for detection transformers (Chen et al., arXiv 2211.09768).

The paper's structure is public: which pairs are formed and which three things are imitated. Its
equations for the costs and losses were not readable to us; the forms below are ours where they say
so, each with its reason.

Shapes: L decoder layers, N images, Q queries (s of the student, t of the teacher), P pairs, K
classes, M attention heads; boxes (centre x, centre y, width, height) as shares of the image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .precision import full_precision
from .set_prediction import box_cost, box_losses, focal_cost

CLASS_COSTS = ("soft_bce", "focal_hard")
QUERY_WEIGHTS = ("teacher_max_prob", "uniform")


def layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher's layer for each layer of the student: even steps, last with last (ours)."""
    return [math.ceil((k + 1) * teacher_layers / student_layers) - 1 for k in range(student_layers)]


def top_queries(logits: torch.Tensor, count: int) -> torch.Tensor:
    """The queries with the highest class score, in the order of their index.

    Args:
        logits: (..., Q, K).
        count: how many; 0 or Q and more = all.

    Returns:
        (..., min(count, Q)) int64.
    """
    queries = logits.shape[-2]
    if count <= 0 or count >= queries:
        every = torch.arange(queries, device=logits.device)
        return every.expand(*logits.shape[:-2], queries)
    return logits.amax(-1).topk(count).indices.sort().values


@torch.no_grad()
@full_precision
def matching_cost(
    student_logits: torch.Tensor,
    student_boxes: torch.Tensor,
    teacher_logits: torch.Tensor,
    teacher_boxes: torch.Tensor,
    class_cost: str = "soft_bce",
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> torch.Tensor:
    """Cost of pairing student and teacher queries (adaptive matching).

    ``class_weight * class term + l1_weight * |b_s - b_t|_1 - giou_weight * GIoU(b_s, b_t)``. The
    paper matches soft class scores and boxes; the terms and weights are ours: boxes as in the
    detector's own matching, classes by

    * ``soft_bce``: ``sum_c BCE(z_s[c], sigmoid(z_t[c]))`` (as the relative DETRDistill does),
      evaluated as ``sum_c softplus(z_s[c]) - z_s . sigmoid(z_t)``, one matrix product;
    * ``focal_hard``: the detector's focal matching cost of the teacher's best class, times its
      probability.

    Args:
        student_logits, teacher_logits: (..., Qs, K) and (..., Qt, K).
        student_boxes, teacher_boxes: (..., Qs, 4) and (..., Qt, 4).
        class_cost: one of ``CLASS_COSTS``.
        class_weight, l1_weight, giou_weight: as above.

    Returns:
        (..., Qs, Qt) without gradient.
    """
    probability = teacher_logits.sigmoid()
    if class_cost == "soft_bce":
        cost = F.softplus(student_logits).sum(-1, keepdim=True)
        cost = cost - student_logits @ probability.transpose(-2, -1)
    else:
        best, label = probability.max(-1)
        every = focal_cost(student_logits)
        label = label[..., None, :].expand(*every.shape[:-1], label.shape[-1])
        cost = every.gather(-1, label) * best[..., None, :]
    places = box_cost(student_boxes, teacher_boxes, l1_weight, giou_weight)
    return places.add_(cost, alpha=class_weight)


@full_precision
def prediction_loss(
    student_logits: torch.Tensor,
    student_boxes: torch.Tensor,
    teacher_logits: torch.Tensor,
    teacher_boxes: torch.Tensor,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    query_weight: str = "teacher_max_prob",
) -> torch.Tensor:
    """Difference of paired predictions.

    ``sum_i w_i (class_weight * D_i + l1_weight * |b_s - b_t|_1 + giou_weight * (1 - GIoU)) /
    sum_i w_i`` over images and pairs of a layer, with
    ``D_i = sum_c KL(sigmoid(z_t[c]) || sigmoid(z_s[c]))`` (binary cross entropy less the teacher's
    entropy: the same gradient, 0 for equal inputs) and ``w_i`` the teacher's highest class
    probability, or 1. Ours: the classifier is a sigmoid; and without the weights some ten objects
    would stand beside hundreds of queries that mean nothing (KD-DETR's foreground weighting).

    Args:
        student_logits, teacher_logits: (..., N, P, K), pair by pair; ... are layers.
        student_boxes, teacher_boxes: (..., N, P, 4).
        class_weight, l1_weight, giou_weight: as above.
        query_weight: one of ``QUERY_WEIGHTS``.

    Returns:
        (...), 0 for equal inputs up to rounding; the teacher gets no gradient.
    """
    teacher_logits, teacher_boxes = teacher_logits.detach(), teacher_boxes.detach()
    probability = teacher_logits.sigmoid()
    # BCE(z, p) = softplus(z) - z p; both written so that equal logits give exactly 0
    difference = F.softplus(student_logits) - F.softplus(teacher_logits)
    divergence = difference - probability * (student_logits - teacher_logits)
    distance, overlap = box_losses(student_boxes, teacher_boxes)
    each = class_weight * divergence.sum(-1) + l1_weight * distance + giou_weight * overlap
    if query_weight == "uniform":
        return each.mean((-2, -1))
    weights = probability.amax(-1)
    return (weights * each).sum((-2, -1)) / weights.sum((-2, -1)).clamp(min=1e-6)


def attention_loss(
    student_query: torch.Tensor,
    student_key: torch.Tensor,
    teacher_query: torch.Tensor,
    teacher_key: torch.Tensor,
    student_valid: torch.Tensor | None = None,
    teacher_valid: torch.Tensor | None = None,
    student_grid: tuple[int, int] | None = None,
    teacher_grid: tuple[int, int] | None = None,
) -> torch.Tensor:
    """KL(teacher's attention map || student's), head by head, mean over images, heads and rows.

    The maps are those after the softmax and before dropout, made from queries and keys. Choosing
    queries and keys of pairs before the softmax is choosing rows and columns of the map and making
    the rows sum to 1 again. Nothing of the size of a map is kept for the backward pass; it is
    computed again there.

    Ours: the paper imitates the maps of all heads, the distance is not known. Rows are
    distributions, hence KL; a squared error over hundreds of keys has almost no gradient. Where the
    numbers of heads differ, both sides are averaged over their heads. Where the grids differ (a DC5
    teacher), the teacher's map is averaged over the area of each of the student's cells and made to
    sum to 1 again.

    Args:
        student_query, teacher_query: (N, M, P, d), pair by pair; M and d may differ.
        student_key, teacher_key: (N, M, keys, d).
        student_valid, teacher_valid: (N, keys) bool; keys outside have no part. None = all.
        student_grid, teacher_grid: (rows, columns) of the keys; only needed where they differ.

    Returns:
        Scalar in nats, 0 for equal inputs; the teacher gets no gradient.
    """
    tensors = (student_query, student_key, teacher_query.detach(), teacher_key.detach())
    if student_grid == teacher_grid and student_query.shape[1] == teacher_query.shape[1]:
        return _kl(*tensors, student_valid, teacher_valid)
    return checkpoint(
        _converted_kl,
        *(*tensors, student_valid, teacher_valid, student_grid, teacher_grid),
        use_reentrant=False,
        preserve_rng_state=False,
    )


@full_precision
def _kl(*tensors):
    return _AttentionKL.apply(*tensors)


class _AttentionKL(torch.autograd.Function):
    """Maps of the same heads and keys; keeps their queries, keys and (N, M, P, 1) vectors.

    KL = sum p_t (t - s) - lse_t + lse_s with logits t, s and lse = log-sum-exp; its gradient for
    the student's logits is p_s - p_t.
    """

    @staticmethod
    def forward(ctx, query, key, other_query, other_key, valid, other_valid):
        own, target = _logits(query, key, valid), _logits(other_query, other_key, other_valid)
        lse_own, lse_target = (x.logsumexp(-1, keepdim=True) for x in (own, target))
        difference = own.neg_().add_(target)
        for mask in (valid, other_valid):
            if mask is not None:  # inf - inf
                difference.masked_fill_(~mask[:, None, None], 0.0)
        weights = target.sub_(lse_target).exp_()
        mean = weights.mul_(difference).sum(-1, keepdim=True)
        tensors = query, key, other_query, other_key, valid, other_valid, lse_own, lse_target
        ctx.save_for_backward(*tensors)
        return (mean - lse_target + lse_own).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, other_query, other_key, valid, other_valid, lse_own, lse_target = (
            ctx.saved_tensors
        )
        slope = _logits(query, key, valid).sub_(lse_own).exp_()
        slope.sub_(_logits(other_query, other_key, other_valid).sub_(lse_target).exp_())
        slope.mul_(grad / (lse_own.numel() * math.sqrt(query.shape[-1])))
        return slope @ key, slope.transpose(-2, -1) @ query, None, None, None, None


def _logits(query, key, valid):
    """(N, M, P, keys), a new tensor; -inf at keys that are not valid."""
    logits = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
    return logits if valid is None else logits.masked_fill_(~valid[:, None, None], float("-inf"))


@full_precision
def _converted_kl(query, key, other_query, other_key, valid, other_valid, grid, other_grid):
    """The general case, built from differentiable operations."""
    own = _log_map(query, key, valid)
    with torch.no_grad():
        target = _log_map(other_query, other_key, other_valid)
        if own.shape[1] != target.shape[1]:
            target = _mean_over_heads(target)
        if grid != other_grid:
            target = _on_grid(target, other_grid, grid, valid)
        weights = target.exp()
    if own.shape[1] != target.shape[1]:
        own = _mean_over_heads(own)
    without = weights == 0  # 0 * inf would be NaN, in the gradient as well
    if valid is not None:
        without = without | ~valid[:, None, None]
    return (weights * (target - own).masked_fill(without, 0.0)).sum(-1).mean()


def _log_map(query, key, valid):
    """(N, M, P, keys) logarithm of the attention map, -inf at keys that are not valid."""
    return _logits(query, key, valid).log_softmax(-1)


def _mean_over_heads(log_map):
    """(N, 1, P, keys); the smallest normal number keeps the gradient of a logarithm of 0 finite."""
    mean = log_map.exp().mean(1, keepdim=True)
    return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()


def _on_grid(log_map, before, after, valid):
    """The map averaged over the cells of another grid, each row made to sum to 1."""
    images, heads, rows = log_map.shape[:3]
    cells = log_map.exp().view(images, heads * rows, *before)
    cells = F.adaptive_avg_pool2d(cells, after).view(images, heads, rows, -1)
    if valid is not None:
        cells = cells * valid[:, None, None]
    smallest = torch.finfo(cells.dtype).tiny
    return (cells / cells.sum(-1, keepdim=True).clamp(min=smallest)).clamp(min=smallest).log()
