"""A dozen noise images and a RetinaNet backbone of a few thousand weights, for training tests."""

from __future__ import annotations

import itertools

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.structures import BoxMode
from PIL import Image
from torch import nn


def register_noise(folder, name: str, count: int = 12) -> list[dict]:
    """Register images of 64x48 and 48x64 with one to three boxes each under a (maybe used) name."""
    dicts = []
    for i in range(count):
        width, height = (48, 64) if i % 3 == 0 else (64, 48)
        path = folder / f"{name}_{i}.png"
        pixels = np.random.RandomState(i).randint(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        boxes = [
            {
                "bbox": [2 + 14 * k, 4 + i, 15 + 14 * k, 22 + i],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": (i + k) % 3,
                "iscrowd": 0,
            }
            for k in range(1 + i % 3)
        ]
        dicts.append(
            {
                "file_name": str(path),
                "image_id": i,
                "height": height,
                "width": width,
                "annotations": boxes,
            }
        )
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).set(thing_classes=["a", "b", "c"], evaluator_type="coco")
    return dicts


class ToyBottomUp(Backbone):
    """Five strided convolutions with BatchNorm: res3 to res5 at strides 8 to 32."""

    def __init__(self):
        super().__init__()
        widths = (3, 4, 8, 8, 8, 8)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()
            )
            for before, after in itertools.pairwise(widths)
        )
        self._out_features = ["res3", "res4", "res5"]
        self._out_feature_channels = dict.fromkeys(self._out_features, 8)
        self._out_feature_strides = {"res3": 8, "res4": 16, "res5": 32}

    def forward(self, x):
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return dict(zip(self._out_features, outputs[2:], strict=True))


@BACKBONE_REGISTRY.register()
def build_toy_backbone(cfg, input_shape):
    """:class:`ToyBottomUp` alone."""
    return ToyBottomUp()


@BACKBONE_REGISTRY.register()
def build_toy_fpn_backbone(cfg, input_shape):
    """An FPN of p3 to p7 over :class:`ToyBottomUp`: a RetinaNet step takes some 30 ms."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=ToyBottomUp(),
        in_features=["res3", "res4", "res5"],
        out_channels=channels,
        top_block=LastLevelP6P7(8, channels),
    )
