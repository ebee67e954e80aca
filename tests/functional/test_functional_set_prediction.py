"""Set prediction: costs, losses and assignment against loops and other libraries."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from fvcore.nn import giou_loss, sigmoid_focal_loss_jit
from kd_testing import instances, random_boxes

from projects.kd.errors import TrainingError
from projects.kd.functional.set_prediction import (
    assign,
    box_cost,
    box_losses,
    cxcywh_to_xyxy,
    focal_cost,
    generalized_iou,
    sigmoid_focal_loss,
    xyxy_to_cxcywh,
)
from projects.kd.functional.set_targets import Targets, to_matches
from projects.kd.modeling.set_criterion import SetCriterion, named


def boxes(count, seed=0):
    """(count, 4) centre and size as shares of an image."""
    generator = torch.Generator().manual_seed(seed)
    xyxy = random_boxes(count, 1.0, 1.0, generator, smallest=0.05, dtype=torch.float64)
    return xyxy_to_cxcywh(xyxy)


def test_box_formats_are_inverse():
    one = torch.tensor([0.2, 0.3, 0.6, 0.9])
    torch.testing.assert_close(xyxy_to_cxcywh(one), torch.tensor([0.4, 0.6, 0.4, 0.6]))
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(one)), one)


def test_generalized_iou_equals_fvcore_and_known_cases():
    a, b = cxcywh_to_xyxy(boxes(20)), cxcywh_to_xyxy(boxes(20, seed=1))
    torch.testing.assert_close(1 - generalized_iou(a, b), giou_loss(a, b), rtol=1e-6, atol=1e-6)
    unit = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert generalized_iou(unit, unit) == 1
    apart = generalized_iou(unit, unit + 2)  # hull 9, union 2
    assert apart.item() == pytest.approx(-7 / 9)
    point = torch.zeros(4)
    assert generalized_iou(point, point) == -1
    assert generalized_iou(unit, point) == 0


def test_box_cost_is_that_of_each_pair():
    a, b = boxes(4), boxes(3, seed=1)
    found = box_cost(a, b, 5.0, 2.0)
    for i, j in itertools.product(range(4), range(3)):
        distance, overlap = box_losses(a[i], b[j])
        assert found[i, j].item() == pytest.approx((5 * distance + 2 * (overlap - 1)).item())


def test_focal_loss_equals_fvcore_and_its_gradient():
    logits = torch.randn(5, 4, dtype=torch.float64).requires_grad_()
    targets = (torch.rand(5, 4) > 0.5).double()
    expected = sigmoid_focal_loss_jit(logits, targets, alpha=0.25, gamma=2.0)
    found = sigmoid_focal_loss(logits, targets)
    torch.testing.assert_close(found.float(), expected.float())
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, targets), logits)


def test_focal_cost_is_the_difference_of_both_answers():
    logits = torch.randn(6, 3, dtype=torch.float64)
    yes = sigmoid_focal_loss(logits, torch.ones_like(logits))
    no = sigmoid_focal_loss(logits, torch.zeros_like(logits))
    torch.testing.assert_close(focal_cost(logits), yes - no)


# --- assignment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (3, 3), (2, 0), (0, 2)])
def test_assignment_is_the_cheapest_of_all(shape):
    cost = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    (rows, columns), *_ = assign([cost, torch.zeros(2, 2)])
    assert len(rows) == min(shape) and list(rows) == sorted(rows)
    assert len(set(columns)) == len(columns)
    found = cost[rows, columns].sum().item()
    long, short = max(shape), min(shape)
    matrix = cost if shape[0] == long else cost.T
    cheapest = min(
        sum(matrix[row, column].item() for column, row in enumerate(choice))
        for choice in itertools.permutations(range(long), short)
    )
    assert found == pytest.approx(cheapest)


def test_all_matrices_take_one_copy_from_the_device(monkeypatch):
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copies.append(1) or original(x))
    assert len(assign([torch.rand(3, 2), torch.rand(4, 4), torch.rand(2, 5)])) == 3
    assert assign([]) == [] and len(copies) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cost_that_is_not_finite_is_a_clear_error(value):
    cost = torch.rand(3, 3)
    cost[1, 2] = value
    with pytest.raises(TrainingError, match="Matching here: the cost matrix holds 1 entries"):
        assign([torch.rand(2, 2), cost], "Matching here")


# --- the criterion -------------------------------------------------------------------------------

SIZES = ((40, 60), (30, 20), (25, 25))


def ground_truth(counts=(2, 0, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = [
        instances(size, random_boxes(n, *size, generator), torch.arange(n) % 3)
        for size, n in zip(SIZES, counts, strict=True)
    ]
    return found, Targets.of(found, torch.device("cpu"))


def predictions(layers=2, queries=5, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, 3, queries, classes, generator=generator)
    where = torch.rand(layers, 3, queries, 4, generator=generator) * 0.5 + 0.2
    return logits.requires_grad_(), where.requires_grad_()


def test_targets_are_shares_of_each_image():
    gt, targets = ground_truth()
    assert targets.counts == (2, 0, 3) and targets.starts == [0, 2, 2]
    for start, one in zip(targets.starts, gt, strict=True):
        for index, box in enumerate(one.gt_boxes.tensor.tolist()):
            height, width = one.image_size
            x1, y1, x2, y2 = box
            expected = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height]
            expected += [(x2 - x1) / width, (y2 - y1) / height]
            assert targets.boxes[start + index].tolist() == pytest.approx(expected, rel=1e-5)


def test_losses_equal_a_loop():
    criterion = SetCriterion(2.0, 5.0, 2.0)
    (_, targets), (logits, where) = ground_truth(), predictions()
    found = criterion(logits, where, targets)
    for layer in range(2):
        expected = dict.fromkeys(found, 0.0)
        for image, (start, count) in enumerate(zip(targets.starts, targets.counts, strict=True)):
            own_boxes = targets.boxes[start : start + count]
            own_classes = targets.classes[start : start + count]
            cost = 2 * focal_cost(logits[layer, image])[:, own_classes]
            cost = cost + box_cost(where[layer, image], own_boxes, 5.0, 2.0)
            rows, columns = assign([cost])[0]
            wanted = torch.zeros_like(logits[layer, image])
            for row, column in zip(rows, columns, strict=True):
                wanted[row, own_classes[column]] = 1
                distance, overlap = box_losses(where[layer, image, row], own_boxes[column])
                expected["l1"] += 5 * distance.item() / 5  # five objects in the batch
                expected["giou"] += 2 * overlap.item() / 5
            expected["class"] += (
                2 * sigmoid_focal_loss(logits[layer, image], wanted).sum().item() / 5
            )
        for name, value in expected.items():
            assert found[name][layer].item() == pytest.approx(value, rel=1e-5), name
    assert named(found).keys() == {f"loss_{n}{k}" for n in found for k in ("", "_0")}
    assert named(found)["loss_l1"] == found["l1"][1]


def test_no_object_at_all_gives_a_gradient():
    _, targets = ground_truth((0, 0, 0))
    logits, where = predictions()
    losses = SetCriterion()(logits, where, targets)
    sum(x.sum() for x in losses.values()).backward()
    assert losses["l1"].tolist() == losses["giou"].tolist() == [0, 0]
    assert logits.grad.any() and where.grad is not None and not where.grad.any()


def test_a_matching_from_elsewhere_is_used():
    (_, targets), (logits, where) = ground_truth(), predictions(layers=1)
    pairs = [np.array([[4, 0], [0, 1]]), np.zeros((2, 0), int), np.array([[1, 2, 3], [2, 1, 0]])]
    matches = to_matches(pairs, targets)
    assert matches.query.tolist() == [4, 0, 1, 2, 3]
    assert matches.target.tolist() == [0, 1, 4, 3, 2] and matches.image.tolist() == [0, 0, 2, 2, 2]
    losses = SetCriterion().losses(logits, where, targets, matches)
    own = where[0, matches.image, matches.query]
    expected = 5 * (own - targets.boxes[matches.target]).abs().sum() / 5
    torch.testing.assert_close(losses["l1"][0], expected)


def test_nan_predictions_are_a_clear_error():
    (_, targets), (logits, where) = ground_truth(), predictions()
    with torch.no_grad():
        logits[1, 0, 2] = float("nan")
    with pytest.raises(TrainingError, match="cost matrix"):
        SetCriterion()(logits, where, targets)


def test_instances_without_objects_are_targets():
    empty = Instances((10, 10))
    from detectron2.structures import Boxes

    empty.gt_boxes, empty.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64)
    assert Targets.of([empty], torch.device("cpu")).counts == (0,)
