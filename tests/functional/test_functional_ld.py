"""LD's terms and its region: golden numbers, gradients, plain loops, degenerate input."""

import pytest
import torch
from modern_goldens import bins, student_logits, target_logits

from projects.kd.functional.atss import atss_assign, atss_candidates
from projects.kd.functional.ld import class_divergence, side_divergence, valuable_region

POSITIVE = torch.arange(24) % 5 == 0
BOXES = torch.tensor(
    [[6.3, 9.1, 70.2, 77.4], [41.7, 2.6, 101.4, 60.9], [58.2, 44.9, 77.1, 66.3]],
    dtype=torch.float64,
)


def rows(maps):
    """(24, ...) of maps (2, ..., 3, 4)."""
    return maps.movedim((-2, -1), (1, 2)).flatten(0, 2)


def golden_rows():
    sides = [rows(x) for x in bins()]
    classes = [rows(x(2, 3, 3, 4)) for x in (student_logits, target_logits)]
    return sides, classes


def grid(rows, columns, stride, side):
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centre = torch.stack([x, y], dim=2).view(-1, 2).double() * stride
    return torch.cat([centre - side / 2, centre + side / 2], dim=1)


def golden_anchors():
    return grid(10, 14, 8, 64), grid(5, 7, 16, 128)


def test_goldens_at_positives():
    (student, target), (classes, other) = golden_rows()
    student.requires_grad_(), classes.requires_grad_()
    weight = classes.sigmoid().amax(1).detach()
    weight = weight * POSITIVE
    assert weight.sum().item() == pytest.approx(2.66902220, abs=5e-9)
    loss = 0.25 * side_divergence(student, target, weight) / 4
    assert loss.item() == pytest.approx(0.17865676, abs=5e-9)
    assert (loss / weight.sum()).item() == pytest.approx(0.06693716, abs=5e-9)
    loss.backward()
    assert student.grad[5, 2, 1].item() == pytest.approx(-0.00175499429, abs=5e-12)
    loss = 10 * class_divergence(classes[POSITIVE], other[POSITIVE]) / POSITIVE.sum()
    loss.backward()
    assert loss.item() == pytest.approx(2.60027074, abs=5e-9)
    assert classes.grad[5, 1].item() == pytest.approx(-0.23689891, abs=5e-9)


def test_gradients():
    (student, target), (classes, other) = golden_rows()
    weight = torch.rand(3, dtype=torch.float64)
    small = student[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: side_divergence(s, target[:3], weight, 4.0), small)
    small = classes[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: class_divergence(s, other[:3]), small)


@pytest.mark.parametrize(
    ("distance", "sizes", "weights", "positives"),
    [
        ("paper", (95, 27), (38.23015577, 6.64292904), 4),
        ("released", (119, 28), (39.54462524, 6.87740290), 8),
    ],
)
def test_goldens_of_the_region(distance, sizes, weights, positives):
    anchors = golden_anchors()
    candidates = atss_candidates(anchors, BOXES)
    expected = torch.tensor([0.72508044, 0.69511074, 0.09981866], dtype=torch.float64)
    torch.testing.assert_close(candidates.threshold, expected, rtol=0, atol=5e-9)
    index = atss_assign(anchors, BOXES)
    counts = [len(x) for x in anchors]
    assert [(x >= 0).sum().item() for x in index.split(counts)] == [8, 0]
    weight = valuable_region(torch.cat(anchors), BOXES, candidates, distance)
    parts = weight.split(counts)
    assert tuple((x > 0).sum().item() for x in parts) == sizes
    for part, value in zip(parts, weights, strict=True):
        assert part.sum().item() == pytest.approx(value, abs=5e-9)
    assert ((weight > 0) & (index >= 0)).sum() == positives


@pytest.mark.parametrize("distance", ["paper", "released"])
def test_the_region_is_that_of_a_plain_loop(distance):
    torch.manual_seed(0)
    corner = torch.rand(7, 2, dtype=torch.float64) * 80
    boxes = torch.cat([corner, corner + 4 + 60 * torch.rand(7, 2, dtype=torch.float64)], dim=1)
    anchors = torch.cat(golden_anchors())
    candidates = atss_candidates(golden_anchors(), boxes)
    found = valuable_region(anchors, boxes, candidates, distance)
    for place in range(0, len(anchors), 3):
        best = 0.0
        ax1, ay1, ax2, ay2 = anchors[place].tolist()
        for box, threshold in zip(boxes.tolist(), candidates.threshold.tolist(), strict=True):
            x1, y1, x2, y2 = box
            overlap = max(min(x2, ax2) - max(x1, ax1), 0) * max(min(y2, ay2) - max(y1, ay1), 0)
            area = (ax2 - ax1) * (ay2 - ay1)
            iou = overlap / (area + (x2 - x1) * (y2 - y1) - overlap)
            rho = ((x1 + x2 - ax1 - ax2) ** 2 + (y1 + y2 - ay1 - ay2) ** 2) / 4
            hull = (max(x2, ax2) - min(x1, ax1)) ** 2 + (max(y2, ay2) - min(y1, ay1)) ** 2
            near = (iou if distance == "paper" else overlap / area) - rho / hull
            if 0.25 * threshold <= near < threshold:
                best = max(best, iou)
        assert found[place].item() == pytest.approx(best, abs=1e-12)


def test_nothing_to_compare():
    anchors = torch.cat(golden_anchors())
    none = BOXES[:0]
    candidates = atss_candidates(golden_anchors(), none)
    assert not valuable_region(anchors, none, candidates).any()
    # a single candidate has no deviation, as in the assignment
    single = atss_candidates([anchors[:1]], BOXES)
    assert single.threshold.isfinite().all()
    sides, classes = (torch.zeros(0, *x, requires_grad=True) for x in ((4, 5), (3,)))
    loss = side_divergence(sides, sides, torch.zeros(0)) + class_divergence(classes, classes)
    loss.backward()
    assert loss.item() == 0 and sides.grad.shape == sides.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    (student, target), (classes, other) = golden_rows()
    weight = torch.ones(24)
    for loss in (
        side_divergence(student.to(dtype), target.to(dtype), weight),
        class_divergence(classes.to(dtype), other.to(dtype)),
    ):
        assert loss.dtype == torch.float32 and loss.isfinite()
