"""KD-DETR's prediction term against golden numbers; the law of random queries."""

import pytest
import torch
from modern_inputs import cos, sin

from projects.kd.functional.d3etr import prediction_loss
from projects.kd.functional.kd_detr import kd_detr_loss, random_queries
from projects.kd.seeding import STEP, seed_generators


def golden():
    """Two layers of the student beside the teacher's last one: N 2, Q 5, K 4."""
    student = sin(0.7, 0.3, 2, 2, 5, 4, factor=2, plus=-1).requires_grad_()
    boxes = sin(0.5, 0.4, 2, 2, 5, 4, factor=1.2).sigmoid().requires_grad_()
    teacher = cos(0.45, -0.6, 2, 5, 4, factor=3, plus=-1)
    target = cos(0.4, -0.2, 2, 5, 4, factor=1.1).sigmoid()
    return student, boxes, teacher.expand(2, 2, 5, 4), target.expand(2, 2, 5, 4)


def only(**weights):
    return {"class_weight": 0.0, "l1_weight": 0.0, "giou_weight": 0.0, **weights}


def test_golden_numbers():
    student, boxes, teacher, target = golden()
    weights = teacher[0].amax(-1).sigmoid()
    assert weights.sum().item() == pytest.approx(5.46597111, rel=1e-8)
    inputs = student, boxes, teacher, target
    # the published class term is a bare sum; here eight images are the unit
    classes = kd_detr_loss(*inputs, **only(class_weight=2 / 8)).sum()
    assert classes.item() == pytest.approx(2.69053705, rel=1e-8)
    assert kd_detr_loss(*inputs, **only(l1_weight=1.0)).sum().item() == pytest.approx(
        0.41419184, abs=6e-9
    )
    overlap = kd_detr_loss(*inputs, **only(giou_weight=1.0)).sum()
    assert overlap.item() == pytest.approx(1.68565290, rel=1e-8)
    slope = torch.autograd.grad(classes, student)[0][1, 1, 2, 1]
    assert slope.item() == pytest.approx(-0.0527223947, rel=1e-8)
    places = kd_detr_loss(*inputs, class_weight=0.0).sum()
    slope = torch.autograd.grad(places, boxes)[0][1, 1, 2, 3]
    assert slope.item() == pytest.approx(-0.384857689, rel=1e-8)


def test_golden_numbers_of_our_class_term():
    student, boxes, teacher, target = golden()
    classes = prediction_loss(student, boxes, teacher, target, **only(class_weight=1.0)).sum()
    assert classes.item() == pytest.approx(4.74314951, rel=1e-8)
    slope = torch.autograd.grad(classes, student)[0][1, 1, 2, 1]
    assert slope.item() == pytest.approx(-0.133553284, rel=1e-8)


def test_the_class_term_does_not_grow_with_the_batch():
    inputs = [x.detach() for x in golden()]
    twice = [torch.cat([x, x], dim=1) for x in inputs]
    for weight in ("teacher_max_prob", "uniform"):
        losses = [kd_detr_loss(*x, query_weight=weight) for x in (inputs, twice)]
        assert losses[0].shape == (2,)
        torch.testing.assert_close(*losses)


def test_gradients_are_those_of_finite_differences_and_equal_inputs_give_zero():
    student, boxes, teacher, target = golden()
    assert torch.autograd.gradcheck(
        lambda z, b: kd_detr_loss(z, b, teacher, target), (student, boxes)
    )
    assert kd_detr_loss(teacher, target, teacher, target).abs().max() < 1e-12


def test_queries_no_teacher_believes_in_stay_finite():
    student, boxes, teacher, target = (x.detach().float() for x in golden())
    teacher = teacher - 300
    loss = kd_detr_loss(student.requires_grad_(), boxes, teacher, target).sum()
    loss.backward()
    assert loss.item() == 0.0 and not student.grad.any()


def test_random_queries_have_the_law_of_the_teachers():
    own = torch.randn(50, 3) * torch.tensor([0.1, 1.0, 5.0]) + torch.tensor([1.0, 0.0, -20.0])
    torch.manual_seed(0)
    drawn = random_queries(own, 4000)
    torch.testing.assert_close(drawn.mean(0), own.mean(0), rtol=0.05, atol=0.08)
    torch.testing.assert_close(drawn.std(0), own.std(0, correction=0), rtol=0.05, atol=0)
    normal = random_queries(own, 4000, "normal")
    assert normal.mean(0).abs().max() < 0.08 and (normal.std(0) - 1).abs().max() < 0.05
    one = random_queries(own[:1], 7)
    assert torch.equal(one, own[:1].expand(7, 3))


def test_random_queries_are_a_function_of_the_step():
    own, drawn = torch.randn(5, 3), []
    for iteration, rank in ((3, 0), (4, 0), (3, 1), (3, 0)):
        seed_generators(STEP, 1, iteration, rank, 0)
        drawn.append(random_queries(own, 4))
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
