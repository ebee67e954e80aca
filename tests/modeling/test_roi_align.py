"""ROIAlign's gradient as a sparse product: torchvision's, for every way of sampling."""

import pytest
import torch
from detectron2.layers import ROIAlign
from kd_detectors import detector_cfg
from torch import nn
from torchvision.ops import roi_align

from projects.kd.distiller import build_training_model
from projects.kd.modeling.roi_align import roi_align_gradient, use_sparse_gradients

SHAPE = (2, 3, 9, 14)


def regions(dtype=torch.float64):
    """Inside, outside, across each border, of no size, larger than the maps; scale 0.25."""
    boxes = [
        [0, 4.0, 5.0, 30.0, 21.0],
        [1, 0.5, 0.2, 3.0, 35.5],
        [1, -20.0, -9.0, 9.0, 12.0],
        [0, 40.0, 20.0, 90.0, 60.0],
        [0, 100.0, 100.0, 140.0, 130.0],
        [1, 12.0, 12.0, 12.0, 12.0],
        [1, 20.0, 8.0, 10.0, 4.0],
        [0, 7.0, 3.0, 7.0, 30.0],
        [0, 3.0, 9.0, 50.0, 8.0],
        [0, -10.0, -10.0, 70.0, 50.0],
        [1, 52.0, 32.0, 56.0, 36.0],
    ]
    return torch.tensor(boxes, dtype=dtype)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7)])
def test_gradient_is_torchvisions(size, ratio, aligned):
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    y = roi_align(x, regions(), size, 0.25, ratio, aligned)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)
    found = roi_align_gradient(grad, regions(), SHAPE, 0.25, ratio, aligned)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_no_regions():
    found = roi_align_gradient(torch.zeros(0, 3, 7, 7), torch.zeros(0, 5), SHAPE, 0.25, 0, True)
    assert torch.equal(found, torch.zeros(SHAPE))


def test_regions_that_are_not_finite_do_not_crash():
    rois = torch.tensor([[0, float("nan"), 1.0, 8.0, 9.0], [0, 4.0, 5.0, 30.0, 21.0]])
    grad = torch.ones(2, 3, 2, 2)
    found = roi_align_gradient(grad, rois, SHAPE, 0.25, 2, True)
    alone = roi_align_gradient(grad[1:], rois[1:], SHAPE, 0.25, 2, True)
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer(dtype):
    """The forward pass stays the same to the bit, the gradient but for the order of its sum."""
    torch.manual_seed(0)
    plain = ROIAlign((7, 7), 0.25, 0, aligned=True)
    ours = use_sparse_gradients(nn.Sequential(ROIAlign((7, 7), 0.25, 0, aligned=True)))[0]
    assert str(ours).endswith(str(plain).removeprefix("ROIAlign"))
    x = torch.randn(SHAPE, dtype=dtype)
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        one, other = ours(found, regions(dtype)), plain(expected, regions(dtype))
    assert torch.equal(one, other) and one.dtype == other.dtype
    grad = torch.randn_like(one)
    one.backward(grad)
    other.backward(grad)
    assert found.grad.dtype == dtype
    near = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(found.grad, expected.grad, rtol=near, atol=near)


def test_without_a_gradient_it_is_detectron2s():
    layer = use_sparse_gradients(ROIAlign((2, 2), 0.25, 0, aligned=True))
    x = torch.randn(SHAPE)
    assert layer(x, regions(torch.float32)).grad_fn is None
    with torch.no_grad():
        assert layer(x.requires_grad_(), regions(torch.float32)).grad_fn is None


def test_students_that_train_have_it():
    heads = build_training_model(detector_cfg("Mask R-CNN")).roi_heads
    layers = [*heads.box_pooler.level_poolers, *heads.mask_pooler.level_poolers]
    assert all(type(layer) is not ROIAlign for layer in layers)
