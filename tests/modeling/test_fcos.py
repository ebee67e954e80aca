"""FCOS from a yacs config is detectron2's FCOS: parts, weights, losses; and its assignment."""

import math

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch import fcos as stock
from detectron2.structures import Boxes, Instances
from kd_detectors import detector_cfg
from kd_models import build, losses_at, make_batch

from projects.kd import load_config


@pytest.fixture(scope="module")
def tiny():
    return build(detector_cfg("FCOS"))


def stock_twin(model):
    """detectron2's own class around the same parts."""
    return stock.FCOS(
        backbone=model.backbone,
        head=model.head,
        head_in_features=model.head_in_features,
        num_classes=model.num_classes,
        test_score_thresh=model.test_score_thresh,
        pixel_mean=model.pixel_mean.flatten().tolist(),
        pixel_std=model.pixel_std.flatten().tolist(),
    )


def test_losses_and_detections_equal_detectron2s_class(tiny):
    twin = stock_twin(tiny).train()
    batch = make_batch()
    expected, found = losses_at(twin, batch), losses_at(tiny.train(), batch)
    assert found.keys() == expected.keys()
    for key, loss in expected.items():
        torch.testing.assert_close(found[key], loss)
    with torch.no_grad():
        pairs = zip(twin.eval()(batch), tiny.eval()(batch), strict=True)
    for theirs, ours in pairs:
        assert len(ours["instances"]) > 0
        assert torch.equal(
            ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor
        )
        assert torch.equal(ours["instances"].scores, theirs["instances"].scores)


def test_r50_is_the_zoos_lazy_config():
    """Parameters, shapes and settings of detectron2's fcos_R_50_FPN_1x.py."""
    lazy = LazyConfig.load(model_zoo.get_config_file("COCO-Detection/fcos_R_50_FPN_1x.py"))
    cfg = load_config("configs/COCO-Detection/fcos_R50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        theirs, ours = instantiate(lazy.model), build(cfg)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    names = [
        *("num_classes", "center_sampling_radius", "focal_loss_alpha", "focal_loss_gamma"),
        *("test_score_thresh", "test_topk_candidates", "test_nms_thresh", "head_in_features"),
        "max_detections_per_image",
    ]
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert cfg.MODEL.PIXEL_MEAN == pytest.approx(lazy.model.pixel_mean)
    assert cfg.MODEL.PIXEL_STD == pytest.approx(lazy.model.pixel_std)
    assert cfg.SOLVER.BASE_LR == lazy.optimizer.lr
    frozen = [k for k, v in theirs.named_parameters() if not v.requires_grad]
    assert [k for k, v in ours.named_parameters() if not v.requires_grad] == frozen


def test_last_levels_are_made_of_p5(tiny):
    top = tiny.backbone.top_block
    assert isinstance(top, LastLevelP6P7) and top.in_feature == "p5"
    assert list(tiny.backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]


def assigned(model, boxes, size=(64, 64)):
    """Locations (stride, x, y) that learn each class, found by the model."""
    shapes = [(math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in (8, 16, 32, 64, 128)]
    anchors = model.anchor_generator([torch.zeros(1, 1, *shape) for shape in shapes])
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    instances.gt_classes = torch.arange(len(boxes))
    labels, targets = model.label_anchors(anchors, [instances])
    flat = Boxes.cat(anchors)
    found = {kind: set() for kind in range(len(boxes))}
    for anchor, label in zip(flat.tensor.tolist(), labels[0].tolist(), strict=True):
        if label < len(boxes):
            stride, x, y = anchor[2] - anchor[0], *((anchor[i] + anchor[i + 2]) / 2 for i in (0, 1))
            found[label].add((stride, x, y))
    return found, anchors, targets


def test_assignment_by_hand(tiny):
    """Locations are cell centres (4, 12, 20, ...), the radius is 1.5 strides.

    A 20 x 20 box around (20, 20), longest distance below 64, so stride 8. Inside of it and less
    than 12 from its centre are 12, 20 and 28 in both directions.
    """
    found, _, _ = assigned(tiny, [[10, 10, 30, 30]])
    assert found[0] == {(8, x, y) for x in (12, 20, 28) for y in (12, 20, 28)}


def test_of_two_boxes_the_smaller_wins(tiny):
    """Around the same centre, 20 x 20 and 12 x 20: of x only 20 lies inside of the smaller."""
    found, _, _ = assigned(tiny, [[10, 10, 30, 30], [14, 10, 26, 30]])
    assert found[1] == {(8, 20, y) for y in (12, 20, 28)}
    assert found[0] == {(8, x, y) for x in (12, 28) for y in (12, 20, 28)}


def test_centreness_by_hand(tiny):
    """At (12, 28) of the box above: left 2, right 18, top 18, bottom 2: sqrt(2/18 * 2/18)."""
    _, anchors, targets = assigned(tiny, [[10, 10, 30, 30]])
    centreness = tiny.compute_ctrness_targets(anchors, targets)[0]
    assert centreness[3 * 8 + 1].item() == pytest.approx(1 / 9)


def test_a_batch_without_objects_is_finite(tiny):
    tiny.train()
    batch = make_batch(boxes=0)
    losses = losses_at(tiny, batch)
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_fcos_loc"].item() == 0
