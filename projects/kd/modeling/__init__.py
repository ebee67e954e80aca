"""Meta-archs and backbones, ours and what detectron2's offer; importing this registers them."""

from . import (
    conditional_detr,
    dilated,
    fcos,
    gfl,
    pspnet,
    pyramids,
    reppoints,
    stock,
    timm_fpn,
)

__all__ = [
    "conditional_detr",
    "dilated",
    "fcos",
    "gfl",
    "pspnet",
    "pyramids",
    "reppoints",
    "stock",
    "timm_fpn",
]
