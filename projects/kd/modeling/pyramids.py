"""FPN of p3 to p7 whose last two levels are convolutions of p5 (FCOS, GFL)."""

from __future__ import annotations

from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from .timm_fpn import build_timm_backbone, fpn_over


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg, input_shape) -> FPN:
    """detectron2's ResNet; p6 and p7 from p5 (FCOS's journal version, section 2.2)."""
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=_last_levels(cfg),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_fcos_timm_fpn_backbone(cfg, input_shape) -> FPN:
    """The same over the timm model of MODEL.TIMM."""
    return fpn_over(cfg, build_timm_backbone(cfg, input_shape), _last_levels(cfg))


def _last_levels(cfg) -> LastLevelP6P7:
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    last = cfg.MODEL.FPN.IN_FEATURES[-1].replace("res", "p")
    return LastLevelP6P7(channels, channels, last)
