"""What the configs of one-stage detectors have in common: their keys, and what is built of them."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from .square_anchors import square_anchors


def one_stage_node(
    num_convs: int = 4, score_thresh: float = 0.05, nms_thresh: float = 0.6
) -> CfgNode:
    """The keys of MODEL.<DETECTOR> that every one-stage detector has.

    Args:
        num_convs, score_thresh, nms_thresh: defaults of NUM_CONVS, SCORE_THRESH_TEST and
            NMS_THRESH_TEST.
    """
    node = CfgNode()
    node.NUM_CLASSES = 80
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions of each tower before the predictions, and their norm.
    node.NUM_CONVS = num_convs
    node.NORM = "GN"
    # Class probability that the bias starts from.
    node.PRIOR_PROB = 0.01
    # Detections: least score, most candidates of a level, and the overlap that suppresses.
    node.SCORE_THRESH_TEST = score_thresh
    node.TOPK_CANDIDATES_TEST = 1000
    node.NMS_THRESH_TEST = nms_thresh
    return node


def one_stage_parts(
    cfg: CfgNode,
    node: CfgNode,
    head: Callable[[list[ShapeSpec]], nn.Module],
    anchor_scale: float | None = None,
) -> dict:
    """Keyword arguments of the constructor that are the same for every one-stage detector.

    Args:
        cfg: the detector's config.
        node: its MODEL.<DETECTOR>, of :func:`one_stage_node`.
        head: makes the head from the shapes of IN_FEATURES.
        anchor_scale: side in strides of a location's square; None = the detector needs none.
    """
    backbone = build_backbone(cfg)
    shapes = [backbone.output_shape()[level] for level in node.IN_FEATURES]
    parts = {
        "backbone": backbone,
        "head": head(shapes),
        "head_in_features": list(node.IN_FEATURES),
        "num_classes": node.NUM_CLASSES,
        "test_score_thresh": node.SCORE_THRESH_TEST,
        "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
        "test_nms_thresh": node.NMS_THRESH_TEST,
        "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }
    if anchor_scale is not None:
        strides = [shape.stride for shape in shapes]
        offset = cfg.MODEL.ANCHOR_GENERATOR.OFFSET
        parts["anchor_generator"] = square_anchors(strides, anchor_scale, offset)
    return parts


def tower_options(node: CfgNode, shapes: list[ShapeSpec]) -> dict:
    """Keyword arguments of detectron2's dense heads, whose towers are as wide as the levels."""
    return {
        "input_shape": shapes,
        "num_classes": node.NUM_CLASSES,
        "conv_dims": [shapes[0].channels] * node.NUM_CONVS,
        "prior_prob": node.PRIOR_PROB,
        "norm": node.NORM,
    }
