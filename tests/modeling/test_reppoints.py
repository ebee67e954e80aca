"""RepPoints as a detector: losses by hand, decoding, gradients between its two stages."""

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from kd_detectors import detector_cfg, overfit
from kd_models import build, losses_at, make_batch

from projects.kd.errors import ConfigError
from projects.kd.modeling.reppoints_head import PointBoxes, RepPointsHead


@pytest.fixture
def tiny():
    return build(detector_cfg("RepPoints", MODEL__REPPOINTS__TRANSFORM="minmax")).train()


def square(half):
    """Nine points (y, x) on a square around the location, in strides."""
    steps = torch.tensor([-half, 0.0, half])
    return torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).flatten()


def test_losses_by_hand(tiny):
    """Two locations of stride 8 at (32, 32) and (128, 32), an object of 40 x 32 at (32, 32).

    First boxes are 32 x 32: IoU 0.8 at the first location. Its left and right sides are off by 4
    pixels, 1/8 of 4 strides: smooth L1 with beta 0.11 is 1/8 - 0.055 each. Refined boxes are 48 x
    48: sides off by 4 and 8 pixels, 1/8 and 1/4. All logits 0: focal loss with p = 1/2 is
    0.25 * ln 2 times alpha 0.25 for the target and 0.75 for the five others.
    """
    anchors = torch.tensor([[16.0, 16, 48, 48], [112, 16, 144, 48]])
    instances = Instances((64, 160))
    instances.gt_boxes = Boxes(torch.tensor([[12.0, 16, 52, 48]]))
    instances.gt_classes = torch.tensor([2])
    first, refined = square(2.0).repeat(1, 2, 1), square(3.0).repeat(1, 2, 1)
    with EventStorage(0):
        losses = tiny.losses(anchors, torch.zeros(1, 2, 3), first, refined, [instances])
    assert losses["loss_rep_init"].item() == pytest.approx(0.5 * 2 * (1 / 8 - 0.055))
    expected = 2 * (1 / 8 - 0.055) + 2 * (1 / 4 - 0.055)
    assert losses["loss_rep_refine"].item() == pytest.approx(expected)
    log2 = math.log(2)
    assert losses["loss_rep_cls"].item() == pytest.approx(0.25 * log2 * (0.25 + 5 * 0.75))


def test_ignored_locations_have_no_class_loss(tiny):
    """IoU 0.45 and no better at another place would be taken; so a second location has 0.6."""
    anchors = torch.tensor([[16.0, 16, 48, 48], [16, 16, 48, 48]])
    instances = Instances((64, 160))
    instances.gt_boxes = Boxes(torch.tensor([[16.0, 16, 48, 48]]))
    instances.gt_classes = torch.tensor([0])
    side = math.sqrt(0.45) * 2, math.sqrt(0.6) * 2
    points = torch.stack([square(side[0]), square(side[1])])[None]
    logits = torch.zeros(1, 2, 3)
    with EventStorage(0):
        reference = tiny.losses(anchors, logits, points, points, [instances])
        logits[0, 0] = 5.0
        found = tiny.losses(anchors, logits, points, points, [instances])
    assert found["loss_rep_cls"].item() == reference["loss_rep_cls"].item()


def test_points_to_boxes_by_hand():
    """Half a side of 2 strides of 8 around (32, 40)."""
    anchors = torch.tensor([[16.0, 24, 48, 56]])
    boxes = PointBoxes("minmax", 4.0).apply_deltas(square(2.0)[None], anchors)
    assert boxes.tolist() == [[16.0, 24.0, 48.0, 56.0]]
    moment = PointBoxes("moment", 4.0)
    with torch.no_grad():
        moment.moment_transfer.copy_(torch.tensor([0.0, math.log(2)]))
    # deviation of (-2, 0, 2) three times each, over 8: sqrt(3)
    half = math.sqrt(3) * 8
    expected = [32 - half, 40 - 2 * half, 32 + half, 40 + 2 * half]
    found = moment.apply_deltas(square(2.0)[None], anchors)
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5)
    found.sum().backward()


