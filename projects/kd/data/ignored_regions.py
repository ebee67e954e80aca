"""Ignored regions of an image, painted out in training."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.config import CfgNode

from ..config import register_config


@register_config
def add_ignored_regions_config(cfg: CfgNode) -> None:
    """Add INPUT.IGNORED_REGIONS."""
    # Ignored regions of data sets that have them (VisDrone) in training: "paint" = the mean pixel
    # in their place, so that nothing in them is learnt; "keep" = they are background.
    cfg.INPUT.IGNORED_REGIONS = "paint"


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
