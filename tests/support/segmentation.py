"""Tiny segmentation networks and batches, for tests."""

from __future__ import annotations

import torch
from kd_models import tiny_cfg

CLASSES = 7

_SHARED = {
    "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 255,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 16,
    "MODEL.SEM_SEG_HEAD.NORM": "BN",
}
_NETWORKS = {
    "fpn": {
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead",
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
    },
    "pspnet": {
        "MODEL.BACKBONE.NAME": "build_dilated_resnet_backbone",
        "MODEL.RESNETS.OUTPUT_STRIDE": 8,
        "MODEL.RESNETS.OUT_FEATURES": ["res4", "res5"],
        "MODEL.SEM_SEG_HEAD.NAME": "PSPNetHead",
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res4", "res5"],
        "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 8,
    },
    "pspnet_timm": {
        "MODEL.BACKBONE.NAME": "build_plain_timm_backbone",
        "MODEL.TIMM.NAME": "mobilenetv2_035",
        "MODEL.TIMM.OUTPUT_STRIDE": 8,
        "MODEL.RESNETS.OUT_FEATURES": ["res4", "res5"],
        "MODEL.SEM_SEG_HEAD.NAME": "PSPNetHead",
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res4", "res5"],
        "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 8,
    },
    "fpn_timm": {
        "MODEL.BACKBONE.NAME": "build_timm_fpn_backbone",
        "MODEL.TIMM.NAME": "mobilenetv3_small_050",
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead",
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
    },
    "deeplab": {
        "MODEL.BACKBONE.NAME": "build_dilated_resnet_backbone",
        "MODEL.RESNETS.OUTPUT_STRIDE": 16,
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res5"],
        "MODEL.SEM_SEG_HEAD.NAME": "DeepLabV3PlusHead",
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res5"],
        "MODEL.SEM_SEG_HEAD.PROJECT_FEATURES": ["res2"],
        "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS": [8],
        "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS": 16,
        "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
    },
}
_NETWORKS["deeplabv3"] = {
    **_NETWORKS["deeplab"],
    "MODEL.SEM_SEG_HEAD.NAME": "DeepLabV3Head",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res5"],
    "MODEL.RESNETS.OUT_FEATURES": ["res5"],
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 16,
}
NETWORKS = tuple(_NETWORKS)


def segmentor_cfg(network: str = "pspnet", **overrides):
    """A config of a small segmentation network; overrides are written ``MODEL__WEIGHTS="..."``."""
    values = {**_SHARED, **_NETWORKS[network]}
    named = {key.replace(".", "__"): value for key, value in values.items()}
    return tiny_cfg(**{**named, **overrides})


def label_batch(sizes=((64, 96), (96, 64)), classes: int = CLASSES, seed: int = 0) -> list[dict]:
    """Random images of (height, width) and label maps of blocks; the lowest rows are ignored."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for height, width in sizes:
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        blocks = torch.randint(classes, (height // 8, width // 8), generator=generator)
        labels = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
        labels[-8:] = 255
        batch.append({"image": image, "sem_seg": labels, "height": height, "width": width})
    return batch