def test_the_factors_get_a_hundredth_of_the_gradient():
    grads = []
    for share in (1.0, 0.01):
        boxes = PointBoxes("moment", 4.0, moment_mul=share)
        anchors = torch.tensor([[16.0, 24, 48, 56]])
        boxes.apply_deltas(square(2.0)[None], anchors)[0, 2:].sum().backward()
        grads.append(boxes.moment_transfer.grad)
    torch.testing.assert_close(grads[1], 0.01 * grads[0])


def test_points_at_the_kernels_taps_are_an_ordinary_convolution():
    """Offsets are measured from the regular 3 x 3 taps."""
    torch.manual_seed(0)
    head = RepPointsHead(channels=8, num_classes=3, num_convs=1, norm="")
    with torch.no_grad():
        head.points_init[-1].weight.zero_()
        head.points_init[-1].bias.copy_(head.kernel.flatten())
    feature = torch.randn(1, 8, 6, 7)
    logits, first, refined = head([feature])
    plain = torch.nn.functional.conv2d(
        head.cls_subnet(feature), head.cls_deform.weight, padding=1
    ).relu()
    torch.testing.assert_close(logits[0], head.cls_score(plain), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        first[0], head.kernel.flatten()[None, :, None, None].expand_as(first[0])
    )


def test_refined_points_pass_a_tenth_of_the_gradient_to_the_first():
    """None directly (the sum is detached), a share through the offsets."""
    torch.manual_seed(0)
    grads = []
    for share in (1.0, 0.1, 0.0):
        torch.manual_seed(0)
        head = RepPointsHead(channels=8, num_classes=3, num_convs=1, norm="", gradient_mul=share)
        nn_init = head.points_init[-1]
        torch.nn.init.normal_(nn_init.weight, std=0.5)
        torch.nn.init.normal_(head.points_deform.weight)
        feature = torch.randn(1, 8, 6, 7, generator=torch.Generator().manual_seed(1))
        head([feature])[2][0].sum().backward()
        grads.append(nn_init.weight.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], 0.1 * grads[0], rtol=1e-3, atol=1e-7)
    assert grads[2].abs().max() == 0


@pytest.mark.parametrize("transform", ["moment", "minmax"])
def test_without_objects_every_parameter_keeps_a_gradient(transform):
    model = build(detector_cfg("RepPoints", MODEL__REPPOINTS__TRANSFORM=transform)).train()
    losses = losses_at(model, make_batch(boxes=0))
    assert losses["loss_rep_init"].item() == 0 and losses["loss_rep_cls"].isfinite()
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_half_precision():
    """A step under autocast costs what the one in fp32 costs, up to bfloat16's rounding."""
    model = build(detector_cfg("RepPoints")).train()
    batch = make_batch()
    exact = losses_at(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = losses_at(model, batch)
    sum(rounded.values()).backward()
    for key, loss in exact.items():
        assert rounded[key].item() == pytest.approx(loss.item(), rel=0.2), key


def test_it_learns_one_batch():
    """Its first boxes; the number of their positives stays that of the objects."""
    model = build(detector_cfg("RepPoints"))
    batch = make_batch(((64, 64),) * 2)
    before = losses_at(model.train(), batch)["loss_rep_init"].item()
    overfit(model, batch, steps=20)  # at 5e-3 where it stands after 20 depends on the CPU
    assert losses_at(model.train(), batch)["loss_rep_init"].item() < 0.6 * before


@pytest.mark.parametrize(
    ("key", "value"), [("NUM_POINTS", 8), ("TRANSFORM", "mean"), ("IOU_THRESHOLDS", [0.5, 0.4])]
)
def test_wrong_values_name_their_key(key, value):
    with pytest.raises(ConfigError, match=f"MODEL.REPPOINTS.{key}"):
        build(detector_cfg("RepPoints", **{f"MODEL__REPPOINTS__{key}": value}))
