"""D3ETR's matching and its three terms against loops, golden numbers and gradcheck."""

import math

import pytest
import torch
import torch.nn.functional as F
from kd_testing import wave

from projects.kd.analysis.measure import peak_bytes
from projects.kd.functional import d3etr
from projects.kd.functional.d3etr import (
    attention_loss,
    layer_map,
    matching_cost,
    prediction_loss,
    top_queries,
)
from projects.kd.functional.set_prediction import assign, box_losses, focal_cost


def predictions(queries, seed, images=2, classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, queries, classes, generator=generator, dtype=dtype)
    boxes = torch.rand(images, queries, 4, generator=generator, dtype=dtype) * 0.4 + 0.1
    return logits, boxes


def attention(rows, keys, seed, images=2, heads=3, dim=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((images, heads, rows, dim), (images, heads, keys, dim))
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


# --- matching ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (3, 6, [1, 3, 5]),
        (6, 3, [0, 0, 1, 1, 2, 2]),
        (1, 6, [5]),
        (4, 6, [1, 2, 4, 5]),
        (2, 1, [0, 0]),
    ],
)
def test_the_last_layers_belong_together(student, teacher, expected):
    assert layer_map(student, teacher) == expected


def test_top_queries_are_those_with_the_best_scores():
    logits = torch.tensor([[[0.0, 1], [3, 0], [-1, 2], [0, 0]]])
    assert top_queries(logits, 2).tolist() == [[1, 2]]
    for count in (0, 4, 9):
        assert top_queries(logits, count).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("kind", ["soft_bce", "focal_hard"])
def test_cost_equals_a_loop(kind):
    (zs, bs), (zt, bt) = predictions(5, 0), predictions(3, 1)
    found = matching_cost(zs, bs, zt, bt, kind, 1.5, 5.0, 2.0)
    assert found.shape == (2, 5, 3)
    for n in range(2):
        for i in range(5):
            for j in range(3):
                target = zt[n, j].sigmoid()
                if kind == "soft_bce":
                    term = F.binary_cross_entropy_with_logits(zs[n, i], target, reduction="sum")
                else:
                    term = focal_cost(zs[n, i])[target.argmax()] * target.max()
                distance, overlap = box_losses(bs[n, i], bt[n, j])
                expected = 1.5 * term + 5 * distance + 2 * (overlap - 1)
                assert found[n, i, j].item() == pytest.approx(expected.item())


def test_equal_predictions_match_themselves_and_permuted_ones_their_origin():
    logits, boxes = predictions(20, 0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    cost = matching_cost(logits, boxes, logits[:, order], boxes[:, order])
    for rows, columns in assign(list(cost)):
        assert order[columns].tolist() == rows.tolist() == list(range(20))


def test_the_cost_of_large_logits_is_finite():
    (zs, bs), (zt, bt) = predictions(5, 0), predictions(3, 1)
    for kind in ("soft_bce", "focal_hard"):
        assert matching_cost(1e4 * zs, bs, 1e4 * zt, bt, kind).isfinite().all()


# --- predictions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["teacher_max_prob", "uniform"])
def test_prediction_loss_equals_a_loop(weight):
    (zs, bs), (zt, bt) = predictions(5, 0), predictions(5, 1)
    total = norm = 0.0
    for n in range(2):
        for i in range(5):
            p, q = zt[n, i].sigmoid(), zs[n, i].sigmoid()
            kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
            distance, overlap = box_losses(bs[n, i], bt[n, i])
            w = p.max() if weight == "teacher_max_prob" else 1.0
            total += w * (1.5 * kl + 5 * distance + 2 * overlap)
            norm += w
    found = prediction_loss(zs, bs, zt, bt, 1.5, 5.0, 2.0, weight)
    torch.testing.assert_close(found, total / norm)


@pytest.mark.parametrize("weight", d3etr.QUERY_WEIGHTS)
def test_prediction_loss_normalises_every_layer_by_itself(weight):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 3, 2, 4, 5, generator=generator)  # side, layer, image, pair, class
    boxes = torch.rand(2, 3, 2, 4, 4, generator=generator)
    sides = logits[0], boxes[0], logits[1], boxes[1]
    found = prediction_loss(*sides, query_weight=weight)
    each = [prediction_loss(*(x[k] for x in sides), query_weight=weight) for k in range(3)]
    torch.testing.assert_close(found, torch.stack(each))


def test_prediction_loss_golden_number():
    """One pair, one class, equal boxes: w cancels and KL(sigmoid(1) || sigmoid(0)) remains."""
    box = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]])
    found = prediction_loss(torch.zeros(1, 1, 1), box, torch.ones(1, 1, 1), box)
    p = 1 / (1 + math.exp(-1))
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_prediction_loss_is_zero_with_zero_gradient_for_equal_inputs():
    logits, boxes = predictions(5, 0)
    a, b = logits.clone().requires_grad_(), boxes.clone().requires_grad_()
    loss = prediction_loss(a, b, logits, boxes)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    (grad,) = torch.autograd.grad(loss, a)
    assert grad.abs().max() < 1e-12


def test_prediction_gradients_agree_with_differences_and_never_reach_the_teacher():
    (zs, bs), (zt, bt) = predictions(3, 0), predictions(3, 1)
    inputs = [x.requires_grad_() for x in (zs, bs)]
    assert torch.autograd.gradcheck(lambda a, b: prediction_loss(a, b, zt, bt), inputs)
    zt.requires_grad_(), bt.requires_grad_()
    prediction_loss(zs, bs, zt, bt).backward()
    assert zt.grad is None and bt.grad is None


