"""FGD's terms against golden numbers, the formulas as published, and finite differences."""

import math

import pytest
import torch
from kd_testing import random_boxes, wave
from modern_inputs import cos, sin

from projects.kd.functional.fgd import attentions, background_scales, box_scales, fgd_terms

WEIGHTS = (1e-3, 5e-4, 5e-4, 5e-6)
BOXES = ([[3.0, 5, 20, 17], [0, 0, 47, 31]], [[10.0, 2, 30, 30]])


def context(x, key, bias, w1, b1, gain, shift, w2, b2):
    """u of a context block, written out."""
    weights = (torch.einsum("nchw,c->nhw", x, key) + bias).flatten(1).softmax(1)
    vector = torch.einsum("ncx,nx->nc", x.flatten(2), weights)
    hidden = torch.nn.functional.layer_norm(vector @ w1.T + b1, (len(b1),), gain, shift)
    return hidden.relu() @ w2.T + b2


def golden_contexts(student, teacher):
    i2, i4 = torch.arange(2, dtype=torch.float64), torch.arange(4, dtype=torch.float64)
    norm = 1 + 0.1 * i2, 0.3 + 0.05 * i2
    ours = context(
        student,
        *(sin(1, 0, 4, factor=0.2), 0.1, sin(0.7, 0, 2, 4, factor=0.5), 0.1 * i2),
        *(*norm, cos(0.9, 0, 4, 2, factor=0.4), 0.02 * i4),
    )
    theirs = context(
        teacher,
        *(cos(1, 0, 4, factor=0.2), -0.1, cos(0.7, 0, 2, 4, factor=0.5), 0.1 * i2),
        *(*norm, sin(0.9, 0, 4, 2, factor=0.4), 0.02 * i4),
    )
    return ours, theirs


def scales(boxes, size, stride=8):
    foreground = box_scales([torch.tensor(x) for x in boxes], size, stride).double()
    return foreground, background_scales(foreground)


def golden(blocks=True):
    shape = (2, 4, 4, 6)
    student, teacher = wave("student", *shape).requires_grad_(), wave("teacher", *shape)
    contexts = golden_contexts(student, teacher) if blocks else (torch.zeros(2, 4).double(),) * 2
    return student, fgd_terms(student, teacher, *contexts, *exact_scales(), 0.5)


def exact_scales():
    """In float64: what box_scales gives in fp32."""
    foreground, background = scales(BOXES, (4, 6))
    return (
        torch.where(foreground > 0, 1 / (1 / foreground).round(), 0.0),
        torch.where(background > 0, 1 / (1 / background).round(), 0.0),
    )


def test_golden_numbers():
    student, terms = golden()
    expected = (26.51215452, 12.90331642, 10.84865000, 633.69858292)
    assert [term.item() for term in terms] == pytest.approx(expected, rel=1e-9)
    total = sum(w * term for w, term in zip(WEIGHTS, terms, strict=True))
    assert total.item() == pytest.approx(0.04155663065, rel=1e-9)
    (gradient,) = torch.autograd.grad(total, student)
    assert gradient[1, 2, 2, 3].item() == pytest.approx(1.05056208e-05, rel=1e-7)


def test_golden_numbers_of_blocks_that_add_nothing():
    """The first dossier's inputs: three channels, context blocks as they start."""
    shape = (2, 3, 4, 6)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    terms = fgd_terms(
        wave("student", *shape), wave("teacher", *shape), zero, zero, *exact_scales(), 0.5
    )
    expected = (22.99130271, 9.96995015, 19.26639148, 446.14345035)
    assert [term.item() for term in terms] == pytest.approx(expected, rel=1e-9)


def published(student, teacher, u_s, u_t, foreground, background, temperature):
    """As the paper writes it: full-size weights and maps with context."""
    n, c, h, w = student.shape
    a_s, a_c = [], []
    for x in (student, teacher):
        a_s.append(h * w * (x.abs().mean(1).flatten(1) / temperature).softmax(1).view(n, 1, h, w))
        a_c.append(c * (x.abs().mean((2, 3)) / temperature).softmax(1).view(n, c, 1, 1))
    weight = a_s[1] * a_c[1] * (student - teacher).square()
    attention = (a_s[0] - a_s[1]).abs().sum() + (a_c[0] - a_c[1]).abs().sum()
    maps = (student + u_s[..., None, None]) - (teacher + u_t[..., None, None])
    terms = (
        (weight * foreground[:, None]).sum(),
        (weight * background[:, None]).sum(),
        attention,
        maps.square().sum(),
    )
    return [term / n for term in terms]


def random_case(seed, requires=True):
    torch.manual_seed(seed)
    student = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=requires)
    teacher = torch.randn(2, 3, 5, 4, dtype=torch.float64) * 2 + 1
    ours = torch.randn(2, 3, dtype=torch.float64, requires_grad=requires)
    theirs = torch.randn(2, 3, dtype=torch.float64, requires_grad=requires)
    boxes = [random_boxes(3, 40, 32, None).tolist(), random_boxes(1, 40, 32, None).tolist()]
    return student, teacher, ours, theirs, *scales(boxes, (5, 4))


