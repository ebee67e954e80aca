"""The training mapper: two resolutions from one augmentation, ignored regions painted out."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.config import CfgNode

from ..config import register_config
from .multi_resolution_mapper import MultiResolutionMapper


@register_config
def add_ignored_regions_config(cfg: CfgNode) -> None:
    """Add INPUT.IGNORED_REGIONS."""
    # Ignored regions of data sets that have them (VisDrone) in training: "paint" = the mean pixel
    # in their place, so that nothing in them is learnt; "keep" = they are background.
    cfg.INPUT.IGNORED_REGIONS = "paint"


class TrainMapper(MultiResolutionMapper):
    """:class:`MultiResolutionMapper` that paints out ``ignored_regions`` of an image.

    Objects in ignored regions are not annotated, and as they are they would be learnt as
    background. Painting them with MODEL.PIXEL_MEAN, after augmentation, makes them what padding is
    (0 after normalisation). Ours, in place of anchors that count neither way, because

    - it is the same for anchors, points, proposals and queries, and for detectors to come;
    - teacher and student see the same image, so no imitation loss reads the regions either;
    - the annotated boxes stay: where one overlaps a region, its pixels are left as they are.

    Its price: grey rectangles appear in training that test images do not have, and the context of
    objects at the rim of a region is lost.

    Args:
        cfg: the full config.
        **options: in place of what INPUT says, see :class:`detectron2.data.DatasetMapper`.
    """

    def __init__(self, cfg: CfgNode, **options):
        if not cfg.KD.META_ARCHITECTURE:
            options["teacher_scale"] = 1.0  # there is no teacher to see another size
        super().__init__(cfg, is_train=True, **options)
        self.paint = cfg.INPUT.IGNORED_REGIONS == "paint"
        self.pixel_mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1)

    def __call__(self, dataset_dict: dict) -> dict:
        """See :class:`MultiResolutionMapper`."""
        self._regions = self._kept = None
        example = super().__call__(dataset_dict)
        if self._regions is not None:
            for key, scale in (("image", 1.0), ("image_teacher", self.teacher_scale)):
                if key in example:
                    boxes = self._regions * scale, self._kept * scale
                    example[key] = paint_out(example[key], *boxes, self.pixel_mean)
        return example

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        regions = dataset_dict.pop("ignored_regions", [])
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        if self.paint and len(regions):
            boxes = np.array(regions, float)
            boxes[:, 2:] += boxes[:, :2]
            self._regions = transforms.apply_box(boxes)
            self._kept = dataset_dict["instances"].gt_boxes.tensor.numpy()


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