# --- attention maps ------------------------------------------------------------------------------


def probabilities(query, key, valid=None):
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    weights = logits.exp()
    if valid is not None:
        weights = weights * valid[:, None, None]
    return weights / weights.sum(-1, keepdim=True)


def test_attention_loss_equals_a_loop():
    own, other = attention(5, 7, 0), attention(5, 7, 1)
    p, q = probabilities(*other), probabilities(*own)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(attention_loss(*own, *other), expected)


def test_attention_loss_golden_number():
    """One head, one row, keys 0 and 1 of dimension 1: logits (0, 1) against (0, 0)."""
    key = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    own, other = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    p = 1 / (1 + math.e)
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert attention_loss(own, key, other, key).item() == pytest.approx(expected, rel=1e-5)


def test_padded_keys_have_no_part():
    """The same as without them, in loss and gradient, whatever finite values they hold."""
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    results = []
    for filling in (0.0, 50.0):
        own, other = attention(5, 7, 0), attention(5, 7, 1)
        for key in (own[1], other[1]):
            key.masked_fill_(~valid[:, None, :, None], filling)
        inputs = [x.requires_grad_() for x in own]
        loss = attention_loss(*own, *other, valid, valid)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
        assert all(x.isfinite().all() for x in results[-1])
        p, q = probabilities(*other, valid), probabilities(*own, valid)
        each = torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)
        torch.testing.assert_close(loss, each.mean())
    for clean, filled in zip(*results, strict=True):
        torch.testing.assert_close(clean, filled)
    assert not results[0][2].masked_select(~valid[:, None, :, None]).any()


def test_choosing_rows_and_columns_makes_rows_sum_to_one_again():
    """Attention among the chosen queries is the gathered map divided by its row sums."""
    query, key = attention(6, 6, 0)
    chosen = torch.tensor([4, 1, 3])
    full = probabilities(query, key)[..., chosen, :][..., chosen]
    small = probabilities(query[..., chosen, :], key[..., chosen, :])
    torch.testing.assert_close(full / full.sum(-1, keepdim=True), small)
    assert (full.sum(-1) < 1).all()


def test_other_numbers_of_heads_are_averaged_on_both_sides():
    own, other = attention(5, 7, 0, heads=2), attention(5, 7, 1, heads=4)
    p, q = probabilities(*other).mean(1), probabilities(*own).mean(1)
    torch.testing.assert_close(attention_loss(*own, *other), (p * (p / q).log()).sum(-1).mean())


def test_a_finer_teacher_is_averaged_over_the_students_cells():
    own, other = attention(5, 6, 0), attention(5, 24, 1)
    p, q = probabilities(*other), probabilities(*own)
    blocks = p.view(2, 3, 5, 2, 2, 3, 2).sum((4, 6)).flatten(3)  # a 4x6 grid on a 2x3 grid
    found = attention_loss(*own, *other, None, None, (2, 3), (4, 6))
    torch.testing.assert_close(found, (blocks * (blocks / q).log()).sum(-1).mean())
    valid = torch.tensor([[True] * 6, [True, True, False] * 2])
    fine = valid.view(2, 2, 3).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    query = own[0].requires_grad_()
    loss = attention_loss(query, own[1], *other, valid, fine, (2, 3), (4, 6))
    loss.backward()
    assert loss.isfinite() and query.grad.isfinite().all()


def test_equal_maps_give_zero_and_no_gradient():
    own = [x.requires_grad_() for x in attention(5, 7, 0)]
    other = [x.detach() for x in own]
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    loss = attention_loss(*own, *other, valid, valid)
    assert loss.item() == 0.0
    loss.backward()
    assert all(x.grad.abs().max() < 1e-12 for x in own)


def test_attention_gradients_agree_with_differences():
    own, other = attention(3, 4, 0, heads=2), attention(3, 4, 1, heads=2)
    valid = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    inputs = [x.requires_grad_() for x in own]
    assert torch.autograd.gradcheck(lambda q, k: attention_loss(q, k, *other, valid, valid), inputs)
    many = attention(3, 4, 1, heads=4)
    assert torch.autograd.gradcheck(lambda q, k: attention_loss(q, k, *many, valid, valid), inputs)
    other[0].requires_grad_()
    attention_loss(*own, *other).backward()
    assert other[0].grad is None


def test_both_ways_of_computing_agree():
    """The closed form for equal heads and grids, and the general one."""
    own, other = attention(5, 7, 0), attention(5, 7, 1)
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    inputs = [x.requires_grad_() for x in own]
    results = []
    for function in (d3etr._kl, lambda *args: d3etr._converted_kl(*args, None, None)):
        loss = function(*own, *other, valid, valid)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for closed, general in zip(*results, strict=True):
        torch.testing.assert_close(closed, general)


def test_nothing_of_the_size_of_a_map_is_kept_for_backward():
    own, other = (wave(name, 1, 2, 40, 4, dtype=torch.float32) for name in ("student", "teacher"))
    own.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = attention_loss(own, own, other, other)
    assert max((x.numel() for x in saved), default=0) < 1 * 2 * 40 * 40 and loss.requires_grad
    assert peak_bytes(loss.backward) > 0
