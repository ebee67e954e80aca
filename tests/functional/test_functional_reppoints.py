"""RepPoints' boxes and assignments against hand-computed cases and loops."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from projects.kd.functional.reppoints import (
    assign_by_iou,
    minmax_boxes,
    moment_boxes,
    nearest_point,
)


def test_minmax_box_by_hand():
    """Points are (y, x)."""
    points = torch.tensor([[[1.0, 5.0], [-2.0, 7.0], [3.0, 6.0]]])
    assert minmax_boxes(points).tolist() == [[5.0, -2.0, 7.0, 3.0]]


def test_moment_box_by_hand():
    """y: -1, 0, 1 (mean 0, deviation 1); x: 2, 4, 6 (mean 4, deviation 2)."""
    points = torch.tensor([[[-1.0, 2.0], [0.0, 4.0], [1.0, 6.0]]])
    plain = moment_boxes(points, torch.zeros(2))
    assert plain[0].tolist() == pytest.approx([2.0, -1.0, 6.0, 1.0], abs=1e-5)
    # the factors are those of width and height
    scaled = moment_boxes(points, torch.tensor([0.0, math.log(3)]))
    assert scaled[0].tolist() == pytest.approx([2.0, -3.0, 6.0, 3.0], abs=1e-5)


def test_points_in_one_place_have_a_finite_gradient():
    points = torch.zeros(1, 9, 2, requires_grad=True)
    moment_boxes(points, torch.zeros(2)).square().sum().backward()
    assert points.grad.isfinite().all()


def test_gradient():
    torch.manual_seed(0)
    points = torch.randn(2, 9, 2, dtype=torch.float64, requires_grad=True)
    transfer = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(moment_boxes, (points, transfer))


def locations(size=64, strides=(8, 16, 32)):
    centres, own = [], []
    for stride in strides:
        axis = torch.arange(0, size, stride, dtype=torch.float32)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        centres.append(torch.stack([x.flatten(), y.flatten()], 1))
        own.append(torch.full((len(centres[-1]),), float(stride)))
    return torch.cat(centres), torch.cat(own)


def found(index, centres, strides):
    places = (index >= 0).nonzero().squeeze(1).tolist()
    return {(strides[i].item(), *centres[i].tolist()): index[i].item() for i in places}


def test_nearest_point_by_hand():
    """40 x 40: log2(10) = 3.3, stride 8. 80 x 80: log2(20) = 4.3, stride 16. 4 x 4 has log2(1) = 0
    and goes to the finest level, 1000 x 1000 to the coarsest. 16 x 160: mean of 2 and 5.3 is 3.66.
    """
    centres, strides = locations()
    boxes = torch.tensor(
        [
            [3.0, 3, 43, 43],  # centre 23: nearest multiple of 8 is 24
            [-8.0, -6, 72, 74],  # centre (32, 34): stride 16
            [46.0, 54, 50, 58],  # centre (48, 56): stride 8
            [-490.0, -470, 510, 530],  # centre (10, 30): stride 32: (0, 32)
            [50.0, -45, 66, 115],  # centre (58, 35): stride 8: (56, 32) or (56, 40)?
        ]
    )
    index = nearest_point(centres, strides, boxes)
    assert found(index, centres, strides) == {
        (8.0, 24.0, 24.0): 0,
        (16.0, 32.0, 32.0): 1,
        (8.0, 48.0, 56.0): 2,
        (32.0, 0.0, 32.0): 3,
        (8.0, 56.0, 32.0): 4,
    }


def test_of_two_boxes_at_one_point_the_nearer_in_its_own_size_wins():
    """Centres (25, 24) and (22, 24): 1 / 40 and 2 / 40 of the sides."""
    centres, strides = locations()
    boxes = torch.tensor([[2.0, 4, 42, 44], [5, 4, 45, 44]])
    assert found(nearest_point(centres, strides, boxes), centres, strides) == {(8.0, 24.0, 24.0): 1}


def test_assignment_by_iou_by_hand():
    iou = torch.tensor(
        [
            [0.60, 0.45, 0.30, 0.10, 0.00, 0.55],
            [0.00, 0.20, 0.35, 0.00, 0.00, 0.58],
            [0.05, 0.00, 0.30, 0.20, 0.00, 0.00],  # its best is 0.30: low, but its own
            [0.00, 0.00, 0.00, 0.00, 0.00, 0.00],  # overlaps nothing: learnt nowhere
        ]
    )
    assert assign_by_iou(iou).tolist() == [0, -2, 2, -1, -1, 1]


def test_no_box():
    centres, strides = locations()
    assert (nearest_point(centres, strides, torch.zeros(0, 4)) == -1).all()
    assert assign_by_iou(torch.zeros(0, 5)).tolist() == [-1] * 5
