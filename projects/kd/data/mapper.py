"""The training mapper, with one-line errors for files that cannot be used."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode

from ..detectors import offers
from ..errors import DataError
from .detr_augmentation import detr_augmentations
from .ignored_regions import TrainMapper
from .labels import UNREADABLE, UsableLabels, check_label_size, crop_after_resize


class NamedErrors:
    """Runs a mapper and turns unusable files into a :class:`DataError` that names them.

    Args:
        mapper: data set dict -> training example, or None to have another image tried.
    """

    def __init__(self, mapper: Callable[[dict], dict | None]):
        self.mapper = mapper

    def __call__(self, dataset_dict: dict) -> dict | None:
        """See the mapper."""
        name = dataset_dict.get("file_name", f"image {dataset_dict.get('image_id')}")
        try:
            check_label_size(dataset_dict)
            return self.mapper(dataset_dict)
        except UNREADABLE as error:
            raise DataError(f"{name}: image cannot be read: {error}") from error


def build_train_mapper(cfg: CfgNode) -> Callable[[dict], dict | None]:
    """The mapper of training, as INPUT, MODEL.MASK_ON, KD.TEACHER.INPUT_SCALE, ... set it."""
    own = {}
    if cfg.INPUT.DETR_AUGMENTATION:
        own["augmentations"] = detr_augmentations(cfg)
    elif cfg.INPUT.CROP.AFTER_RESIZE:
        own["augmentations"] = crop_after_resize(cfg)
    mapper = TrainMapper(cfg, is_train=True, **own)
    if offers(cfg.MODEL.META_ARCHITECTURE, "sem_seg"):
        head = cfg.MODEL.SEM_SEG_HEAD
        mapper = UsableLabels(mapper, head.NUM_CLASSES, head.IGNORE_VALUE)
    return NamedErrors(mapper)
