"""DSI's loss against torch's cosine, finite differences, and what lengths must not do."""

import pytest
import torch
import torch.nn.functional as F

from projects.kd.functional.dsi import cosine_loss


@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient_equal_the_published_formula(masked):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64).unbind()
    student.requires_grad_()
    mask = torch.rand(2, 1, 3, 4) > 0.4 if masked else None
    ours, theirs = (F.normalize(x.flatten(2).transpose(1, 2), dim=-1) for x in (student, teacher))
    cells = 1 - F.cosine_similarity(ours, theirs, dim=-1)
    plain = cells.mean() if mask is None else cells[mask.flatten(1)].mean()
    found = cosine_loss(student, teacher, mask)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (found, plain)))
    assert torch.autograd.gradcheck(lambda s: cosine_loss(s, teacher, mask), student)


def test_directions_alone_count():
    student, teacher = torch.randn(2, 2, 6, 3, 3).unbind()
    lengths = torch.rand(2, 1, 3, 3) + 0.5
    torch.testing.assert_close(
        cosine_loss(lengths * student, 7 * teacher), cosine_loss(student, teacher)
    )
    assert cosine_loss(student, 3 * student).item() == pytest.approx(0, abs=1e-6)
    assert cosine_loss(student, -student).item() == pytest.approx(2)


def test_vectors_of_no_length_have_a_finite_gradient():
    """A cosine of 0, and the slope of the divisor that does not fall below epsilon."""
    student = torch.zeros(1, 3, 1, 2, dtype=torch.float64)
    student[..., 1] = 1e-9
    student.requires_grad_()
    teacher = torch.ones(1, 3, 1, 2, dtype=torch.float64)
    loss = cosine_loss(student, teacher)
    assert loss.item() == pytest.approx(1, abs=1e-3)
    loss.backward()
    torch.testing.assert_close(student.grad, torch.full_like(student, -1e6 / 3**0.5 / 2))
    assert cosine_loss(torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)).item() == 1


@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_cells_outside_of_the_mask_may_hold_anything(value):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5).unbind()
    mask = torch.rand(2, 1, 4, 5) > 0.4
    spoilt = [x.masked_fill(~mask, value).requires_grad_() for x in (student, teacher)]
    loss = cosine_loss(*spoilt, mask)
    torch.testing.assert_close(loss, cosine_loss(student, teacher, mask))
    loss.backward()
    assert spoilt[0].grad.isfinite().all()
    assert not spoilt[0].grad.masked_select(~mask).any()
    none = cosine_loss(student.requires_grad_(), teacher, torch.zeros_like(mask))
    none.backward()
    assert none.item() == 0 and not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    student, teacher = (300 * torch.randn(2, 1, 64, 2, 2)).to(dtype).unbind()
    found = cosine_loss(student, teacher)
    assert torch.equal(found, cosine_loss(student.float(), teacher.float())) and found < 2
