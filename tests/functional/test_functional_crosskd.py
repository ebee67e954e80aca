"""CrossKD's alignment and box terms: golden numbers, gradients, degenerate input."""

import math

import pytest
import torch
import torch.nn.functional as F
from kd_testing import wave
from modern_goldens import (
    bins,
    cell,
    dense_boxes,
    dense_labels,
    dense_logits,
    index,
    target_logits,
)

from projects.kd.functional.bckd import confidence, qfl_kd
from projects.kd.functional.crosskd import (
    Statistics,
    align_channels,
    bins_kd,
    channel_statistics,
    largest_gain,
    log_iou_kd,
)

SHAPE = (2, 3, 4, 6)


def maps():
    return wave("student", *SHAPE), wave("teacher", *SHAPE)


@pytest.mark.parametrize(
    ("relu", "value", "element", "gradient"),
    [
        (False, 2.47988956, ((1, 2, 2, 3), -0.89490774), ((1, 2, 2, 3), -1.43228314)),
        (True, 1.41571444, ((1, 1, 2, 0), 2.62714094), ((1, 1, 2, 0), 1.28870544)),
    ],
)
def test_goldens_of_the_alignment(relu, value, element, gradient):
    student, teacher = maps()
    if relu:
        student, teacher = student.relu(), teacher.relu()
    student.requires_grad_()
    aligned = align_channels(student, channel_statistics(teacher))
    total = (aligned * torch.cos(0.11 * index(*SHAPE))).sum()
    total.backward()
    assert total.item() == pytest.approx(value, abs=1e-8)
    assert aligned[element[0]].item() == pytest.approx(element[1], abs=1e-8)
    assert student.grad[gradient[0]].item() == pytest.approx(gradient[1], abs=1e-8)


@pytest.mark.parametrize("masked", [False, True])
def test_alignment_gives_the_targets_statistics_and_its_own_gradient(masked):
    student, teacher = maps()
    mask = None
    if masked:
        mask = torch.ones(2, 1, 4, 6, dtype=torch.bool)
        mask[0, :, 3:], mask[1, :, :, 4:] = False, False
    target = channel_statistics(teacher, mask)
    aligned = align_channels(student, target, mask)
    found = channel_statistics(aligned, mask)
    torch.testing.assert_close(found.mean, target.mean)
    torch.testing.assert_close(found.deviation, target.deviation, rtol=1e-5, atol=0)
    # of these cells alone
    cells = mask.expand_as(student) if masked else torch.ones_like(student, dtype=torch.bool)
    picked = [teacher[:, c][cells[:, c]] for c in range(3)]
    torch.testing.assert_close(target.deviation, torch.stack([x.std() for x in picked]))
    assert not aligned[~cells].any()
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: align_channels(s, target, mask), student)


@pytest.mark.parametrize("spoiler", [math.inf, math.nan])
def test_what_lies_outside_the_mask_may_be_anything(spoiler):
    student, teacher = maps()
    mask = torch.ones(2, 1, 4, 6, dtype=torch.bool)
    mask[1, :, :, 3:] = False
    results = []
    for fill in (0.0, spoiler):
        own, theirs = (x.masked_fill(~mask, fill).requires_grad_() for x in (student, teacher))
        aligned = align_channels(own, channel_statistics(theirs, mask), mask)
        aligned.square().sum().backward()
        assert theirs.grad is None
        results.append((aligned.detach(), own.grad))
    for clean, spoilt in zip(*results, strict=True):
        assert torch.equal(clean, spoilt)


def test_a_single_cell_becomes_the_targets_mean_without_gradient():
    student = torch.randn(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    target = channel_statistics(torch.randn(1, 3, 1, 1, dtype=torch.float64))
    assert not target.deviation.any() and target.mean.any()
    for statistics in (target, Statistics(target.mean, torch.ones(3))):
        aligned = align_channels(student, statistics)
        assert torch.equal(aligned.flatten(), target.mean)
        aligned.square().sum().backward()
        assert not student.grad.any()


def test_a_dead_channel_is_finite_and_seen():
    student, teacher = maps()
    student[:, 1] = 0.0
    student.requires_grad_()
    target = channel_statistics(teacher)
    aligned = align_channels(student, target)
    torch.testing.assert_close(aligned[:, 1], target.mean[1].expand(2, 4, 6))
    aligned.square().sum().backward()
    assert student.grad.isfinite().all()
    assert largest_gain(student, target).item() == pytest.approx(target.deviation[1].item() * 1e6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_and_alignment_of_half_precision_are_in_fp32(dtype):
    student, teacher = (x.to(dtype) for x in maps())
    aligned = align_channels(student, channel_statistics(teacher))
    expected = align_channels(student.float(), channel_statistics(teacher.float()))
    assert aligned.dtype == torch.float32 and torch.equal(aligned, expected)


def test_goldens_on_fcos():
    boxes, target = dense_boxes()
    boxes.requires_grad_()
    counted, positive = dense_labels()
    place = index(2, 2, 4, 5)
    divisor = (0.5 + 0.4 * torch.sin(0.2 * place))[positive].sum()
    assert divisor.item() == pytest.approx(3.52259241, abs=1e-8)
    logits = dense_logits()
    classes = qfl_kd([(*logits, None)], divisor)
    assert classes.item() == pytest.approx(20.50835921, rel=1e-9)
    loss = log_iou_kd([(boxes, target, confidence(logits[1], None))], divisor)
    assert loss.item() == pytest.approx(4.31729322, rel=1e-8)
    loss.backward()
    assert boxes.grad[1, 0, 2, 3, 0].item() == pytest.approx(-0.00898070, abs=5e-9)
    assert torch.autograd.gradcheck(
        lambda b: log_iou_kd([(b, target, confidence(logits[1], counted))], 3.0), boxes
    )


def test_log_iou_ends_and_targets_without_area_do_not_count():
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4]], requires_grad=True)
    target = torch.tensor([[9.0, 9, 12, 12], [1, 1, 1, 3]])
    loss = log_iou_kd([(boxes, target, torch.ones(2))], 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-6), rel=1e-6)
    assert not boxes.grad.any()


