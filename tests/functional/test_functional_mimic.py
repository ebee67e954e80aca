"""Mimic against a loop over cells."""

import pytest
import torch

from projects.kd.functional.mimic import mimic_loss


@pytest.mark.parametrize("masked", [False, True])
def test_value_equals_a_loop_over_cells(masked):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64).unbind()
    mask = torch.rand(2, 1, 4, 5) > 0.4 if masked else torch.ones(2, 1, 4, 5, dtype=torch.bool)
    squares = [
        (student[n, :, y, x] - teacher[n, :, y, x]).square().mean()
        for n, _, y, x in mask.nonzero().tolist()
    ]
    expected = torch.stack(squares).mean()
    torch.testing.assert_close(mimic_loss(student, teacher, mask if masked else None), expected)
    student.requires_grad_()
    loss = lambda s: mimic_loss(s, teacher, mask)  # noqa: E731
    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_cells_outside_of_the_mask_do_not_matter(value):
    student, teacher = torch.randn(2, 2, 3, 4, 5).unbind()
    mask = torch.rand(2, 1, 4, 5) > 0.4
    spoilt = student.masked_fill(~mask, value).requires_grad_()
    loss = mimic_loss(spoilt, teacher, mask)
    loss.backward()
    assert torch.equal(loss, mimic_loss(student, teacher, mask))
    assert spoilt.grad.isfinite().all() and not spoilt.grad.masked_select(~mask).any()


def test_half_precision_is_promoted():
    """300^2 is beyond float16, and sums of small squares beyond bfloat16."""
    student, teacher = torch.full((1, 64, 32, 32), 300.0), torch.zeros(1, 64, 32, 32)
    for dtype in (torch.float16, torch.bfloat16):
        half = student.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = mimic_loss(half, teacher.to(dtype), torch.ones(1, 1, 32, 32, dtype=torch.bool))
        assert loss.dtype == torch.float32 and loss.item() == 300.0**2
        assert torch.autograd.grad(loss, half)[0].dtype == dtype


def test_an_empty_mask_gives_zero_with_gradient_zero():
    student = torch.randn(1, 2, 3, 3, requires_grad=True)
    loss = mimic_loss(student, torch.randn(1, 2, 3, 3), torch.zeros(1, 1, 3, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0 and not student.grad.any()
