"""Label maps in training: what cannot be used is refused, and how they are cropped."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError, build_augmentation
from PIL import Image

from ..errors import ConfigError, DataError
from .images import image_size

# what Pillow and detectron2 raise for a missing, cut off or foreign file, or a wrong size
UNREADABLE = (OSError, SyntaxError, SizeMismatchError, Image.DecompressionBombError)


def check_label_size(dataset_dict: dict) -> None:
    """Refuse a label map of another size than its image; only the file's header is read.

    Raises:
        DataError: names the label map.
    """
    path = dataset_dict.get("sem_seg_file_name")
    if not path or "height" not in dataset_dict:
        return
    size = image_size(path)
    wanted = dataset_dict["width"], dataset_dict["height"]
    if size != wanted:
        raise DataError(
            f"{path}: the label map has {size[0]}x{size[1]} pixels, its image "
            f"{dataset_dict['file_name']} has {wanted[0]}x{wanted[1]}"
        )


class UsableLabels:
    """Runs a mapper and looks at the label map of its example.

    Args:
        mapper: data set dict -> training example.
        num_classes: labels are 0 to num_classes - 1.
        ignore: label of pixels without a class.
    """

    def __init__(self, mapper: Callable[[dict], dict], num_classes: int, ignore: int):
        self.mapper = mapper
        self.num_classes = num_classes
        self.ignore = ignore

    def __call__(self, dataset_dict: dict) -> dict | None:
        """The example; None, so that another image is tried, if no pixel of it has a class.

        detectron2's losses are 0 / 0 for a batch without labelled pixels.

        Raises:
            DataError: no label map, or a label that is no class.
        """
        path = dataset_dict.get("sem_seg_file_name")
        if not path:
            raise DataError(
                f"{dataset_dict.get('file_name')} has no label map, which a model that segments "
                "needs: choose another data set in DATASETS.TRAIN"
            )
        example = self.mapper(dataset_dict)
        labels = example["sem_seg"]
        labels = labels[labels != self.ignore]
        if len(labels) == 0:
            return None
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= self.num_classes:
            raise DataError(
                f"{path}: label {high if high >= self.num_classes else low} is no class: "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {self.num_classes}, "
                f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE {self.ignore}"
            )
        return example


def crop_after_resize(cfg: CfgNode, labelled: bool = True) -> list[T.Augmentation]:
    """detectron2's augmentations with INPUT.CROP behind the resize (INPUT.CROP.AFTER_RESIZE).

    Args:
        cfg: the full config.
        labelled: False: the crop asks for no label map.
    """
    if not cfg.INPUT.CROP.ENABLED:
        raise ConfigError("INPUT.CROP.AFTER_RESIZE needs INPUT.CROP.ENABLED True")
    resize, *others = build_augmentation(cfg, is_train=True)
    if not labelled:
        return [resize, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE), *others]
    crop = T.RandomCrop_CategoryAreaConstraint(
        cfg.INPUT.CROP.TYPE,
        cfg.INPUT.CROP.SIZE,
        cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA,
        cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
    )
    return [resize, crop, *others]
