"""BCKD's terms: golden numbers, gradients, degenerate input, memory."""

import math

import pytest
import torch
from modern_goldens import dense_boxes, dense_labels, dense_logits

from projects.kd.analysis.measure import peak_bytes
from projects.kd.functional.bckd import confidence, disagreement, giou_kd, has_area, qfl_kd

COUNTED, POSITIVE = dense_labels()
P = POSITIVE.sum()


def naive_qfl(student, target):
    p, q = student.sigmoid(), target.detach().sigmoid()
    return (p - q).abs() * (torch.nn.functional.softplus(student) - q * student)


def test_goldens_of_classes():
    student, target = dense_logits()
    student.requires_grad_()
    assert P == 7 and COUNTED.sum() == 69
    total = qfl_kd([(student, target, COUNTED)], 1.0)
    assert total.item() == pytest.approx(62.71953760, rel=1e-8)
    loss = qfl_kd([(student, target, COUNTED)], P)
    assert loss.item() == pytest.approx(8.95993394, rel=1e-8)
    loss.backward()
    assert student.grad[1, 0, 2, 2, 3].item() == pytest.approx(0.06780858, abs=5e-9)


def test_goldens_of_boxes():
    boxes, target = dense_boxes()
    boxes.requires_grad_()
    weight = disagreement(*dense_logits(), COUNTED)
    assert weight.sum().item() == pytest.approx(33.10480643, rel=1e-8)
    loss = giou_kd([(boxes, target, weight)], P)
    assert loss.item() == pytest.approx(1.40004824, rel=1e-8)
    loss.backward()
    assert boxes.grad[1, 0, 2, 3, 0].item() == pytest.approx(-0.00375515, abs=5e-9)
    # CrossKD's weight is the target's confidence
    boxes.grad = None
    weight = confidence(dense_logits()[1], COUNTED)
    assert weight.sum().item() == pytest.approx(38.98482488, rel=1e-8)
    loss = giou_kd([(boxes, target, weight)], P)
    assert loss.item() == pytest.approx(1.62961077, rel=1e-8)
    loss.backward()
    assert boxes.grad[1, 0, 2, 3, 0].item() == pytest.approx(-0.00351758, abs=5e-9)


@pytest.mark.parametrize("counted", [None, COUNTED])
def test_gradient_of_the_class_term_is_that_of_the_formula(counted):
    student, target = (x[..., :2, :3].clone() for x in dense_logits())
    counted = None if counted is None else counted[..., :2, :3]
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: qfl_kd([(s, target, counted)], 3.0), student)
    naive = naive_qfl(student, target)
    naive = naive if counted is None else naive.masked_fill(~counted[:, :, None], 0.0)
    loss = qfl_kd([(student, target, counted)], 1.0)
    torch.testing.assert_close(loss, naive.sum())
    expected, found = (torch.autograd.grad(x, student)[0] for x in (naive.sum(), loss))
    torch.testing.assert_close(found, expected)


def test_gradient_of_the_box_term():
    boxes, target = (x[:, :1, :2, :2].clone() for x in dense_boxes())
    weight = torch.rand(2, 1, 2, 2, dtype=torch.float64)
    boxes.requires_grad_()
    assert torch.autograd.gradcheck(lambda b: giou_kd([(b, target, weight)], 3.0), boxes)


def test_at_the_target_the_class_term_is_0_with_a_cusp():
    target = torch.tensor([-3.0, 0.5, 4.0], dtype=torch.float64).view(1, 1, 3, 1, 1)
    p = target.sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    for step in (-1e-7, 0.0, 1e-7):
        student = (target + step).requires_grad_()
        loss = qfl_kd([(student, target, None)], 1.0)
        loss.backward()
        slope = torch.tensor(step).sign() * p * (1 - p) * entropy
        torch.testing.assert_close(student.grad, slope, rtol=1e-5, atol=0)
        assert loss.item() <= 1e-6


@pytest.mark.parametrize("spoiler", [math.inf, -math.inf, math.nan])
def test_what_is_not_counted_may_be_anything(spoiler):
    student, target = dense_logits()
    expected = qfl_kd([(student, target, COUNTED)], P)
    weights = disagreement(student, target, COUNTED), confidence(target, COUNTED)
    for x in (student, target):
        x.masked_fill_(~COUNTED[:, :, None], spoiler)
    student.requires_grad_()
    loss = qfl_kd([(student, target, COUNTED)], P)
    loss.backward()
    assert torch.equal(loss, expected) and student.grad.isfinite().all()
    assert not student.grad[~COUNTED[:, :, None].expand_as(student)].any()
    assert torch.equal(disagreement(student, target, COUNTED), weights[0])
    assert torch.equal(confidence(target, COUNTED), weights[1])


def test_levels_are_summed_and_nothing_counted_gives_0_in_the_graph():
    student, target = dense_logits()
    student.requires_grad_()
    nothing = torch.zeros_like(COUNTED)
    parts = [(x[:, :1], y[:, :1], None) for x, y in ((student, target),)]
    parts += [(student[:, 1:], target[:, 1:], nothing[:, 1:])]
    both, one = qfl_kd(parts, 2.0), qfl_kd(parts[:1], 2.0)
    torch.testing.assert_close(both, one)
    empty = qfl_kd([(student, target, nothing)], 1.0)
    empty.backward()
    assert empty.item() == 0 and not student.grad.any()


def test_a_target_without_area_does_not_count():
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5], [2, 2, 2, 2]], requires_grad=True)
    target = torch.tensor([[0.0, 0, 4, 4], [2, 2, 2, 6], [0, 0, 4, 4]])
    assert has_area(target).tolist() == [True, False, True]
    loss = giou_kd([(boxes, target, torch.ones(3))], 1.0)
    assert loss.item() == pytest.approx(1.0)  # the last: no overlap, a hull of the target's size
    loss.backward()
    assert boxes.grad.isfinite().all() and not boxes.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    half = [x.to(dtype) for x in dense_logits()]
    student = half[0].requires_grad_()
    loss = qfl_kd([(student, half[1], COUNTED)], P)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, qfl_kd([(*(x.float() for x in half), COUNTED)], P))
    loss.backward()
    assert student.grad.dtype == dtype and student.grad.isfinite().all()


def test_the_class_term_keeps_nothing_but_its_inputs():
    student = torch.randn(1, 3, 20, 40, 40, requires_grad=True)
    target = torch.randn(1, 3, 20, 40, 40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        qfl_kd([(student, target, None)], 1.0)
    assert sum(x.numel() > 100 for x in kept) == 2
    size = student.numel() * 4
    ours = peak_bytes(lambda: qfl_kd([(student, target, None)], 1.0).backward())
    naive = peak_bytes(lambda: naive_qfl(student, target).sum().backward())
    assert ours < 6 * size < naive
