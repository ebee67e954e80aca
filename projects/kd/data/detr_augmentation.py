"""The augmentation that DETR and its relatives are trained with."""

from __future__ import annotations

import random

from detectron2.config import CfgNode
from detectron2.data import transforms as T

from ..config import register_config
from ..errors import ConfigError, require_one_of


@register_config
def add_detr_augmentation_config(cfg: CfgNode) -> None:
    """Add the keys of DETR's augmentation to INPUT."""
    # True: in training, with probability 1/2 each, resize to INPUT.MIN_SIZE_TRAIN, MAX_SIZE_TRAIN;
    # or resize, crop, and then resize to those. INPUT.RANDOM_FLIP as ever; INPUT.CROP is not read.
    cfg.INPUT.DETR_AUGMENTATION = False
    # Short side before the crop, one of these, without a limit of the long side.
    cfg.INPUT.DETR_CROP_RESIZE = (400, 500, 600)
    # Smallest and largest side of the crop in pixels, each side drawn by itself.
    cfg.INPUT.DETR_CROP_RANGE = (384, 600)


class ResizeOrCrop(T.Augmentation):
    """With probability 1/2 one list of augmentations, else the other.

    Args:
        plain, cropped: the two lists.
    """

    def __init__(self, plain: list[T.Augmentation], cropped: list[T.Augmentation]):
        super().__init__()
        self.plain = T.AugmentationList(plain)
        self.cropped = T.AugmentationList(cropped)

    def __call__(self, aug_input: T.AugInput) -> T.Transform:
        """Apply one of the two lists to an input, in place."""
        return (self.plain if random.random() < 0.5 else self.cropped)(aug_input)


def detr_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Flip and :class:`ResizeOrCrop`, as in the public code of DETR."""
    node = cfg.INPUT
    low, high = _checked_range(node.DETR_CROP_RANGE)
    resize = T.ResizeShortestEdge(
        node.MIN_SIZE_TRAIN, node.MAX_SIZE_TRAIN, node.MIN_SIZE_TRAIN_SAMPLING
    )
    crop = [
        T.ResizeShortestEdge(node.DETR_CROP_RESIZE, sample_style="choice"),
        T.RandomCrop("absolute_range", (low, high)),
        resize,
    ]
    flips = {
        "horizontal": [T.RandomFlip(horizontal=True, vertical=False)],
        "vertical": [T.RandomFlip(horizontal=False, vertical=True)],
        "none": [],
    }
    require_one_of("INPUT.RANDOM_FLIP", node.RANDOM_FLIP, flips)
    return [*flips[node.RANDOM_FLIP], ResizeOrCrop([resize], crop)]


def _checked_range(value) -> tuple[int, int]:
    if len(value) != 2 or not 0 < value[0] <= value[1]:
        raise ConfigError(
            f"INPUT.DETR_CROP_RANGE is {tuple(value)}, it must be (smallest, largest) in pixels"
        )
    return value[0], value[1]
