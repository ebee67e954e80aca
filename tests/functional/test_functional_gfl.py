"""Quality focal loss, distribution focal loss and ATSS against hand-computed cases and loops."""

import math

import pytest
import torch
from kd_testing import random_boxes
from torch.autograd import gradcheck

from projects.kd.functional.atss import atss_assign
from projects.kd.functional.gfl import (
    boxes_to_sides,
    distribution_focal_loss,
    integral,
    quality_focal_loss,
    sides_to_boxes,
)


def test_quality_focal_loss_by_hand():
    """Probability 1/2 everywhere, two classes; the first location has quality 0.8 for class 1.

    BCE is ln 2 whatever the target. Factors: |0.8 - 0.5|^2 and 0.5^2 for the other class;
    background 2 * 0.5^2.
    """
    found = quality_focal_loss(torch.zeros(2, 2), torch.tensor([1, 2]), torch.tensor([0.8, 0.3]))
    expected = [math.log(2) * (0.09 + 0.25), math.log(2) * 0.5]
    assert found.tolist() == pytest.approx(expected)


def test_quality_focal_loss_is_least_at_the_quality():
    logits = torch.linspace(-4, 4, 401)[:, None]
    labels = torch.zeros(401, dtype=torch.long)
    loss = quality_focal_loss(logits, labels, torch.full((401,), 0.7))
    assert logits[loss.argmin()].sigmoid().item() == pytest.approx(0.7, abs=0.01)
    assert loss.min().item() == pytest.approx(0.0, abs=1e-4)


def test_distribution_focal_loss_by_hand():
    """Uniform over 5 bins: ln 5 for every target. All mass on bin 2 costs 0 for target 2."""
    targets = torch.tensor([0.0, 1.3, 3.5])
    found = distribution_focal_loss(torch.zeros(3, 5), targets)
    assert found.tolist() == pytest.approx([math.log(5)] * 3)
    peak = torch.tensor([[0.0, 0.0, 60.0, 0.0, 0.0]])
    assert distribution_focal_loss(peak, torch.tensor([2.0])).item() == pytest.approx(0.0)
    # target 2.25: three quarters of the cross-entropy with bin 2, one quarter of that with bin 3
    assert distribution_focal_loss(peak, torch.tensor([2.25])).item() == pytest.approx(15.0)
    # targets beyond the last bin are cut to 3.9, negative ones to 0
    assert distribution_focal_loss(peak, torch.tensor([99.0])).item() == pytest.approx(60.0)
    assert distribution_focal_loss(peak, torch.tensor([-1.0])).item() == pytest.approx(60.0)


def test_distribution_focal_loss_pulls_the_integral_to_the_target():
    bins = torch.zeros(1, 8, requires_grad=True)
    optimizer = torch.optim.Adam([bins], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        distribution_focal_loss(bins, torch.tensor([4.3])).sum().backward()
        optimizer.step()
    sides = integral(bins.detach().repeat(1, 4))
    assert sides[0].tolist() == pytest.approx([4.3] * 4, abs=0.05)


def test_integral_and_boxes_by_hand():
    bins = torch.full((1, 4, 3), -80.0)
    bins[0, [0, 1, 2, 3], [0, 1, 2, 2]] = 0.0
    bins[0, 3, 1] = 0.0  # half on 1, half on 2
    sides = integral(bins.flatten(1))
    assert sides[0].tolist() == pytest.approx([0.0, 1.0, 2.0, 1.5])
    point = torch.tensor([[10.0, 20.0]])
    boxes = sides_to_boxes(point, sides * 8)
    assert boxes[0].tolist() == pytest.approx([10, 12, 26, 32])
    torch.testing.assert_close(boxes_to_sides(point, boxes), sides * 8)


def test_gradients():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    labels, quality = torch.tensor([0, 4, 2]), torch.rand(3, dtype=torch.float64)
    assert gradcheck(lambda x: quality_focal_loss(x, labels, quality), logits)
    bins = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0.4, 2.6, 3.1], dtype=torch.float64)
    assert gradcheck(lambda x: distribution_focal_loss(x, target), bins)


# --- ATSS ---------------------------------------------------------------------------------------


def grid(side, stride, size=64):
    """Square anchors of a side around the multiples of a stride."""
    y, x = torch.meshgrid(*(torch.arange(0, size, stride, dtype=torch.float32),) * 2, indexing="ij")
    centre = torch.stack([x.flatten(), y.flatten()], 1)
    return torch.cat([centre - side / 2, centre + side / 2], 1)


