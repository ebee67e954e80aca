"""The training mapper, with one-line errors."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image

from ..errors import DataError
from .detr_augmentation import detr_augmentations
from .ignored_regions import TrainMapper

# what Pillow and detectron2 raise for a missing, cut off or foreign file, or a wrong size
_UNREADABLE = (OSError, SyntaxError, SizeMismatchError, Image.DecompressionBombError)


class NamedErrors:
    """Runs a mapper and turns an unreadable image into a :class:`DataError` that names the file.

    Args:
        mapper: data set dict -> training example, or None to have another image tried.
    """

    def __init__(self, mapper: Callable[[dict], dict | None]):
        self.mapper = mapper

    def __call__(self, dataset_dict: dict) -> dict | None:
        """See the mapper."""
        try:
            return self.mapper(dataset_dict)
        except _UNREADABLE as error:
            name = dataset_dict.get("file_name", f"image {dataset_dict.get('image_id')}")
            raise DataError(f"{name}: image cannot be read: {error}") from error


def build_train_mapper(cfg: CfgNode) -> Callable[[dict], dict | None]:
    """The mapper of training, as INPUT, MODEL.MASK_ON, KD.TEACHER.INPUT_SCALE, ... set it."""
    own = {"augmentations": detr_augmentations(cfg)} if cfg.INPUT.DETR_AUGMENTATION else {}
    return NamedErrors(TrainMapper(cfg, is_train=True, **own))
