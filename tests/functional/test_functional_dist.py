"""DIST's two terms: golden numbers, the fused form beside the plain one, degenerate input."""

import math

import pytest
import torch
from kd_testing import wave
from modern_goldens import dense_logits, index

from projects.kd.analysis.measure import peak_bytes
from projects.kd.functional.dist import dense_relation_losses, relation_losses


def flat_logits(*shape):
    return [x.flatten(1, 2) for x in dense_logits()]


def plain(student, target, mask=None):
    """From matrices of probabilities, as the definition has it."""
    rows = [x.sigmoid().permute(0, 2, 3, 1).flatten(0, 2) for x in (student, target)]
    if mask is not None:
        rows = [x[mask.flatten()] for x in rows]
    return relation_losses(*rows)


def test_goldens_of_dense_logits():
    student, target = flat_logits()
    student.requires_grad_()
    inter, intra = dense_relation_losses(student, target)
    assert inter.item() == pytest.approx(0.99030370, abs=5e-9)
    assert intra.item() == pytest.approx(0.98794154, abs=5e-9)
    (inter + intra).backward()
    # anchor 0, class 2
    assert student.grad[1, 2, 2, 3].item() == pytest.approx(0.00642168883, abs=5e-11)


def test_goldens_of_regions():
    student = 2 * torch.sin(0.7 * index(6, 5) + 0.3)
    target = 3 * torch.cos(0.45 * index(6, 5) - 0.6)
    inter, intra = relation_losses(student.softmax(1), target.softmax(1))
    assert inter.item() == pytest.approx(0.89324808, abs=5e-9)
    assert intra.item() == pytest.approx(0.91681243, abs=5e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_form_has_the_values_and_gradients_of_the_plain_one(masked):
    student, target = flat_logits()
    mask = None
    if masked:
        mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
        mask[0, :, 3:], mask[1, :, :, 3:] = False, False
    student.requires_grad_()
    for factors in ((1.0, 0.0), (0.0, 1.0), (0.7, 1.3)):
        sums = [
            sum(f * x for f, x in zip(factors, losses(student, target, mask), strict=True))
            for losses in (dense_relation_losses, plain)
        ]
        torch.testing.assert_close(*sums)
        torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in sums))
    small = student.detach()[..., :2, :2].clone().requires_grad_()
    where = None if mask is None else mask[..., :2, :2]
    assert torch.autograd.gradcheck(
        lambda s: dense_relation_losses(s, target[..., :2, :2], where), small
    )


def test_fp32_is_exact_where_probabilities_hardly_vary():
    """Background: all near 0.01, so that sums of squares would cancel."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        -4.6 + 1e-3 * torch.randn(1, 40, 8, 8, generator=generator, dtype=torch.float64)
        for _ in range(2)
    ]
    for exact, found in zip(
        dense_relation_losses(*maps), dense_relation_losses(*(x.float() for x in maps)), strict=True
    ):
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(exact.item(), abs=2e-3)


def test_equal_predictions_give_0_and_scale_does_not_matter():
    p = wave("student", 5, 4)
    for losses in (relation_losses(p, p), relation_losses(0.3 * p + 0.1, p)):
        assert all(abs(x.item()) < 1e-6 for x in losses)
    inter, intra = relation_losses(-p, p)
    assert inter.item() == pytest.approx(2, abs=1e-6) and intra.item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("spoiler", [math.inf, math.nan])
def test_cells_outside_the_mask_may_be_anything(spoiler):
    student, target = flat_logits()
    mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    mask[1, :, 2:] = False
    expected = dense_relation_losses(student, target, mask)
    for x in (student, target):
        x.masked_fill_(~mask, spoiler)
    student.requires_grad_()
    found = dense_relation_losses(student, target, mask)
    assert found == expected
    sum(found).backward()
    assert student.grad.isfinite().all() and not student.grad[1, :, 2:].any()


@pytest.mark.parametrize(
    ("shape", "defined"), [((1, 6, 1, 1), (1, 0)), ((2, 1, 3, 3), (0, 1)), ((1, 1, 1, 1), (0, 0))]
)
def test_what_cannot_be_correlated_is_0(shape, defined):
    student = wave("student", *shape).requires_grad_()
    target = wave("teacher", *shape)
    for losses in (dense_relation_losses(student, target), plain(student, target)):
        assert [x.item() > 0 for x in losses] == [bool(x) for x in defined]
        (grad,) = torch.autograd.grad(sum(losses), student)
        assert grad.isfinite().all() and bool(grad.any()) == any(defined)


def test_no_row_at_all_is_0_in_the_graph():
    student = torch.zeros(0, 5, requires_grad=True)
    losses = relation_losses(student, torch.zeros(0, 5))
    sum(losses).backward()
    assert [x.item() for x in losses] == [0, 0]
    logits = wave("student", 1, 3, 2, 2).requires_grad_()
    nothing = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    losses = dense_relation_losses(logits, wave("teacher", 1, 3, 2, 2), nothing)
    sum(losses).backward()
    assert [x.item() for x in losses] == [0, 0] and not logits.grad.any()


def test_constant_rows_and_columns_are_finite():
    student = wave("student", 1, 4, 2, 3)
    student[:, :, 0, 0] = 0.5  # a row
    student[:, 1] = 0.5  # a column
    student.requires_grad_()
    for losses in (dense_relation_losses, plain):
        found = losses(student, wave("teacher", 1, 4, 2, 3))
        (grad,) = torch.autograd.grad(sum(found), student)
        assert all(x.isfinite() for x in found) and grad.isfinite().all()


def test_memory_is_a_part_of_the_plain_forms():
    student = torch.randn(1, 40, 50, 50, requires_grad=True)
    target = torch.randn(1, 40, 50, 50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        dense_relation_losses(student, target)
    assert sum(x.numel() == student.numel() for x in kept) == 2
    size = student.numel() * 4
    ours = peak_bytes(lambda: sum(dense_relation_losses(student, target)).backward())
    naive = peak_bytes(lambda: sum(plain(student, target)).backward())
    assert ours <= 6 * size and ours < 0.6 * naive
