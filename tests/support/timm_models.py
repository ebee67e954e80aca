"""Configs, models and images for tests of timm backbones."""

from __future__ import annotations

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import nn

from projects.kd.config import add_kd_config

SMALL = "mobilenetv3_small_050"


RCNN, RETINA = "build_timm_fpn_backbone", "build_retinanet_timm_fpn_backbone"


def make_cfg(builder: str = RETINA, name: str = SMALL, **timm_keys):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    stages = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = stages if builder == RETINA else ["res2", *stages]
    cfg.MODEL.TIMM.NAME = name
    for key, value in timm_keys.items():
        cfg.MODEL.TIMM[key] = value
    return cfg


def build(cfg, seed: int = 0):
    torch.manual_seed(seed)
    return build_backbone(cfg)


def randomise_norms(model, seed: int = 3):
    """Statistics and affine parameters that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
            for tensor in (module.bias, module.running_mean):
                tensor.data = torch.randn(tensor.shape, generator=generator) * 0.1


def images(height: int = 64, width: int = 96, count: int = 2, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
