"""What was done to an image, done once more to end at another size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import HFlipTransform, VFlipTransform

from ..errors import DataError
from ..levels import scaled_size

# what does the same to an image of any size
_SIZE_FREE = (HFlipTransform, VFlipTransform, T.NoOpTransform, T.ColorTransform)


class Recorded(T.AugmentationList):
    """Keeps the last image it was given and the transforms it drew for it."""

    last = None

    def __call__(self, aug_input) -> T.TransformList:
        """See the base class."""
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