def test_goldens_on_gfl():
    student, target = bins()
    student.requires_grad_()
    counted = torch.arange(24).view(2, 3, 4) % 7 != 3
    logits = target_logits(2, 3, 3, 4)[:, None]
    weight = confidence(logits, counted[:, None])[:, 0]
    assert weight.sum().item() == pytest.approx(9.87389638, rel=1e-8)
    total, found = bins_kd([(student, target, weight)])
    assert found == weight.sum()
    (total / found).backward()
    assert (total / found).item() == pytest.approx(0.88708761, abs=5e-9)
    n, h, w = cell(12)
    assert student.grad[n, 1, 3, h, w].item() == pytest.approx(0.000236424822, abs=5e-12)
    assert torch.autograd.gradcheck(lambda s: bins_kd([(s, target, weight)])[0], student)
    plain = F.kl_div(student.log_softmax(2), target.softmax(2), reduction="none").sum((1, 2))
    torch.testing.assert_close(total, (plain * weight).sum() / 4)


@pytest.mark.parametrize("spoiler", [math.inf, math.nan])
def test_bins_of_weight_0_may_be_anything(spoiler):
    student, target = bins()
    weight = torch.ones(2, 3, 4, dtype=torch.float64)
    weight[1, 2] = 0.0
    expected, _ = bins_kd([(student, target, weight)])
    for x in (student, target):
        x[1, :, :, 2] = spoiler
    student.requires_grad_()
    loss, _ = bins_kd([(student, target, weight)])
    loss.backward()
    assert torch.equal(loss, expected)
    assert student.grad.isfinite().all() and not student.grad[1, :, :, 2].any()


def test_bins_keep_nothing_but_their_inputs():
    student = torch.randn(1, 4, 17, 20, 20, requires_grad=True)
    target, weight = torch.randn(1, 4, 17, 20, 20), torch.rand(1, 20, 20)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        bins_kd([(student, target, weight)])
    assert sum(x.numel() > 1000 for x in kept) == 2


@pytest.mark.parametrize(
    ("post", "value", "slope"), [(True, 1.57698289, 0.02160194), (False, 1.63953217, 0.04112307)]
)
def test_goldens_of_the_whole_chain(post, value, slope):
    """k = 1 of 2 convolutions: the student's map through the teacher's second and its predictor."""
    own, theirs = wave("student", 2, 3, 4, 5).requires_grad_(), wave("teacher", 2, 3, 4, 5)
    weight, bias = index(3, 3, 3, 3), index(3)
    ours = F.conv2d(own, 0.4 * (0.9 * weight + 0.1).sin(), 0.1 * bias.sin(), padding=1)
    teacher = F.conv2d(theirs, 0.4 * (0.8 * weight).cos(), 0.1 * bias.cos(), padding=1)

    def rest(maps):
        maps = F.conv2d(maps, 0.35 * (0.7 * weight + 0.5).sin(), 0.05 * bias.cos(), padding=1)
        predictor = 0.5 * (1.1 * index(2, 3, 3, 3) - 0.3).cos()
        minus_one = torch.full((2,), -1.0, dtype=torch.float64)
        return F.conv2d(maps.relu(), predictor, minus_one, padding=1)[:, None]

    pair = (ours.relu(), teacher.relu()) if post else (ours, teacher)
    crossed = align_channels(pair[0], channel_statistics(pair[1])).relu()
    loss = qfl_kd([(rest(crossed), rest(teacher.relu()), None)], 5.0)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=5e-9)
    assert own.grad[1, 2, 2, 3].item() == pytest.approx(slope, abs=5e-9)
