"""ScoreL2's loss against its golden number, a plain reference, and finite differences."""

import pytest
import torch
from kd_testing import wave
from modern_goldens import target_logits

from projects.kd.functional.score_l2 import score_l2_loss


def test_golden_numbers():
    shape = (2, 3, 4, 6)
    student, teacher = wave("student", *shape).requires_grad_(), wave("teacher", *shape)
    weight = target_logits(2, 6, 4, 6).sigmoid().amax(1, keepdim=True)
    assert weight.sum().item() == pytest.approx(33.29067582, rel=1e-9)
    loss = score_l2_loss(student, teacher, weight)
    assert loss.item() == pytest.approx(6.25354783, rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[1, 2, 2, 3].item() == pytest.approx(-0.0432505193, rel=1e-8)


def test_value_and_gradient_equal_the_formula():
    torch.manual_seed(0)
    student = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher, weight = torch.randn(2, 5, 3, 4).double(), torch.rand(2, 1, 3, 4).double()
    plain = (weight * (student - teacher).square()).sum() / (5 * weight.sum())
    found = score_l2_loss(student, teacher, weight)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (found, plain)))
    assert torch.autograd.gradcheck(lambda s: score_l2_loss(s, teacher, weight), student)


def test_a_factor_of_all_weights_does_not_matter_and_equal_weights_give_the_mean_square():
    student, teacher = torch.randn(2, 2, 3, 4, 5).unbind()
    weight = torch.rand(2, 1, 4, 5)
    torch.testing.assert_close(
        score_l2_loss(student, teacher, 7 * weight), score_l2_loss(student, teacher, weight)
    )
    equal = score_l2_loss(student, teacher, torch.full_like(weight, 0.01))
    torch.testing.assert_close(equal, (student - teacher).square().mean())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_cells_without_weight_may_hold_anything(value):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5).unbind()
    weight = torch.rand(2, 1, 4, 5)
    weight = weight.masked_fill(weight < 0.4, 0.0)
    spoilt = [x.masked_fill(weight == 0, value).requires_grad_() for x in (student, teacher)]
    loss = score_l2_loss(*spoilt, weight)
    torch.testing.assert_close(loss, score_l2_loss(student, teacher, weight))
    loss.backward()
    assert spoilt[0].grad.isfinite().all()
    assert not spoilt[0].grad.masked_select(weight == 0).any()


def test_no_weight_at_all_gives_zero():
    student = torch.randn(1, 2, 1, 1, requires_grad=True)
    loss = score_l2_loss(student, torch.randn(1, 2, 1, 1), torch.zeros(1, 1, 1, 1))
    loss.backward()
    assert loss.item() == 0.0 and not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    student, teacher = torch.randn(2, 1, 3, 2, 2).to(dtype).unbind()
    weight = torch.rand(1, 1, 2, 2)
    found = score_l2_loss(student, teacher, weight)
    assert torch.equal(found, score_l2_loss(student.float(), teacher.float(), weight))
