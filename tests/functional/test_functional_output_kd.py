"""Terms between predictions against plain loops, by hand, and where everything agrees."""

import math

import pytest
import torch
from kd_testing import random_boxes, wave

from projects.kd.analysis.measure import peak_bytes
from projects.kd.functional.output_kd import (
    box_weight,
    dense_box_loss,
    dense_class_loss,
    jitter_boxes,
    region_box_loss,
    region_class_loss,
)

SHAPES = (2, 2, 3, 4, 5), (2, 2, 3, 2, 3)


def maps(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def plain_class_loss(levels):
    """Element by element, with the weight as a number."""
    total = weight = 0.0
    for student, target, counted in levels:
        for index in torch.cartesian_prod(*(torch.arange(n) for n in student.shape)).tolist():
            n, a, _, i, j = index
            if counted is not None and not counted[n, a, i, j]:
                continue
            q, p = target[tuple(index)].sigmoid(), student[tuple(index)].sigmoid()
            w = (q - p).item() ** 2
            total = total + w * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log())
            weight += w
    return total / weight


@pytest.mark.parametrize("masked", [False, True])
def test_class_loss_and_its_gradient_are_those_of_the_formula(masked):
    student, target = maps(0), maps(1)
    for x in student:
        x.requires_grad_()
    torch.manual_seed(2)
    counted = [torch.rand(2, 2, *s[3:]) > 0.4 if masked else None for s in SHAPES]
    levels = list(zip(student, target, counted, strict=True))
    ours, plain = dense_class_loss(levels), plain_class_loss(levels)
    torch.testing.assert_close(ours, plain)
    found, expected = (torch.autograd.grad(loss, student) for loss in (ours, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_class_loss_golden_number():
    shape = (1, 1, 2, 3, 4)
    loss = dense_class_loss([(wave("student", *shape), wave("teacher", *shape), None)])
    assert loss.item() == pytest.approx(0.66587854, rel=1e-7)


def test_class_loss_where_both_agree_is_0_and_so_is_its_gradient():
    """An assistant starts there: the weights are 0 as well."""
    for dtype in (torch.float32, torch.bfloat16):
        student = [x.requires_grad_() for x in maps(0, dtype)]
        loss = dense_class_loss([(x, x.detach().clone(), None) for x in student])
        loss.backward()
        assert loss.item() == 0
        assert all(x.grad.isfinite().all() and not x.grad.any() for x in student)


def test_class_loss_is_continuous_where_both_begin_to_differ():
    student = [x.requires_grad_() for x in maps(0, torch.float32)]
    previous = math.inf
    for difference in (1e-1, 1e-2, 1e-3, 1e-4):
        loss = dense_class_loss([(x, x.detach() + difference, None) for x in student])
        gradients = torch.autograd.grad(loss, student)
        assert all(g.isfinite().all() for g in gradients)
        size = sum(g.abs().sum() for g in gradients).item()
        assert 0 < size < difference and loss.item() < previous
        previous = loss.item()


def test_what_is_not_counted_may_be_infinite_or_nan():
    for spoiler in (math.inf, math.nan):
        student, target = maps(0), maps(1)
        counted = [torch.ones(2, 2, *s[3:], dtype=torch.bool) for s in SHAPES]
        counted[0][:, :, -1] = False
        levels = list(zip(student, target, counted, strict=True))
        expected = dense_class_loss(levels)
        for x in (student[0], target[0]):
            x[..., -1, :] = spoiler
        student[0].requires_grad_()
        loss = dense_class_loss(levels)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert student[0].grad.isfinite().all() and not student[0].grad[..., -1, :].any()


def test_nothing_counted_gives_0():
    student = torch.randn(1, 1, 2, 3, 3, requires_grad=True)
    nothing = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    loss = dense_class_loss([(student, torch.randn(1, 1, 2, 3, 3), nothing)])
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()


def test_class_loss_keeps_nothing_but_its_inputs():
    """Between forward and backward no map of its own: COCO's logits are 48 MB on p3 alone."""
    student = torch.randn(1, 3, 20, 40, 40, requires_grad=True)
    target = torch.randn(1, 3, 20, 40, 40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        dense_class_loss([(student, target, None)])
    assert sum(x.numel() > 100 for x in kept) == 2
    size = student.numel() * 4
    assert peak_bytes(lambda: dense_class_loss([(student, target, None)]).backward()) < 6 * size


def smooth_l1(a, b):
    sides = [max(b[2] - b[0], 1.0), max(b[3] - b[1], 1.0)] * 2
    far = [abs(x - y) / side for x, y, side in zip(a, b, sides, strict=True)]
    return sum(d * d / 0.2 if d < 0.1 else d - 0.05 for d in far)


def boxes(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    flat = random_boxes(math.prod(shape), 60, 80, generator, dtype=torch.float64)
    return flat.view(*shape, 4)


def test_box_loss_is_the_weighted_mean_of_smooth_l1_in_sides_of_the_target():
    shapes = (2, 1, 3, 4), (2, 1, 1, 2)
    levels, total, weights = [], 0.0, 0.0
    for index, shape in enumerate(shapes):
        target = boxes(10 + index, shape)
        # both branches of the loss
        student = target.lerp(boxes(index, shape), 0.1 + 0.9 * index)
        weight = torch.rand(shape, dtype=torch.float64)
        levels.append((student, target, weight))
        rows = (x.flatten(0, 3).tolist() for x in (student, target))
        for a, b, w in zip(*rows, weight.flatten().tolist(), strict=True):
            total, weights = total + w * smooth_l1(a, b), weights + w
    assert dense_box_loss(levels).item() == pytest.approx(total / weights, rel=1e-6)


def test_the_pull_of_a_box_vanishes_with_its_difference():
    """A GIoU loss would pull with the same force however little boxes differ."""
    target, direction = torch.tensor([10.0, 20.0, 50.0, 40.0]), torch.tensor([1.0, -1.0, 2.0, 1.0])
    norms = []
    for distance in (1.0, 0.01):
        student = (target + distance * direction).view(1, 1, 1, 1, 4).requires_grad_()
        loss = dense_box_loss([(student, target.view(1, 1, 1, 1, 4), torch.ones(1, 1, 1, 1))])
        loss.backward()
        norms.append(student.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0] / 100, rel=1e-3)
    tiny = torch.tensor([10.0, 20.0, 10.2, 20.5]).view(1, 1, 1, 1, 4)  # units of at least a pixel
    moved = dense_box_loss([(tiny + 0.5, tiny, torch.ones(1, 1, 1, 1))])
    assert moved.item() == pytest.approx(4 * (0.5 - 0.05))


def test_boxes_without_weight_give_0_and_no_gradient():
    student = boxes(0, (1, 2, 3, 3)).requires_grad_()
    loss = dense_box_loss([(student, boxes(1, (1, 2, 3, 3)), torch.zeros(1, 2, 3, 3))])
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()


def test_weight_of_a_box():
    probability = torch.tensor([0.01, 0.049, 0.06, 0.9]).view(1, 1, 1, 1, 4)
    logits = torch.cat([probability, probability / 2], dim=2).logit()
    positive = torch.tensor([True, False, False, False]).view(1, 1, 1, 4)
    counted = torch.tensor([True, True, True, False]).view(1, 1, 1, 4)
    expected = torch.tensor([0.01, 0.0, 0.06, 0.0]).view(1, 1, 1, 4)
    torch.testing.assert_close(box_weight(logits, counted, positive), expected)
    expected[..., 0], expected[..., 3] = 0.0, 0.9
    torch.testing.assert_close(box_weight(logits, None, None), expected)
    expected = torch.tensor([0.01, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    torch.testing.assert_close(box_weight(logits, counted, positive, confident=False), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_class_loss_of_regions(temperature):
    student = wave("student", 3, 4).requires_grad_()
    target = wave("teacher", 3, 4)
    expected = 0.0
    for s, t in zip(student, target, strict=True):
        p, q = (torch.softmax(x / temperature, 0) for x in (s, t))
        expected = expected + temperature**2 * (q * (q / p).log()).sum() / 3
    loss = region_class_loss(student, target, temperature)
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.gradcheck(lambda s: region_class_loss(s, target, temperature), student)


def test_box_loss_of_regions():
    student = torch.tensor([[0.5, -2.0, 0.0, 1.0], [9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 3.0, 0.0]])
    foreground = torch.tensor([True, False, True])
    loss = region_box_loss(student, torch.zeros(3, 4), foreground)
    assert loss.item() == pytest.approx((0.125 + 1.5 + 0.5 + 2.5) / 2)


def test_no_region_at_all():
    empty = torch.zeros(0, 4, requires_grad=True)
    total = region_class_loss(empty, torch.zeros(0, 4))
    total = total + region_box_loss(empty, torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool))
    total.backward()
    assert total.item() == 0


@pytest.mark.parametrize("distance", [0.0, 6.0, 12.0])
def test_jitter_moves_boxes_along_the_diagonal(distance):
    original = boxes(0, (1, 2, 10, 10))
    torch.manual_seed(0)
    shift = jitter_boxes(original, distance) - original
    # all corners by the same, the size stays
    torch.testing.assert_close(shift, shift[..., :1].expand_as(shift))
    lengths = shift[..., :2].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, distance))
    if distance:
        assert 0.35 < (shift[..., 0] > 0).double().mean() < 0.65, "forward and back alike"
