"""What detectron2's own detectors offer to distillation (ours register beside their meta-arch)."""

from __future__ import annotations

from ..detectors import ClassLayer, register_detector
from ..predict.cascade import CascadePredictor
from ..predict.outputs import dense_tap, named
from ..predict.rcnn import RCNNPredictor
from ..predict.retinanet import RetinaNetPredictor
from ..taps import TapSpec


def _run_sem_seg_head(model, features):
    head = model.sem_seg_head
    getattr(head, "layers", head)(features)  # without the upsampling, where it can be left out


def _run_rpn_head(model, features):
    rpn = model.proposal_generator
    rpn.rpn_head([features[level] for level in rpn.in_features])


_SHARED = {"features": TapSpec("backbone"), "bottom_up": TapSpec("backbone.bottom_up")}

# DenseDetector is the base class of RetinaNet and FCOS.
register_detector(
    "DenseDetector",
    taps={**_SHARED, "dense": dense_tap("logits", "boxes", "centreness")},
    class_layers={"head.cls_score": ClassLayer()},
)
register_detector(
    "RetinaNet",
    class_key="MODEL.RETINANET.NUM_CLASSES",
    predictor=RetinaNetPredictor,
    label_maps=False,
)
# ``rpn`` gives objectness as logits, and boxes;
# ``box`` class logits (R, K + 1) and deltas (R, K * 4) of the sampled proposals, in their order, of
# a cascade a list over its stages;
# ``mask_logits`` (R, K, h, w) and ``keypoint_logits`` (R, points, h, w) are those of the foreground
# ones. All but ``rpn`` are there in the student's training step only.
register_detector(
    "GeneralizedRCNN",
    taps={
        **_SHARED,
        "rpn": TapSpec(
            "proposal_generator.rpn_head", run=_run_rpn_head, select=named("logits", "boxes")
        ),
        "box": TapSpec("roi_heads.box_predictor"),
        "sampled_proposals": TapSpec("roi_heads", select=lambda outputs: outputs[0]),
        "mask_logits": TapSpec("roi_heads.mask_head.predictor"),
        "keypoint_logits": TapSpec("roi_heads.keypoint_head.score_lowres"),
    },
    class_key="MODEL.ROI_HEADS.NUM_CLASSES",
    predictor=RCNNPredictor,
    label_maps=False,
    class_layers={
        # of a cascade "roi_heads.box_predictor.<stage>.cls_score"
        "roi_heads.box_predictor*.cls_score": ClassLayer(background=True),
        "roi_heads.box_predictor*.bbox_pred": ClassLayer(inner=4),
        "roi_heads.mask_head.predictor": ClassLayer(),
    },
)
register_detector("GeneralizedRCNN", predictor=CascadePredictor)

# SemSegFPNHead, DeepLab's heads and PSPNetHead end in a 1x1 convolution ``predictor``: ``sem_seg``
# are its logits before upsampling, ``decoder`` is what it reads.
_SEGMENTATION = {
    "sem_seg": TapSpec(
        "sem_seg_head.predictor",
        run=_run_sem_seg_head,
        channels=lambda model: model.sem_seg_head.predictor.out_channels,
    ),
    "decoder": TapSpec(
        "sem_seg_head.predictor",
        run=_run_sem_seg_head,
        take_input=True,
        channels=lambda model: model.sem_seg_head.predictor.in_channels,
    ),
}
_PIXEL_CLASSES = {"sem_seg_head.predictor": ClassLayer(kind="stuff_classes")}
register_detector(
    "SemanticSegmentor",
    taps={"features": TapSpec("backbone"), **_SEGMENTATION},
    class_key="MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    class_names="stuff_classes",
    class_layers=_PIXEL_CLASSES,
)
register_detector(
    "PanopticFPN",
    taps=_SEGMENTATION,
    class_key="MODEL.ROI_HEADS.NUM_CLASSES",
    class_layers=_PIXEL_CLASSES,
)
