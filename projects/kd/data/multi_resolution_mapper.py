"""One augmentation, two sizes: the student's image and the teacher's, both from the original."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import transforms as T
from fvcore.transforms.transform import HFlipTransform, VFlipTransform

from ..errors import DataError
from ..levels import scaled_size
from .image_mapper import ImageMapper

# what does the same to an image of any size
_SIZE_FREE = (HFlipTransform, VFlipTransform, T.NoOpTransform, T.ColorTransform)


class MultiResolutionMapper(ImageMapper):
    """:class:`ImageMapper`; its examples have the teacher's image too where the scale is not 1.

    ``image`` and ``instances`` are those of detectron2's mapper, with the same random numbers.
    ``image_teacher`` (3, :func:`~projects.kd.levels.scaled_size` of ``image``) shows the same crop
    of the original, flipped alike and resized once, to the larger size: resizing ``image`` would
    add no detail. Boxes are in pixels of ``image`` only.

    Args:
        is_train: see :class:`detectron2.data.DatasetMapper`.
        teacher_scale: side of the teacher's image in parts of the student's.
        **kwargs: see :class:`detectron2.data.DatasetMapper`.
    """

    @configurable
    def __init__(self, is_train: bool, *, teacher_scale: float, **kwargs):
        super().__init__(is_train, **kwargs)
        self.augmentations = _Recorded(self.augmentations.augs)
        self.teacher_scale = teacher_scale

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        """Read INPUT and KD.TEACHER.INPUT_SCALE."""
        scale = cfg.KD.TEACHER.INPUT_SCALE
        return {**super().from_config(cfg, is_train), "teacher_scale": scale}

    def __call__(self, dataset_dict: dict) -> dict:
        """See :class:`detectron2.data.DatasetMapper`."""
        example = super().__call__(dataset_dict)
        if self.teacher_scale != 1:
            original, transforms = self.augmentations.last
            size = scaled_size(example["image"].shape[-2:], self.teacher_scale)
            image = repeat_at_scale(original, transforms, self.teacher_scale, size)
            image = np.ascontiguousarray(image.transpose(2, 0, 1))
            example["image_teacher"] = torch.as_tensor(image)
        self.augmentations.last = None
        return example


class _Recorded(T.AugmentationList):
    """Keeps the last image it was given and the transforms it drew for it."""

    last = None

    def __call__(self, aug_input) -> T.TransformList:
        original = aug_input.image
        transforms = super().__call__(aug_input)
        self.last = original, transforms.transforms
        return transforms


def repeat_at_scale(
    image: np.ndarray, transforms: Sequence[T.Transform], scale: float, size: tuple[int, int]
) -> np.ndarray:
    """Apply to an image what was done to it once already, ending at another size.

    The first resize, and every one after it, goes to ``scale`` times the size it had; crops behind
    it are scaled. Where that is no whole number it is rounded to the nearest pixel, halves up, so
    that the two images may differ by half a pixel of this one in what they show.

    Args:
        image: (H, W, C), the original.
        transforms: in their order.
        scale: of the sides.
        size: (height, width) of the result.

    Raises:
        DataError: a transform of which it is not known how it scales.
    """
    factor = 1.0
    for transform in transforms:
        if isinstance(transform, T.ResizeTransform):
            factor = scale
            wanted = scaled_size((transform.new_h, transform.new_w), scale)
            transform = T.ResizeTransform(*image.shape[:2], *wanted, transform.interp)
        elif factor != 1:
            transform = _at_scale(transform, image.shape[:2], factor)
        image = transform.apply_image(image)
    if image.shape[:2] != size:  # no resize among the transforms
        image = T.ResizeTransform(*image.shape[:2], *size).apply_image(image)
    return image


def _at_scale(transform: T.Transform, size: tuple[int, int], scale: float) -> T.Transform:
    if isinstance(transform, _SIZE_FREE):
        return transform
    if isinstance(transform, T.CropTransform):
        height, width = scaled_size((transform.h, transform.w), scale)
        y, x = scaled_size((transform.y0, transform.x0), scale)
        return T.CropTransform(min(x, size[1] - width), min(y, size[0] - height), width, height)
    raise DataError(
        f"KD.TEACHER.INPUT_SCALE {scale:g}: {type(transform).__name__} behind a resize cannot be "
        "repeated at another size; put it before the resize, or set INPUT_SCALE to 1.0"
    )
