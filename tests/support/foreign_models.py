"""Tiny models of torchvision and timm under names of theirs; importing this registers them."""

from __future__ import annotations

import timm
from timm.models.vision_transformer import VisionTransformer, build_model_with_cfg
from torchvision.models import detection
from torchvision.models._api import register_model
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import BasicBlock, ResNet


def tiny_backbone(channels: int = 16):
    body, names = ResNet(BasicBlock, [1, 1, 1, 1]), {f"layer{i + 1}": str(i) for i in range(4)}
    return detection.backbone_utils.BackboneWithFPN(body, names, [64, 128, 256, 512], channels)


@register_model()
def kd_tiny_frcnn(*, weights=None, weights_backbone=None, num_classes=91):
    """A small Faster R-CNN of torchvision's own parts."""
    return detection.FasterRCNN(tiny_backbone(), **_box_parts(num_classes))


@register_model()
def kd_tiny_mask_rcnn(*, weights=None, weights_backbone=None, num_classes=91):
    """The same with masks."""
    return detection.MaskRCNN(
        tiny_backbone(),
        **_box_parts(num_classes),
        mask_head=MaskRCNNHeads(16, (8,), 1),
        mask_predictor=MaskRCNNPredictor(8, 8, num_classes),
    )


@register_model()
def kd_tiny_keypoint_rcnn(*, weights=None, weights_backbone=None, num_classes=2):
    """The same with 17 keypoints."""
    return detection.KeypointRCNN(
        tiny_backbone(),
        **_box_parts(num_classes),
        keypoint_head=KeypointRCNNHeads(16, (8,)),
        keypoint_predictor=KeypointRCNNPredictor(8, 17),
    )


def _box_parts(num_classes: int) -> dict:
    return {
        "min_size": 64,
        "max_size": 128,
        "box_head": TwoMLPHead(16 * 49, 8),
        "box_predictor": FastRCNNPredictor(8, num_classes),
        "box_score_thresh": 0.0,
        "box_detections_per_img": 7,
        "rpn_post_nms_top_n_test": 9,
    }


@register_model()
def kd_tiny_retinanet(*, weights=None, weights_backbone=None, num_classes=91):
    """A small RetinaNet without anchors of many sizes."""
    backbone = tiny_backbone()
    anchors = detection.anchor_utils.AnchorGenerator(((16,),) * 5, ((1.0,),) * 5)
    options = {"min_size": 64, "max_size": 128, "score_thresh": 0.0, "detections_per_img": 6}
    return detection.RetinaNet(backbone, num_classes, anchor_generator=anchors, **options)


@register_model()
def kd_tiny_fcos(*, weights=None, weights_backbone=None, num_classes=91):
    """A small FCOS."""
    options = {"min_size": 64, "max_size": 128, "score_thresh": 0.0}
    return detection.FCOS(tiny_backbone(32), num_classes, **options)


def _tiny(patch: int, **kwargs):
    sizes = {"img_size": 4 * patch, "patch_size": patch, "embed_dim": 24, "depth": 3}
    return build_model_with_cfg(
        VisionTransformer, f"kd_tiny_vit{patch}", **sizes, num_heads=2, **kwargs
    )


@timm.models.register_model
def kd_tiny_vit16(pretrained=False, **kwargs):
    return _tiny(16, pretrained=pretrained, **kwargs)


@timm.models.register_model
def kd_tiny_vit14(pretrained=False, **kwargs):
    return _tiny(14, pretrained=pretrained, **kwargs)
