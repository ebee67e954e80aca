"""FPN of p3 to p7 whose last two levels are convolutions of p5 (FCOS, GFL)."""

from __future__ import annotations

from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from .timm_fpn import build_timm_backbone


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg, input_shape) -> FPN:
    """detectron2's ResNet; p6 and p7 from p5 (FCOS's journal version, section 2.2)."""
    return _pyramid(cfg, build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_fcos_timm_fpn_backbone(cfg, input_shape) -> FPN:
    """The same over the timm model of MODEL.TIMM."""
    return _pyramid(cfg, build_timm_backbone(cfg, input_shape))


def _pyramid(cfg, bottom_up) -> FPN:
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    last = cfg.MODEL.FPN.IN_FEATURES[-1].replace("res", "p")
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(channels, channels, last),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
