"""PKD against its golden number, a plain reference, finite differences, and Pearson's r."""

import pytest
import torch
from kd_testing import wave

from projects.kd.functional.pkd import pkd_loss


def plain_pkd(student, teacher, mask=None):
    """The formula as written: standardise the chosen cells of each channel, then compare."""
    total, count = 0.0, 0
    for channel in range(student.shape[1]):
        pair = [
            x[:, channel] if mask is None else x[:, channel][mask[:, 0]] for x in (student, teacher)
        ]
        s, t = ((x - x.mean()) / (x.std(unbiased=True) + 1e-6) for x in pair)
        total = total + (s - t).square().sum()
        count += s.numel()
    return total / (2 * count)


def golden():
    shape = (2, 3, 4, 6)
    return wave("student", *shape).requires_grad_(), wave("teacher", *shape)


def test_golden_number():
    student, teacher = golden()
    loss = pkd_loss(student, teacher).item()
    assert loss == pytest.approx(0.91732912, rel=1e-8)
    m = 48
    assert loss == pytest.approx((m - 1) / m * 0.93684787, rel=1e-5)


def test_it_is_one_minus_the_mean_correlation():
    student, teacher = golden()
    r = [
        torch.corrcoef(torch.stack([student[:, c].flatten(), teacher[:, c].flatten()]))[0, 1]
        for c in range(3)
    ]
    expected = 47 / 48 * (1 - torch.stack(r).mean())
    torch.testing.assert_close(pkd_loss(student, teacher), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient_equal_the_formula(masked):
    for seed in range(5):
        torch.manual_seed(seed)
        student = torch.randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
        teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 4 + 7
        mask = torch.rand(2, 1, 4, 5) > 0.4 if masked else None
        ours, reference = (f(student, teacher, mask) for f in (pkd_loss, plain_pkd))
        torch.testing.assert_close(ours, reference)
        pair = (torch.autograd.grad(loss, student)[0] for loss in (ours, reference))
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(masked):
    student, teacher = golden()
    mask = torch.rand(2, 1, 4, 6) > 0.4 if masked else None
    assert torch.autograd.gradcheck(lambda s: pkd_loss(s, teacher, mask), student)


def test_equal_maps_give_exactly_zero():
    x = 10 * torch.randn(2, 5, 9, 11) + 100
    student = x.clone().requires_grad_()
    loss = pkd_loss(student, x)
    loss.backward()
    assert loss.item() == 0.0 and student.grad.abs().max() < 1e-8


def test_affine_changes_of_a_channel_do_not_matter():
    student, teacher = golden()
    scale = torch.tensor([0.5, 3.0, 20.0], dtype=torch.float64)[:, None, None]
    before = pkd_loss(student, teacher)
    torch.testing.assert_close(
        pkd_loss(student * scale - 30, teacher / scale + 2), before, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(pkd_loss(-teacher, teacher).item(), 2 * 47 / 48, rtol=1e-5, atol=0)


def test_large_means_do_not_cost_accuracy_in_fp32():
    student, teacher = golden()
    exact = pkd_loss(student + 500, teacher - 500)
    found = pkd_loss((student + 500).float(), (teacher - 500).float())
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_fewer_than_two_cells_give_zero_with_gradient_zero(masked):
    student = torch.randn(1, 4, 1, 1, requires_grad=True)
    teacher, mask = torch.randn(1, 4, 1, 1), None
    if masked:
        student = torch.randn(1, 4, 3, 3, requires_grad=True)
        teacher, mask = torch.randn(1, 4, 3, 3), torch.zeros(1, 1, 3, 3, dtype=torch.bool)
        mask[0, 0, 1, 1] = True
    loss = pkd_loss(student, teacher, mask)
    loss.backward()
    assert loss.item() == 0.0 and not student.grad.any()


def test_constant_channels_stay_finite():
    for student, teacher in ((0, 1), (1, 0), (0, 0)):
        maps = [
            torch.randn(2, 3, 4, 4) if x else torch.full((2, 3, 4, 4), 2.5)
            for x in (student, teacher)
        ]
        maps[0].requires_grad_()
        loss = pkd_loss(*maps)
        loss.backward()
        assert loss.isfinite() and maps[0].grad.isfinite().all()


@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_cells_outside_of_the_mask_do_not_matter(value):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5).unbind()
    mask = torch.rand(2, 1, 4, 5) > 0.4
    spoilt = [x.masked_fill(~mask, value).requires_grad_() for x in (student, teacher)]
    student.requires_grad_()
    losses = pkd_loss(student, teacher, mask), pkd_loss(*spoilt, mask)
    assert torch.equal(*losses)
    clean = torch.autograd.grad(losses[0], student)[0]
    found = torch.autograd.grad(losses[1], spoilt[0])[0]
    assert torch.equal(clean, found) and not found.masked_select(~mask).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    student, teacher = (x.detach().to(dtype) for x in golden())
    exact = pkd_loss(student.float(), teacher.float())
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pkd_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss.detach(), exact)
    assert student.grad.dtype == dtype and student.grad.isfinite().all()


def test_only_the_maps_and_vectors_are_kept_for_the_backward_pass():
    student, teacher = torch.randn(2, 1, 64, 64, 64)
    student.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        pkd_loss(student, teacher)
    new = [x for x in kept if x.data_ptr() not in (student.data_ptr(), teacher.data_ptr())]
    assert sum(x.numel() for x in new) <= 4 * 64