def test_atss_by_hand():
    """Three anchors of 8 x 8 in a row at 0, 8 and 16, a box that is the middle one.

    IoUs 0, 1, 0 (neighbours touch): mean 1/3, deviation sqrt(1/3) = 0.577; only the middle reaches
    0.91. A box of 8 x 8 between the first two has IoU 1/3, 1/3, 0 with them: mean 2/9, deviation
    0.192, threshold 0.415: nobody.
    """
    row = torch.tensor([[-4.0, 0, 4, 8], [4, 0, 12, 8], [12, 0, 20, 8]])
    assert atss_assign([row], torch.tensor([[4.0, 0, 12, 8]])).tolist() == [-1, 0, -1]
    assert atss_assign([row], torch.tensor([[0.0, 0, 8, 8]])).tolist() == [-1, -1, -1]


def test_centres_outside_of_the_box_are_no_candidates():
    """A thin box: the anchor with the best IoU has its centre beside it."""
    row = torch.tensor([[0.0, 0, 8, 8], [60, 60, 64, 64], [80, 80, 84, 84]])
    assert atss_assign([row], torch.tensor([[5.0, 0, 8, 8]])).tolist() == [-1, -1, -1]
    assert atss_assign([row], torch.tensor([[3.0, 0, 8, 8]])).tolist() == [0, -1, -1]


def test_atss_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    levels = [grid(8.0 * s, s) for s in (8, 16, 32)]
    every = torch.cat(levels)
    claimed = 0
    for _ in range(20):
        boxes = random_boxes(6, 64, 64, generator, smallest=12.0)
        best = {}
        for j, box in enumerate(boxes.tolist()):
            centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            candidates, start = [], 0
            for level in levels:
                rank = sorted(range(len(level)), key=lambda i: _distance(level[i], centre))
                candidates += [start + i for i in rank[:4]]
                start += len(level)
            overlaps = [_iou(every[i].tolist(), box) for i in candidates]
            mean = sum(overlaps) / len(overlaps)
            spread = math.sqrt(sum((x - mean) ** 2 for x in overlaps) / (len(overlaps) - 1))
            for i, overlap in zip(candidates, overlaps, strict=True):
                x, y = _centre(every[i])
                inside = box[0] < x < box[2] and box[1] < y < box[3]
                if overlap >= mean + spread and inside and overlap > best.get(i, (-1,))[0]:
                    best[i] = (overlap, j)
        expected = [best[i][1] if i in best else -1 for i in range(len(every))]
        claimed += len(best)
        assert atss_assign(levels, boxes, topk=4).tolist() == expected
    assert claimed > 100


def test_candidates_are_the_nearest_far_from_the_origin_too():
    """Centres 0.02 pixels nearer to one anchor than to its neighbour, at 1300 pixels."""
    x = 1200.0 + 8 * torch.arange(40)
    y = torch.full_like(x, 1300.0)
    row = torch.stack([x - 4, y - 4, x + 4, y + 4], 1)
    nearest = torch.arange(30) + 5
    centre = x[nearest] + 3.99 * torch.where(nearest % 2 == 0, 1.0, -1.0)
    boxes = torch.stack([centre - 6, y[:30] - 6, centre + 6, y[:30] + 6], 1)
    for number in (1, 2, 30):  # few boxes and many: torch chooses another form by itself
        chosen = atss_assign([row], boxes[:number], topk=1)
        claimed = chosen >= 0
        assert claimed.sum() == number
        assert torch.equal(nearest[chosen[claimed]], claimed.nonzero()[:, 0])


def _centre(anchor):
    return (anchor[0] + anchor[2]).item() / 2, (anchor[1] + anchor[3]).item() / 2


def _distance(anchor, centre):
    x, y = _centre(anchor)
    return math.hypot(x - centre[0], y - centre[1])


def _iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area - width * height)


def test_no_box_and_a_level_of_one_cell():
    levels = [grid(8.0 * 8, 8), torch.tensor([[0.0, 0, 64, 64]])]
    assert (atss_assign(levels, torch.zeros(0, 4)) == -1).all()
    alone = atss_assign(levels[1:], torch.tensor([[10.0, 10, 60, 60]]))
    assert alone.tolist() == [0], "one candidate: no deviation"
