"""Test-time augmentation (TEST.AUG): several sizes and flips of an image, detections joined."""

from __future__ import annotations

import copy

import torch
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNNWithTTA
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.test_time_augmentation import DatasetMapperTTA
from detectron2.structures import Boxes, Instances
from torch import nn

from ..data.images import read_image
from ..errors import ConfigError


class DenseDetectorWithTTA(nn.Module):
    """detectron2's TTA for one-stage detectors, which detectron2 has for GeneralizedRCNN only.

    Each version of an image is detected on its own; boxes go back to the image, and non-maximum
    suppression by class with the detector's own threshold joins them (ours).

    Args:
        cfg: TEST.AUG is read, and INPUT.FORMAT.
        model: a DenseDetector with ``test_nms_thresh`` and ``max_detections_per_image``.
    """

    def __init__(self, cfg, model: DenseDetector):
        super().__init__()
        self.model = model
        self.mapper = DatasetMapperTTA(cfg)
        self.format = cfg.INPUT.FORMAT
        self.white = cfg.INPUT.WHITE

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """As the model's own; images with a ``file_name`` are read again at their full size."""
        return [{"instances": self._detect(self._full_size(x))} for x in batched_inputs]

    def _full_size(self, example: dict) -> dict:
        example = copy.copy(example)
        if "file_name" in example:
            image = read_image(example["file_name"], self.format, self.white)
            example["image"] = torch.from_numpy(image.transpose(2, 0, 1).copy())
        example.setdefault("height", example["image"].shape[1])
        example.setdefault("width", example["image"].shape[2])
        return example

    def _detect(self, example: dict) -> Instances:
        size = example["height"], example["width"]
        boxes, scores, classes = [], [], []
        for version in self.mapper(example):
            transforms = version.pop("transforms")
            # boxes in pixels of the version, which is what the transforms can undo
            version["height"], version["width"] = version["image"].shape[1:]
            found = self.model([version])[0]["instances"]
            own = found.pred_boxes.tensor
            boxes.append(torch.as_tensor(transforms.inverse().apply_box(own.cpu().numpy())).to(own))
            scores.append(found.scores)
            classes.append(found.pred_classes)
        result = Instances(
            size,
            pred_boxes=Boxes(torch.cat(boxes)),
            scores=torch.cat(scores),
            pred_classes=torch.cat(classes),
        )
        result.pred_boxes.clip(size)
        keep = batched_nms(
            result.pred_boxes.tensor,
            result.scores,
            result.pred_classes,
            self.model.test_nms_thresh,
        )
        return result[keep[: self.model.max_detections_per_image]]


def tta_class(cfg):
    """What wraps a model of this config for TEST.AUG: called with (cfg, model).

    Raises:
        ConfigError: there is none for this meta-arch.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if name == "GeneralizedRCNN":
        return GeneralizedRCNNWithTTA
    arch = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    if isinstance(arch, type) and issubclass(arch, DenseDetector):
        return DenseDetectorWithTTA
    raise ConfigError(
        f"TEST.AUG.ENABLED: {name} cannot; it needs MODEL.META_ARCHITECTURE GeneralizedRCNN or a "
        "one-stage detector"
    )
