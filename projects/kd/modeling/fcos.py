"""detectron2's FCOS for yacs configs (detectron2 itself has it for LazyConfig only)."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import fcos

from ..config import register_config
from ..detectors import register_detector
from ..predict.fcos import FCOSPredictor


@register_config
def add_fcos_config(cfg) -> None:
    """Add MODEL.FCOS; the values are those of detectron2's FCOS R-50 config."""
    cfg.MODEL.FCOS = node = CfgNode()
    node.NUM_CLASSES = 80
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions before the predictions, and their norm.
    node.NUM_CONVS = 4
    node.NORM = "GN"
    # Class probability that the bias starts from.
    node.PRIOR_PROB = 0.01
    # Locations within this many strides of a box's centre are positive.
    node.CENTER_SAMPLING_RADIUS = 1.5
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    # On sqrt(class score * centre-ness).
    node.SCORE_THRESH_TEST = 0.2
    node.TOPK_CANDIDATES_TEST = 1000
    node.NMS_THRESH_TEST = 0.6


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """FCOS (Tian et al., ICCV 2019) with detectron2's class underneath, so with its weights.

    Levels come from ``build_fcos_resnet_fpn_backbone`` (p6 and p7 from p5) or any other backbone.
    """

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Read MODEL.FCOS."""
        node = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[level] for level in node.IN_FEATURES]
        head = fcos.FCOSHead(
            input_shape=shapes,
            num_classes=node.NUM_CLASSES,
            conv_dims=[shapes[0].channels] * node.NUM_CONVS,
            prior_prob=node.PRIOR_PROB,
            norm=node.NORM,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": list(node.IN_FEATURES),
            "num_classes": node.NUM_CLASSES,
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
    ):
        """detectron2's losses, in float32: its box loss cannot mix a lower precision in (ours)."""
        logits, deltas, centerness = (
            [level.float() for level in levels]
            for levels in (pred_logits, pred_anchor_deltas, pred_centerness)
        )
        with torch.autocast(self.device.type, enabled=False):
            return super().losses(anchors, logits, gt_labels, deltas, gt_boxes, centerness)


# It has one square of one stride a location, whose best IoU only marks the coarsest level: masks
# take eight strides, as ATSS and GFL do.
register_detector(
    "FCOS", class_key="MODEL.FCOS.NUM_CLASSES", pseudo_anchors=8.0, predictor=FCOSPredictor
)
