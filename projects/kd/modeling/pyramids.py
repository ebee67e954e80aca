"""FPN of p3 to p7 whose last two levels are convolutions of p5 (FCOS, GFL)."""

from __future__ import annotations

from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from .timm_fpn import build_undilated_timm_backbone, fpn_over


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg, input_shape) -> FPN:
    """detectron2's ResNet; p6 and p7 from p5 (FCOS's journal version, section 2.2)."""
    return fpn_over(cfg, build_resnet_backbone(cfg, input_shape), _last_levels(cfg))


@BACKBONE_REGISTRY.register()
def build_fcos_timm_fpn_backbone(cfg, input_shape) -> FPN:
    """The same over the timm model of MODEL.TIMM."""
    return fpn_over(cfg, build_undilated_timm_backbone(cfg, input_shape), _last_levels(cfg))


def _last_levels(cfg) -> LastLevelP6P7:
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    last = cfg.MODEL.FPN.IN_FEATURES[-1].replace("res", "p")
    return LastLevelP6P7(channels, channels, last)
