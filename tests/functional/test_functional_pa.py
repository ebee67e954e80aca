"""PA: the channel form against the matrix of all pairs, also where both sides nearly agree."""

import pytest
import torch
import torch.nn.functional as F
from kd_testing import wave

from projects.kd.analysis.measure import peak_bytes
from projects.kd.functional import pa as module
from projects.kd.functional.pa import pa_loss


def plain_pa(student, teacher, pool=0.0, lengths=None):
    """With the P x P matrices; ``lengths`` of the student's vectors are constants if given."""
    if pool:
        kernel = [int(pool * side) for side in student.shape[-2:]]
        student, teacher = (
            F.max_pool2d(x, kernel, stride=kernel, ceil_mode=True) for x in (student, teacher)
        )

    def similarities(values, norm=None):
        values = values.flatten(2)
        norm = values.detach().norm(dim=1, keepdim=True) if norm is None else norm
        values = values / (norm + 1e-8)
        return values.mT @ values

    gap = similarities(student, lengths) - similarities(teacher)
    return gap.square().mean((1, 2)).mean()


@pytest.mark.parametrize(("pool", "value"), [(0.0, 0.76152934), (0.5, 0.41298976)])
def test_golden_numbers(pool, value):
    student, teacher = wave("student", 2, 3, 4, 6), wave("teacher", 2, 3, 4, 6)
    assert pa_loss(student, teacher, pool).item() == pytest.approx(value, rel=5e-8)


@pytest.mark.parametrize("chunk", [2**19, 8])
@pytest.mark.parametrize("channels", [3, 5, 2])
@pytest.mark.parametrize("pool", [0.0, 0.5])
def test_value_and_gradient_equal_the_matrix_of_pairs(pool, channels, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    for seed in range(3):
        torch.manual_seed(seed)
        student = torch.randn(2, 3, 4, 7, dtype=torch.float64).requires_grad_()
        teacher = torch.randn(2, channels, 4, 7, dtype=torch.float64)
        ours, reference = pa_loss(student, teacher, pool), plain_pa(student, teacher, pool)
        assert ours.item() == pytest.approx(reference.item(), rel=1e-9)
        pair = (torch.autograd.grad(x, student)[0] for x in (ours, reference))
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("channels", [3, 4])
def test_gradients_are_those_of_finite_differences_with_constant_lengths(channels):
    student = wave("student", 2, 3, 3, 4).requires_grad_()
    teacher = wave("teacher", 2, channels, 3, 4)
    lengths = student.detach().flatten(2).norm(dim=1, keepdim=True)
    found = torch.autograd.grad(pa_loss(student, teacher), student)[0]
    step = 1e-6
    for position in torch.cartesian_prod(*map(torch.arange, student.shape)).tolist()[::5]:
        n, c, y, x = position
        change = torch.zeros_like(student)
        change[n, c, y, x] = step
        with torch.no_grad():
            high, low = (plain_pa(student + s * change, teacher, 0.0, lengths) for s in (1, -1))
        numeric = ((high - low) / (2 * step)).item()
        assert found[n, c, y, x].item() == pytest.approx(numeric, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("channels", [32, 40])
@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-3, 1e-4])
def test_fp32_is_exact_where_student_and_teacher_nearly_agree(gap, channels):
    """Against float64 on the same numbers; features of low rank, where a naive form loses most."""
    torch.manual_seed(0)
    basis = torch.randn(2, 32, 4)
    teacher = (basis @ torch.randn(2, 4, 30 * 20)).view(2, 32, 30, 20)
    student = teacher + gap * torch.randn(2, 32, 30, 20)
    if channels != 32:  # the same similarities in other channels
        teacher = torch.cat([teacher, torch.zeros(2, channels - 32, 30, 20)], dim=1)
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    ours, reference = pa_loss(student, teacher), plain_pa(exact, teacher.double())
    assert ours.item() == pytest.approx(reference.item(), rel=1e-5)
    found, expected = (
        torch.autograd.grad(ours, student)[0],
        torch.autograd.grad(reference, exact)[0],
    )
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_a_rotation_of_the_channels_does_not_matter():
    torch.manual_seed(0)
    teacher = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    student = torch.einsum("dc,nchw->ndhw", rotation, teacher)
    assert pa_loss(student, teacher).item() == pytest.approx(0.0, abs=1e-12)


def test_a_mask_is_the_same_as_a_smaller_map():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 3, 4, 7, dtype=torch.float64)
    mask = torch.zeros(1, 1, 6, 8, dtype=torch.bool)
    mask[..., :4, :7] = True
    wide = [F.pad(x, (0, 1, 0, 2), value=9.0) for x in (student, teacher)]
    expected = pa_loss(student, teacher)
    torch.testing.assert_close(pa_loss(*wide, 0.0, mask), expected)


def test_memory_beyond_the_inputs_on_a_large_map():
    """Never a matrix of pairs: here it would have 268 MB."""
    student, teacher = torch.randn(2, 1, 64, 64, 128)
    student.requires_grad_()
    assert peak_bytes(lambda: pa_loss(student, teacher).backward()) < 40e6