def test_values_and_gradients_equal_the_published_form():
    for seed in range(4):
        student, teacher, ours, theirs, *masks = random_case(seed)
        found = fgd_terms(student, teacher, ours, theirs, *masks, 0.8)
        expected = published(student, teacher, ours, theirs, *masks, 0.8)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        mixed = [sum(k * x for k, x in enumerate(terms, 1)) for terms in (found, expected)]
        for a, b in zip(
            *(torch.autograd.grad(x, (student, ours, theirs)) for x in mixed), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(masked):
    student, teacher, ours, theirs, front, back = random_case(0)
    mask = torch.rand(2, 1, 5, 4) > 0.3 if masked else None
    if masked:
        front, teacher = front * mask[:, 0], teacher * mask

    def terms(s, u, v):
        s = s if mask is None else s * mask
        return tuple(fgd_terms(s, teacher, u, v, front, back, 0.5, mask))

    assert torch.autograd.gradcheck(terms, (student, ours, theirs))


def brute_scales(boxes, size, stride):
    result = torch.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            for x1, y1, x2, y2 in boxes:
                rows = math.floor(y1 / stride), math.ceil(y2 / stride)
                columns = math.floor(x1 / stride), math.ceil(x2 / stride)
                if rows[0] <= i <= rows[1] and columns[0] <= j <= columns[1]:
                    area = (rows[1] - rows[0] + 1) * (columns[1] - columns[0] + 1)
                    result[i, j] = max(result[i, j].item(), 1 / area)
    return result


def test_painting_is_the_maximum_over_boxes():
    generator = torch.Generator().manual_seed(0)
    for stride in (4, 8, 32):
        boxes = [random_boxes(count, 64, 80, generator) for count in (7, 0, 1)]
        size = (-(-64 // stride), -(-80 // stride))
        found = box_scales(boxes, size, stride)
        for own, image in zip(boxes, found, strict=True):
            torch.testing.assert_close(image, brute_scales(own.double().tolist(), size, stride))


def test_scales_of_empty_and_of_covered_images():
    foreground = box_scales([torch.zeros(0, 4), torch.tensor([[0.0, 0, 47, 31]])], (4, 6), 8)
    background = background_scales(foreground)
    assert not foreground[0].any() and torch.all(background[0] == torch.tensor(1 / 24))
    assert torch.all(foreground[1] == torch.tensor(1 / 35)) and not background[1].any()
    mask = torch.ones(2, 1, 4, 6, dtype=torch.bool)
    mask[0, :, 2:] = False
    masked = background_scales(foreground, mask)
    assert masked[0].sum().item() == pytest.approx(1)
    assert not masked[0, 2:].any() and not masked[1].any()


def test_attentions_have_a_mean_of_one():
    x = torch.randn(2, 5, 3, 4)
    spatial, channel = attentions(x, 0.5)
    torch.testing.assert_close(spatial.mean((1, 2)), torch.ones(2))
    torch.testing.assert_close(channel.mean(1), torch.ones(2))


def test_a_mask_leaves_what_a_smaller_map_gives():
    student, teacher, ours, theirs, front, back = random_case(1, requires=False)
    small = fgd_terms(student, teacher, ours, theirs, front, back, 0.5)
    student, teacher = (torch.nn.functional.pad(x, (0, 2, 0, 3)) for x in (student, teacher))
    front, back = (torch.nn.functional.pad(x, (0, 2, 0, 3)) for x in (front, back))
    mask = torch.zeros(2, 1, 8, 6, dtype=torch.bool)
    mask[..., :5, :4] = True
    student.requires_grad_()
    large = fgd_terms(student, teacher, ours, theirs, front, back, 0.5, mask)
    for a, b in zip(large, small, strict=True):
        torch.testing.assert_close(a, b)
    (gradient,) = torch.autograd.grad(sum(large), student)
    assert gradient.isfinite().all() and gradient.any()


def test_one_cell():
    """Attention over cells is 1 on both sides, over channels it is not."""
    student = torch.randn(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    teacher, zero = torch.randn(1, 3, 1, 1).double(), torch.zeros(1, 3).double()
    foreground = torch.zeros(1, 1, 1).double()
    terms = fgd_terms(student, teacher, zero, zero, foreground, background_scales(foreground), 0.5)
    assert terms.foreground == 0
    torch.testing.assert_close(terms.context, (student - teacher).square().sum())
    (gradient,) = torch.autograd.grad(sum(terms), student)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    student, teacher, ours, theirs, front, back = (
        x.detach().to(dtype) if k < 2 else x.detach().float() for k, x in enumerate(random_case(2))
    )
    exact = fgd_terms(student.float(), teacher.float(), ours, theirs, front, back, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fgd_terms(student, teacher, ours, theirs, front, back, 0.5)
    assert all(
        torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, exact, strict=True)
    )


def test_no_further_map_is_kept_but_that_of_the_attention():
    student, teacher = torch.randn(2, 1, 64, 64, 64)
    student.requires_grad_()
    zero, scale = torch.zeros(1, 64), torch.zeros(1, 64, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fgd_terms(student, teacher, zero, zero, scale, scale, 0.5)
    new = [x for x in kept if x.data_ptr() not in (student.data_ptr(), teacher.data_ptr())]
    assert sum(x.numel() for x in new) < student.numel() / 4
