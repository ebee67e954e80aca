"""CWD against its golden numbers, a plain reference, finite differences, and its invariances."""

import pytest
import torch
from kd_testing import wave

from projects.kd.analysis.measure import peak_bytes
from projects.kd.functional.cwd import cwd_loss


def plain_standard(x, mask):
    """One channel at a time, a list of all images' valid cells."""
    n, c = x.shape[:2]
    inside = [torch.ones_like(x[i, 0]) > 0 if mask is None else mask[i, 0] for i in range(n)]
    result = []
    for channel in range(c):
        cells = torch.cat([x[i, channel][inside[i]] for i in range(n)])
        mean = cells.sum() / len(cells)
        variance = ((cells - mean) ** 2).sum() / len(cells)
        result.append((x[:, channel] - mean) / (variance + 1e-6).sqrt())
    return torch.stack(result, 1)


def plain_cwd(student, teacher, tau=1.0, mask=None, standardize=False):
    """The formula as written, one channel at a time, over the cells of the mask only."""
    n, c = student.shape[:2]
    total = 0.0
    if standardize:
        student, teacher = plain_standard(student, mask), plain_standard(teacher, mask)
    for image in range(n):
        inside = torch.ones_like(student[image, 0]) > 0 if mask is None else mask[image, 0]
        for channel in range(c):
            p = (teacher[image, channel][inside] / tau).softmax(0)
            q = (student[image, channel][inside] / tau).softmax(0)
            total = total + (p * (p / q).log()).sum()
    return tau**2 / (n * c) * total


def golden():
    shape = (2, 3, 4, 6)
    return wave("student", *shape).requires_grad_(), wave("teacher", *shape)


@pytest.mark.parametrize(("tau", "value"), [(1.0, 1.45068518), (4.0, 2.70280353)])
def test_golden_numbers(tau, value):
    assert cwd_loss(*golden(), tau).item() == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize(("tau", "value"), [(1.0, 0.72385201), (4.0, 0.89439822)])
def test_golden_numbers_of_standardised_channels(tau, value):
    """Computed apart, in Python's floats, from the definition."""
    assert cwd_loss(*golden(), tau, None, True).item() == pytest.approx(value, rel=1e-7)


def test_golden_gradient():
    student, teacher = golden()
    cwd_loss(student, teacher, 4.0).backward()
    assert student.grad[1, 2, 3, 4].item() == pytest.approx(-0.00090404545, rel=1e-7)


def random_mask(n, h, w):
    mask = torch.rand(n, 1, h, w) > 0.4
    mask[:, :, 0, 0] = True
    return mask


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_value_and_gradient_equal_the_formula(tau, masked, standardize):
    for seed in range(5):
        torch.manual_seed(seed)
        student = (3 * torch.randn(2, 3, 4, 5, dtype=torch.float64)).requires_grad_()
        teacher = 3 * torch.randn(2, 3, 4, 5, dtype=torch.float64)
        mask = random_mask(2, 4, 5) if masked else None
        options = (tau, mask, standardize)
        ours, reference = (f(student, teacher, *options) for f in (cwd_loss, plain_cwd))
        torch.testing.assert_close(ours, reference)
        pair = (torch.autograd.grad(loss, student)[0] for loss in (ours, reference))
        torch.testing.assert_close(*pair)
        assert ours.item() > 0


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(masked, standardize):
    student, teacher = golden()
    mask = random_mask(2, 4, 6) if masked else None
    assert torch.autograd.gradcheck(lambda s: cwd_loss(s, teacher, 2.0, mask, standardize), student)


