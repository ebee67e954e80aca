"""The mappers of this project, each built on the one above it, and the one that training takes.

:class:`ImageMapper` reads images as this project does, :class:`MultiResolutionMapper` adds the
teacher's image, :class:`TrainMapper` paints ignored regions out; :func:`build_train_mapper` wraps
it where labels or file names matter.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from torch.profiler import record_function

from ..config.teachers import image_scale
from ..detectors import offers
from ..errors import DataError
from ..levels import scaled_size
from .cache import SLOT, ImageStore, ResizedInput, resized_shape
from .detr_augmentation import detr_augmentations
from .ignored_regions import paint_out
from .images import image_header, read_image, read_labels, size_problem
from .labels import UNREADABLE, UsableLabels, check_label_size, crop_after_resize
from .two_sizes import Recorded, repeat_at_scale


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
        self.store: ImageStore | None = None  # DATALOADER.CACHE

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
        with record_function("kd/loader/read"):
            given = self._given(example)
        image = given.image
        try:
            with record_function("kd/loader/augmentation"):
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
            with record_function("kd/loader/annotations"):
                self._transform_annotations(example, transforms, shape)
        return example

    def use_store(self, store: ImageStore) -> str:
        """Keep images there; returns "resized" or "decoded", what is kept."""
        self.store = store
        return "resized" if self._resized_shape(1, 1) else "decoded"

    def kept_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what is kept of an image of these."""
        return self._resized_shape(height, width) or (height, width)

    def _resized_shape(self, height: int, width: int) -> tuple[int, int] | None:
        """Size of the resized image that is kept; None = the image is kept as read."""
        augmentations = self.augmentations.augs
        return resized_shape(augmentations[0], height, width) if augmentations else None

    def _given(self, example: dict) -> T.AugInput:
        path, slot = example["file_name"], example.pop(SLOT, None)
        labels = example.pop("sem_seg_file_name", None)
        read = functools.partial(read_image, path, self.image_format, self.white)
        if self.store is None or slot is None:
            given = T.AugInput(read())
        elif self._resized_shape(1, 1):
            given = ResizedInput(self.store, slot, read)
        else:
            image = self.store.get(slot)
            if image is None:
                image = read()
                self.store.put(slot, image, image.shape[:2])
            given = T.AugInput(image)
        height, width = given.image.shape[:2]
        size = example.setdefault("width", width), example.setdefault("height", height)
        if size != (width, height):
            raise DataError(f"{path}: {size_problem(image_header(path), *size)}")
        given.sem_seg = None if labels is None else read_labels(labels)
        return given


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
        self.augmentations = Recorded(self.augmentations.augs)
        self.teacher_scale = teacher_scale

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        """Read INPUT and KD.TEACHER.INPUT_SCALE, of several teachers the one that is not 1."""
        scale = image_scale(cfg)
        return {**super().from_config(cfg, is_train), "teacher_scale": scale}

    def _resized_shape(self, height: int, width: int) -> tuple[int, int] | None:
        return super()._resized_shape(height, width) if self.teacher_scale == 1 else None

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


class TrainMapper(MultiResolutionMapper):
    """detectron2's DatasetMapper that paints out ``ignored_regions`` of an image.

    Objects in ignored regions are not annotated, and as they are they would be learnt as
    background. Painting them with MODEL.PIXEL_MEAN, after augmentation, makes them what padding is
    (0 after normalisation). Ours, in place of anchors that count neither way, because

    - it is the same for anchors, points, proposals and queries, and for detectors to come;
    - teacher and student see the same (at two sizes: both images are painted), so no imitation
      loss reads the regions either;
    - the annotated boxes stay: where one overlaps a region, its pixels are left as they are.

    Its price: grey rectangles appear in training that test images do not have, and the context of
    objects at the rim of a region is lost.

    Where a teacher sees another size (KD.TEACHER.INPUT_SCALE), there is an image for it.

    Args:
        is_train, **kwargs: see :class:`MultiResolutionMapper`.
        region_colour: three values in the order of the image's channels, or None to keep regions.
    """

    @configurable
    def __init__(self, is_train: bool, *, region_colour: Sequence[float] | None, **kwargs):
        super().__init__(is_train, **kwargs)
        self.region_colour = None
        if region_colour is not None:
            self.region_colour = torch.tensor(region_colour).view(-1, 1, 1)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True):
        """Read INPUT, MODEL.PIXEL_MEAN and, where there is a teacher, KD.TEACHER.INPUT_SCALE."""
        options = super().from_config(cfg, is_train)
        if not cfg.KD.META_ARCHITECTURE:
            options["teacher_scale"] = 1.0
        paint = cfg.INPUT.IGNORED_REGIONS == "paint"
        return {**options, "region_colour": cfg.MODEL.PIXEL_MEAN if paint else None}

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        if regions := dataset_dict.get("ignored_regions"):
            boxes = np.array(regions, float)
            boxes[:, 2:] += boxes[:, :2]
            dataset_dict["ignored_regions"] = transforms.apply_box(boxes)

    def __call__(self, dataset_dict: dict) -> dict:
        """See :class:`detectron2.data.DatasetMapper`."""
        example = super().__call__(dataset_dict)
        regions = example.pop("ignored_regions", ())
        if self.region_colour is None or not len(regions) or "instances" not in example:
            return example
        kept = example["instances"].gt_boxes.tensor.numpy()
        height, width = example["image"].shape[-2:]
        for key in ("image", "image_teacher"):
            if key in example:
                image = example[key]
                scale = np.tile([image.shape[-1] / width, image.shape[-2] / height], 2)
                example[key] = paint_out(image, regions * scale, kept * scale, self.region_colour)
        return example


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


def build_train_mapper(cfg: CfgNode, labelled: bool = True) -> Callable[[dict], dict | None]:
    """The mapper of training, as INPUT, MODEL.MASK_ON, KD.TEACHER.INPUT_SCALE, ... set it.

    Args:
        cfg: the full config.
        labelled: False: for images without annotations and label maps.
    """
    own = {}
    if cfg.INPUT.DETR_AUGMENTATION:
        own["augmentations"] = detr_augmentations(cfg)
    elif cfg.INPUT.CROP.AFTER_RESIZE:
        own["augmentations"] = crop_after_resize(cfg, labelled)
    mapper = TrainMapper(cfg, is_train=True, **own)
    if labelled and offers(cfg.MODEL.META_ARCHITECTURE, "sem_seg"):
        head = cfg.MODEL.SEM_SEG_HEAD
        mapper = UsableLabels(mapper, head.NUM_CLASSES, head.IGNORE_VALUE)
    return NamedErrors(mapper)


def build_annotated_mapper(cfg: CfgNode) -> Callable[[dict], dict | None]:
    """Images at test size with their annotations as training has them, always the same."""
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return NamedErrors(MultiResolutionMapper(cfg, is_train=True, augmentations=[resize]))
