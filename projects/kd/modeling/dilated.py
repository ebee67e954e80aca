"""Backbones of a smaller output stride: strides of the last stages become dilations.

``MODEL.BACKBONE.NAME: "build_dilated_resnet_backbone"`` is detectron2's ResNet, R18 to R152, with
``MODEL.RESNETS.OUTPUT_STRIDE`` 8, 16 or 32 (detectron2's own keys dilate res5 of R50 and deeper
only). Parameters keep their names, so ImageNet weights load as usual. For timm models see
``build_plain_timm_backbone`` and ``MODEL.TIMM.OUTPUT_STRIDE``.
"""

from __future__ import annotations

from detectron2.config import CfgNode as CN
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_resnet_backbone
from detectron2.modeling.backbone.resnet import ResNet
from torch import nn

from ..config import register_config
from ..errors import ConfigError

OUTPUT_STRIDES = (8, 16, 32)


@register_config
def add_dilation_config(cfg: CN) -> None:
    """Add MODEL.RESNETS.OUTPUT_STRIDE."""
    # Of build_dilated_resnet_backbone: 32 = not dilated, 16 = res5, 8 = res4 and res5 dilated.
    cfg.MODEL.RESNETS.OUTPUT_STRIDE = 32


@BACKBONE_REGISTRY.register()
def build_dilated_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """detectron2's ResNet of MODEL.RESNETS with a limited output stride.

    Raises:
        ConfigError: an output stride that is not 8, 16 or 32, or with RES5_DILATION.
    """
    stride = cfg.MODEL.RESNETS.OUTPUT_STRIDE
    if stride not in OUTPUT_STRIDES:
        raise ConfigError(f"MODEL.RESNETS.OUTPUT_STRIDE: {stride} is not one of {OUTPUT_STRIDES}")
    if cfg.MODEL.RESNETS.RES5_DILATION != 1:
        raise ConfigError("MODEL.RESNETS.RES5_DILATION: leave it at 1, OUTPUT_STRIDE decides")
    backbone = build_resnet_backbone(cfg, input_shape)
    dilate(backbone, stride)
    return backbone


def dilate(backbone: ResNet, output_stride: int) -> None:
    """Give no stage a stride beyond ``output_stride``, in place.

    In the stages beyond it, strides become 1 and all 3x3 convolutions are dilated by the factor
    that is missing (as in the PSPNet authors' code, the first block's too).
    """
    for name, stride in backbone._out_feature_strides.items():
        backbone._out_feature_strides[name] = min(stride, output_stride)
    stride = backbone.stem.stride
    for stage in backbone.stages:
        for block in stage:
            stride *= block.stride
            if stride <= output_stride:
                continue
            block.stride = 1
            rate = stride // output_stride
            for conv in block.modules():
                if isinstance(conv, nn.Conv2d):
                    conv.stride = (1, 1)
                    if conv.kernel_size == (3, 3):
                        conv.dilation = conv.padding = (rate, rate)
