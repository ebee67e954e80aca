"""What detectron2's own detectors offer to distillation (ours register beside their meta-arch)."""

from __future__ import annotations

from .taps import TapSpec, register_class_key, register_pseudo_anchors, register_taps


def _run_dense_head(model, features):
    model.head([features[level] for level in model.head_in_features])


_SHARED = {"features": TapSpec("backbone"), "bottom_up": TapSpec("backbone.bottom_up")}

# DenseDetector is the base class of RetinaNet and FCOS. ``dense`` gives, per kind of prediction
# (class logits, box deltas, ...), a list over levels of (N, A * K, H, W).
register_taps("DenseDetector", **_SHARED, dense=TapSpec("head", run=_run_dense_head))
# The last three are there in the student's training step only: ``mask_logits`` (R, K, h, w) and
# ``keypoint_logits`` (R, points, h, w) are those of its foreground proposals.
register_taps(
    "GeneralizedRCNN",
    **_SHARED,
    sampled_proposals=TapSpec("roi_heads", select=lambda outputs: outputs[0]),
    mask_logits=TapSpec("roi_heads.mask_head.predictor"),
    keypoint_logits=TapSpec("roi_heads.keypoint_head.score_lowres"),
)

register_class_key("RetinaNet", "MODEL.RETINANET.NUM_CLASSES")
register_class_key("GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES")
register_class_key("PanopticFPN", "MODEL.ROI_HEADS.NUM_CLASSES")

# FCOS has one square of one stride a location, whose best IoU only marks the coarsest level; ATSS
# and GFL place squares of eight strides.
register_pseudo_anchors("FCOS", 8.0)
