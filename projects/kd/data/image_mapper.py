"""detectron2's mapper with this project's reading of images and label maps."""

from __future__ import annotations

import copy

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from ..errors import DataError
from .images import image_header, read_image, read_labels, size_problem


class ImageMapper(DatasetMapper):
    """detectron2's DatasetMapper; its examples are the same wherever detectron2 reads the image.

    It has no place where the reading of an image could be put in, hence ``__call__`` of our own.
    Images are read by :func:`~projects.kd.data.images.read_image`, label maps by
    :func:`~projects.kd.data.images.read_labels`.

    Args:
        is_train, **kwargs: see :class:`detectron2.data.DatasetMapper`.
        white: see INPUT.WHITE.
    """

    @configurable
    def __init__(self, is_train: bool, *, white: float = 0.0, **kwargs):
        super().__init__(is_train, **kwargs)
        self.white = white

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True):
        """Read INPUT."""
        return {**super().from_config(cfg, is_train), "white": cfg.INPUT.WHITE}

    def __call__(self, dataset_dict: dict) -> dict:
        """See :class:`detectron2.data.DatasetMapper`.

        Raises:
            DataError: a file that cannot be used; it is named.
        """
        example = copy.deepcopy(dataset_dict)
        image = self._image(example)
        labels = example.pop("sem_seg_file_name", None)
        given = T.AugInput(image, sem_seg=None if labels is None else read_labels(labels))
        try:
            transforms = self.augmentations(given)
        except ValueError as error:
            raise DataError(
                f"{example['file_name']}: image of {image.shape[1]}x{image.shape[0]} pixels cannot "
                f"be resized as INPUT says: {error}"
            ) from error
        example["image"] = torch.as_tensor(np.array(given.image.transpose(2, 0, 1), order="C"))
        if given.sem_seg is not None:
            example["sem_seg"] = torch.as_tensor(given.sem_seg.astype("long"))
        shape = given.image.shape[:2]
        if self.proposal_topk is not None:
            utils.transform_proposals(example, shape, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            example.pop("annotations", None)
        elif "annotations" in example:
            self._transform_annotations(example, transforms, shape)
        return example

    def _image(self, example: dict) -> np.ndarray:
        path = example["file_name"]
        image = read_image(path, self.image_format, self.white)
        height, width = image.shape[:2]
        size = example.setdefault("width", width), example.setdefault("height", height)
        if size != (width, height):
            raise DataError(f"{path}: {size_problem(image_header(path), *size)}")
        return image
