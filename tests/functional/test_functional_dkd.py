"""DKD's loss against golden numbers, the formula with probabilities, and finite differences."""

import pytest
import torch
from modern_inputs import rows

from projects.kd.functional.dkd import dkd_loss


@pytest.mark.parametrize(
    ("temperature", "binary", "others", "total", "gradient"),
    [
        (1.0, 0.48728399, 1.01566707, 0.74120075, 0.05898250),
        (4.0, 0.57926232, 1.33101205, 0.91201534, 0.05712190),
    ],
)
def test_golden_numbers(temperature, binary, others, total, gradient):
    student, teacher, classes = rows()
    student.requires_grad_()
    for alpha, beta, value in ((1, 0, binary), (0, 1, others), (1, 0.25, total)):
        loss = dkd_loss(student, teacher, classes, alpha, beta, temperature)
        assert loss.item() == pytest.approx(value, abs=6e-9)
    found = torch.autograd.grad(loss, student)[0][2, 1]
    assert found.item() == pytest.approx(gradient, abs=6e-9)


def test_with_both_factors_of_the_plain_divergence_it_is_the_plain_divergence():
    """KL = KL of the binary part + (1 - p_y) KL of the rest, row by row."""
    student, teacher, classes = rows()
    total = 0.0
    for row in range(len(classes)):
        one = student[row : row + 1], teacher[row : row + 1], classes[row : row + 1]
        rest = 1 - teacher[row].softmax(0)[classes[row]].item()
        total = total + dkd_loss(*one, alpha=1.0, beta=rest)
    plain = torch.nn.functional.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(total / len(classes), plain)
    assert plain.item() == pytest.approx(1.15914853, abs=6e-9)


def by_probabilities(student, teacher, classes, alpha, beta):
    total = 0.0
    for s, t, y in zip(student.softmax(1), teacher.softmax(1), classes, strict=True):
        keep = torch.arange(len(s)) != y
        total = total + alpha * (t[y] * (t[y] / s[y]).log())
        total = total + alpha * ((1 - t[y]) * ((1 - t[y]) / (1 - s[y])).log())
        q_s, q_t = s[keep] / s[keep].sum(), t[keep] / t[keep].sum()
        total = total + beta * (q_t * (q_t / q_s).log()).sum()
    return total / len(classes)


def test_value_and_gradient_equal_the_formula():
    for seed in range(3):
        torch.manual_seed(seed)
        student = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
        teacher, classes = 2 * torch.randn(7, 4).double(), torch.randint(0, 4, (7,))
        pair = [f(student, teacher, classes, 0.7, 1.3) for f in (dkd_loss, by_probabilities)]
        torch.testing.assert_close(*pair)
        torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in pair))


def test_gradients_are_those_of_finite_differences():
    student, teacher, classes = rows()
    assert torch.autograd.gradcheck(
        lambda s: dkd_loss(s, teacher, classes, temperature=2.0), student.requires_grad_()
    )


def test_probabilities_that_underflow_stay_finite():
    """Where p_y or 1 - p_y is 0 in fp32, logarithms of probabilities would be infinite."""
    teacher = torch.tensor([[300.0, 0, -5], [-300, 0, 1], [0, 200, 0]])
    student = -teacher.clone()
    student.requires_grad_()
    loss = dkd_loss(student, teacher, torch.tensor([0, 0, 1]))
    loss.backward()
    exact = dkd_loss(student.detach().double(), teacher.double(), torch.tensor([0, 0, 1]))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6) and loss > 50
    assert student.grad.isfinite().all() and student.grad.any()


def test_one_class_and_the_background_leave_the_binary_part():
    student, teacher = torch.randn(2, 5, 2)
    student.requires_grad_()
    classes = torch.tensor([0, 1, 1, 0, 1])
    rest = dkd_loss(student, teacher, classes, alpha=0.0, beta=1.0)
    assert rest.item() == 0.0 and not torch.autograd.grad(rest, student)[0].any()
    plain = torch.nn.functional.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(dkd_loss(student, teacher, classes), plain)


def test_equal_logits_and_no_regions():
    x = torch.randn(4, 5, requires_grad=True)
    loss = dkd_loss(x, x.detach(), torch.tensor([0, 1, 4, 2]))
    assert loss.item() == 0.0 and torch.autograd.grad(loss, x)[0].abs().max() < 1e-7
    empty = torch.zeros(0, 5, requires_grad=True)
    loss = dkd_loss(empty, torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0 and empty.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    student, teacher, classes = rows()
    student, teacher = student.to(dtype), teacher.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dkd_loss(student, teacher, classes)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, dkd_loss(student.float(), teacher.float(), classes))
