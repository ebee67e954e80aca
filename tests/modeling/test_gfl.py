"""GFL as a detector: losses by hand, decoding, empty images, learning."""

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from kd_detectors import detector_cfg, overfit
from kd_models import build, losses_at, make_batch


@pytest.fixture
def tiny():
    return build(detector_cfg("GFL", MODEL__GFL__REG_MAX=4)).train()


def test_losses_by_hand(tiny):
    """Two locations of stride 8, the first assigned to class 1 with the box it predicts.

    Bins are 0, so sides are 2 strides and the prediction at (16, 16) is (0, 0, 32, 32): IoU 1,
    GIoU loss 0, quality 1. All logits 0: QFL is ln 2 * (0.25 [quality 1 - 0.5] + 2 * 0.25) at the
    first and ln 2 * 3 * 0.25 at the second location. DFL is ln 5 (5 bins), weight 0.25.
    """
    anchors = [Boxes(torch.tensor([[-16.0, -16, 48, 48], [-8.0, -16, 56, 48]]))]
    labels = [torch.tensor([1, 3])]
    boxes = [torch.tensor([[0.0, 0, 32, 32], [0, 0, 0, 0]])]
    logits, bins = [torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 20)]
    with EventStorage(0):
        losses = tiny.losses(anchors, logits, bins, labels, boxes)
    log2, log5 = 0.6931472, 1.6094379
    assert losses["loss_gfl_cls"].item() == pytest.approx(log2 * 1.5)
    assert losses["loss_gfl_box"].item() == pytest.approx(0.0, abs=1e-6)
    # weight 0.5 (best score) on both sides of the fraction, which is not below 1
    assert losses["loss_gfl_dfl"].item() == pytest.approx(0.25 * log5 * 0.5)


def test_a_shifted_box_by_hand(tiny):
    """Truth (0, 0, 32, 16) for the same prediction: IoU 1/2, no empty space: GIoU loss 1/2."""
    anchors = [Boxes(torch.tensor([[-16.0, -16, 48, 48]]))]
    boxes, labels = [torch.tensor([[0.0, 0, 32, 16]])], [torch.tensor([0])]
    logits = [torch.full((1, 1, 3), 20.0)]  # score 1: the sum of weights is 1
    with EventStorage(0):
        losses = tiny.losses(anchors, logits, [torch.zeros(1, 1, 20)], labels, boxes)
    assert losses["loss_gfl_box"].item() == pytest.approx(2.0 * 0.5)


def test_detections_are_the_integral_boxes(tiny):
    tiny.eval()
    batch = make_batch(sizes=((64, 64),))
    with torch.no_grad():
        images = tiny.preprocess_image(batch)
        features = [tiny.backbone(images.tensor)[f] for f in tiny.head_in_features]
        logits, bins = tiny.head(features)
        found = tiny(batch)[0]["instances"]
    place = found.scores.argmax()
    flat = torch.cat([x.flatten(2)[0] for x in logits], 1).sigmoid()
    best = flat.flatten().argmax()
    kind, cell = best // flat.shape[1], best % flat.shape[1]
    assert found.scores[place].item() == pytest.approx(flat.max().item())
    assert found.pred_classes[place] == kind
    share = torch.cat([x.flatten(2)[0] for x in bins], 1)[:, cell].view(4, 5).softmax(1)
    sides = (share * torch.arange(5)).sum(1)
    anchor = Boxes.cat(tiny.anchor_generator(features)).tensor[cell]
    stride = (anchor[2] - anchor[0]) / 8
    centre = (anchor[:2] + anchor[2:]) / 2
    box = torch.cat([centre - sides[:2] * stride, centre + sides[2:] * stride]).clamp(0, 64)
    torch.testing.assert_close(found.pred_boxes.tensor[place], box)


def test_without_objects_every_parameter_keeps_a_gradient(tiny):
    losses = losses_at(tiny, make_batch(boxes=0))
    assert losses["loss_gfl_box"].item() == 0 and losses["loss_gfl_cls"].isfinite()
    sum(losses.values()).backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_half_precision():
    """A step under autocast costs what the one in fp32 costs, up to bfloat16's rounding."""
    model = build(detector_cfg("GFL")).train()
    batch = make_batch()
    exact = losses_at(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = losses_at(model, batch)
    sum(rounded.values()).backward()
    for key, loss in exact.items():
        assert rounded[key].item() == pytest.approx(loss.item(), rel=0.2), key


def test_it_learns_one_batch(tiny):
    model = tiny
    assert overfit(model, make_batch(((64, 64),) * 2), steps=60, lr=2e-3) > 0.7
