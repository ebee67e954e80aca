"""The training mapper: two resolutions from one augmentation, ignored regions painted out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable

from ..config import register_config
from .multi_resolution_mapper import MultiResolutionMapper


@register_config
def add_ignored_regions_config(cfg: CfgNode) -> None:
    """Add INPUT.IGNORED_REGIONS."""
    # Ignored regions of data sets that have them (VisDrone) in training: "paint" = the mean pixel
    # in their place, so that nothing in them is learnt; "keep" = they are background.
    cfg.INPUT.IGNORED_REGIONS = "paint"


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


def paint_out(
    image: torch.Tensor, regions: np.ndarray, kept: np.ndarray, colour: torch.Tensor
) -> torch.Tensor:
    """The image with boxes of one colour.

    Args:
        image: (3, H, W); an integer type takes the rounded colour.
        regions: (R, 4) XYXY in pixels; every pixel whose centre lies inside is painted.
        kept: (K, 4) XYXY; every pixel that one of them touches is left as it is.
        colour: (3, 1, 1).
    """
    height, width = image.shape[-2:]
    mask = torch.zeros(height, width, dtype=torch.bool)

    def fill(box, value):
        low, high = np.maximum(box[:2], 0), np.maximum(box[2:], 0)
        mask[int(low[1]) : int(high[1]), int(low[0]) : int(high[0])] = value

    for box in np.floor(regions + 0.5):
        fill(box, True)
    for box in np.concatenate([np.floor(kept[:, :2]), np.ceil(kept[:, 2:])], axis=1):
        fill(box, False)
    if not image.is_floating_point():
        colour = colour.round()
    return torch.where(mask, colour.to(image.dtype), image)