def test_standardised_by_hand():
    """A channel of +-1 whatever its scale; a constant one is 0 and has a finite gradient."""
    student = torch.tensor([[[[5.0, 9.0]]], [[[9.0, 5.0]]]], dtype=torch.float64)
    teacher = torch.tensor([[[[300.0, 100.0]]], [[[300.0, 100.0]]]], dtype=torch.float64)
    p = torch.tensor([1.0, -1.0], dtype=torch.float64).softmax(0)
    expected = (p * (p / p.flip(0)).log()).sum() / 2  # the first image is reversed
    found = cwd_loss(student, teacher, standardize=True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    flat = torch.full((2, 1, 1, 2), 7.0, dtype=torch.float64, requires_grad=True)
    loss = cwd_loss(flat, teacher, standardize=True)
    loss.backward()
    assert loss.item() == pytest.approx((p * (2 * p).log()).sum().item(), rel=1e-5)
    assert flat.grad.isfinite().all()


def test_standardised_channels_count_alike_whatever_their_scale():
    student, teacher = golden()
    factor, shift = 20 * torch.rand(2, 3, 1, 1).double() + 20, torch.randn(2, 3, 1, 1).double()
    other = teacher * factor[:1] + 9 * shift[:1]
    losses = [cwd_loss(student, x, 1.0, None, True) for x in (teacher, other)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert cwd_loss(student, other) > 1.5 * cwd_loss(student, teacher)
    # images keep their differences: a batch is no list of single images
    alone = sum(
        cwd_loss(s[None], t[None], 1.0, None, True) for s, t in zip(student, teacher, strict=True)
    )
    assert abs(alone / 2 - losses[0]) > 1e-3


def test_equal_maps_give_exactly_zero():
    x = 10 * torch.randn(2, 5, 9, 11)
    student = x.clone().requires_grad_()
    loss = cwd_loss(student, x, 3.0)
    loss.backward()
    assert loss.item() == 0.0 and not student.grad.any()


def test_constants_added_to_channels_do_not_matter_but_scale_does():
    student, teacher = golden()
    before = cwd_loss(student, teacher, 2.0)
    constant = 50 * torch.randn(2, 3, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(cwd_loss(student + constant, teacher - constant, 2.0), before)
    assert abs(cwd_loss(2 * student, teacher, 2.0) - before) > 0.1


def test_a_single_cell_gives_zero():
    student = torch.randn(2, 4, 1, 1, requires_grad=True)
    loss = cwd_loss(student, torch.randn(2, 4, 1, 1))
    loss.backward()
    assert abs(loss.item()) < 1e-6 and not student.grad.any()


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("value", [1e30, float("inf"), float("-inf"), float("nan")])
def test_cells_outside_of_the_mask_do_not_matter(value, standardize):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5).unbind()
    mask = random_mask(2, 4, 5)
    spoilt = [x.masked_fill(~mask, value).requires_grad_() for x in (student, teacher)]
    student.requires_grad_()
    losses = [cwd_loss(*x, 2.0, mask, standardize) for x in ((student, teacher), spoilt)]
    assert torch.equal(*losses)
    clean = torch.autograd.grad(losses[0], student)[0]
    found = torch.autograd.grad(losses[1], spoilt[0])[0]
    assert torch.equal(clean, found) and not found.masked_select(~mask).any()


def test_extreme_logits_stay_finite_and_right():
    """Softmaxes that underflow: the teacher sits on one cell, the student on another."""
    student, teacher = torch.zeros(2, 1, 1, 4, 4)
    student[..., 0, 0], teacher[..., 1, 1] = 1000.0, 1000.0
    student.requires_grad_()
    loss = cwd_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(1000.0, rel=1e-5)
    assert student.grad[0, 0, 0, 0].item() == pytest.approx(1.0)
    assert student.grad[0, 0, 1, 1].item() == pytest.approx(-1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    student, teacher = (x.detach().to(dtype) for x in golden())
    exact = cwd_loss(student.float(), teacher.float(), 2.0)
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cwd_loss(student, teacher, 2.0)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss.detach(), exact)
    assert student.grad.dtype == dtype and student.grad.isfinite().all()


def test_nothing_of_the_maps_size_is_kept_for_the_backward_pass():
    student, teacher = torch.randn(2, 1, 64, 64, 64)
    student.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = cwd_loss(student, teacher)
    new = [x for x in kept if x.data_ptr() not in (student.data_ptr(), teacher.data_ptr())]
    assert sum(x.numel() for x in new) <= 4 * 64
    assert peak_bytes(loss.backward) < 4.5 * student.numel() * 4
