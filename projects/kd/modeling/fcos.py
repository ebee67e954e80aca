"""detectron2's FCOS for yacs configs (detectron2 itself has it for LazyConfig only)."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import fcos

from ..config import register_config
from ..detectors import register_detector
from ..predict.fcos import FCOSPredictor
from .one_stage import one_stage_node, one_stage_parts, tower_options


@register_config
def add_fcos_config(cfg) -> None:
    """Add MODEL.FCOS; the values are those of detectron2's FCOS R-50 config."""
    # SCORE_THRESH_TEST is compared with sqrt(class score * centre-ness).
    cfg.MODEL.FCOS = node = one_stage_node(score_thresh=0.2)
    # Locations within this many strides of a box's centre are positive.
    node.CENTER_SAMPLING_RADIUS = 1.5
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0


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

        def head(shapes):
            return fcos.FCOSHead(**tower_options(node, shapes))

        return {
            **one_stage_parts(cfg, node, head),
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
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
    "FCOS",
    class_key="MODEL.FCOS.NUM_CLASSES",
    pseudo_anchors=8.0,
    predictor=FCOSPredictor,
    label_maps=False,
)
