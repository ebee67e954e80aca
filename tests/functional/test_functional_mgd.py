"""MGD's loss against its golden number; the random mask."""

import pytest
import torch
from kd_testing import wave
from modern_inputs import cos, sin
from torch.nn.functional import conv2d

from projects.kd.functional.mgd import mgd_loss, random_cells
from projects.kd.seeding import STEP, seed_generators


def generate(x):
    first = sin(0.5, 0.2, 3, 3, 3, 3, factor=0.3), sin(1, 1, 3, factor=0.1)
    second = cos(0.6, 0, 3, 3, 3, 3, factor=0.3), cos(1, 0, 3, factor=0.1)
    return conv2d(conv2d(x, *first, padding=1).relu(), *second, padding=1)


def test_golden_numbers():
    shape = (2, 3, 4, 6)
    student, teacher = wave("student", *shape).requires_grad_(), wave("teacher", *shape)
    kept = (torch.arange(48) % 3 != 1).view(2, 1, 4, 6)
    assert kept.sum() == 32
    loss = mgd_loss(generate(student * kept), teacher)
    assert loss.item() == pytest.approx(356.44655341, rel=1e-9)
    assert mgd_loss(generate(student), teacher).item() == pytest.approx(382.84142980, rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[1, 0, 0, 5].item() == pytest.approx(-0.51981010, rel=1e-7)
    assert not gradient.masked_select(~kept).any()


def test_gradients_are_those_of_finite_differences():
    student = torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher, mask = torch.randn(1, 3, 3, 4).double(), torch.rand(1, 1, 3, 4) > 0.3
    for own in (None, mask):
        assert torch.autograd.gradcheck(lambda s, m=own: mgd_loss(generate(s), teacher, m), student)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_cells_outside_of_the_mask_do_not_matter(value):
    generated, teacher = torch.randn(2, 2, 3, 4, 5).unbind()
    mask = torch.rand(2, 1, 4, 5) > 0.4
    expected = sum(
        (generated[n, :, i, j] - teacher[n, :, i, j]).square().sum()
        for n, _, i, j in mask.nonzero()
    )
    spoilt = [x.masked_fill(~mask, value) for x in (generated, teacher)]
    torch.testing.assert_close(mgd_loss(*spoilt, mask), expected / 2)


def test_sums_that_overflow_half_precision_are_finite():
    x = torch.full((1, 64, 32, 32), 10.0, dtype=torch.float16)
    assert mgd_loss(x, -x).item() == pytest.approx(400 * x.numel())


def test_the_mask_is_a_function_of_the_step():
    like = torch.zeros(2, 7, 40, 50)
    seed_generators(STEP, 3, 11, 0, 0)
    first = random_cells(like, 0.65)
    assert first.shape == (2, 1, 40, 50) and first.dtype == torch.bool
    assert not torch.equal(random_cells(like, 0.65), first), "drawn anew"
    torch.rand(5)
    seed_generators(STEP, 3, 11, 0, 0)
    assert torch.equal(random_cells(like, 0.65), first)
    seed_generators(STEP, 3, 12, 0, 0)
    assert not torch.equal(random_cells(like, 0.65), first)
    # 4000 draws: four deviations are 0.03
    assert first.float().mean().item() == pytest.approx(0.35, abs=0.03)
    assert random_cells(like, 0.0).all() and not random_cells(like, 1.0).any()
