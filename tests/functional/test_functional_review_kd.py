"""ReviewKD's loss of a level against its golden number and the formula as published."""

import pytest
import torch
import torch.nn.functional as F
from kd_testing import wave

from projects.kd.functional.review_kd import hcl_loss


def published(student, teacher):
    total, share, factor = F.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side >= student.shape[2]:
            continue
        factor /= 2
        pooled = (F.adaptive_avg_pool2d(x, (side, side)) for x in (student, teacher))
        total, share = total + factor * F.mse_loss(*pooled), share + factor
    return total / share


def test_golden_number():
    maps = (wave(side, 2, 3, 4, 6) for side in ("student", "teacher"))
    assert hcl_loss(*maps).item() == pytest.approx(4.48533981, rel=1e-8)


@pytest.mark.parametrize("size", [(7, 5), (5, 3), (4, 9), (3, 8), (2, 2), (1, 4), (1, 1)])
def test_value_and_gradient_equal_the_formula(size):
    """Grids of every number of pools; with a width below a pool's side as well."""
    torch.manual_seed(0)
    student = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, *size, dtype=torch.float64)
    pair = hcl_loss(student, teacher), published(student, teacher)
    torch.testing.assert_close(*pair)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in pair))
    whole = torch.ones(2, 1, *size, dtype=torch.bool)
    torch.testing.assert_close(hcl_loss(student, teacher, whole), pair[0])


def test_gradients_are_those_of_finite_differences():
    student, teacher = torch.randn(2, 2, 2, 5, 6, dtype=torch.float64).unbind()
    mask = torch.rand(2, 1, 5, 6) > 0.3
    for own in (None, mask):
        assert torch.autograd.gradcheck(
            lambda s, m=own: hcl_loss(s, teacher, m), student.clone().requires_grad_()
        )


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_cells_outside_of_the_mask_do_not_matter(value):
    """The mean over 1x1 is that over the valid cells, and so is the full one."""
    student, teacher = torch.randn(2, 1, 2, 2, 3).unbind()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)[None, None]
    spoilt = [x.masked_fill(~mask, value).requires_grad_() for x in (student, teacher)]
    loss = hcl_loss(*spoilt, mask)
    inside = (student - teacher)[0][:, mask[0, 0]]
    expected = (inside.square().mean() + 0.5 * inside.mean(1).square().mean()) / 1.5
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert spoilt[0].grad.isfinite().all() and spoilt[1].grad is None
    assert not spoilt[0].grad.masked_select(~mask).any()


def test_half_precision_inputs_are_computed_in_fp32():
    student, teacher = torch.randn(2, 1, 2, 5, 6).half().unbind()
    assert torch.equal(hcl_loss(student, teacher), hcl_loss(student.float(), teacher.float()))
