"""Inference on large images in overlapping tiles."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import nn

from ..config import register_config
from ..errors import ConfigError

# A box that ends this many pixels from a tile's border counts as cut there. Ours.
BORDER = 2.0


@register_config
def add_tiles_config(cfg: CfgNode) -> None:
    """Add TEST.TILES."""
    cfg.TEST.TILES = tiles = CN()
    # True: evaluate in tiles of the image as INPUT.MIN_SIZE_TEST resizes it (0 = not at all).
    tiles.ENABLED = False
    # Side of a tile, and overlap of neighbours, in pixels of the resized image. Objects smaller
    # than the overlap lie in one tile as a whole.
    tiles.SIZE = 800
    tiles.OVERLAP = 200
    # Detections of all tiles are merged by non-maximum suppression within a class.
    tiles.NMS_THRESH = 0.5
    # True: the whole image is a tile too, for objects larger than the overlap.
    tiles.WHOLE_IMAGE = True


def check_tiles(cfg: CfgNode) -> None:
    """Refuse what tiles cannot do; ConfigError names the key."""
    tiles = cfg.TEST.TILES
    if not tiles.ENABLED:
        return
    if tiles.SIZE < 1 or not 0 <= tiles.OVERLAP < tiles.SIZE:
        raise ConfigError(
            f"TEST.TILES.OVERLAP is {tiles.OVERLAP}, it must lie in [0, SIZE) and SIZE, "
            f"{tiles.SIZE}, be positive"
        )
    if not 0.0 < tiles.NMS_THRESH <= 1.0:
        raise ConfigError(f"TEST.TILES.NMS_THRESH is {tiles.NMS_THRESH}, it must lie in (0, 1]")
    for key, value in (
        ("MODEL.MASK_ON", cfg.MODEL.MASK_ON),
        ("MODEL.KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON),
        ("TEST.AUG.ENABLED", cfg.TEST.AUG.ENABLED),
    ):
        if value:
            raise ConfigError(f"TEST.TILES.ENABLED: tiles give boxes only, set {key} to False")


def tile_starts(length: int, size: int, overlap: int) -> list[int]:
    """First pixels of the tiles along a side: as few as cover it, evenly spread.

    Neighbours share ``overlap`` pixels or more. One tile if the side is not longer than ``size``.
    """
    if length <= size:
        return [0]
    steps = -(-(length - size) // (size - overlap))
    return [i * (length - size) // steps for i in range(steps + 1)]


class TiledDetector(nn.Module):
    """A detector that sees its image in tiles and merges what it finds.

    Of an object that a tile cuts, the tile's box is dropped if a neighbour sees more of it: where
    the box touches an inner border and is shorter than the overlap across it. What remains of all
    tiles goes through class-wise non-maximum suppression, and the best TEST.DETECTIONS_PER_IMAGE
    are kept. Ours; tiles with merged suppression are common use for aerial images.

    Args:
        model: a detectron2 detector; gives ``instances`` with boxes, scores and classes.
        size, overlap: of the tiles in pixels of the network's input.
        nms_thresh: IoU above which the lower score is suppressed.
        whole_image: run on the whole image as well.
        max_detections: kept for an image.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        size: int,
        overlap: int,
        nms_thresh: float,
        whole_image: bool,
        max_detections: int,
    ):
        super().__init__()
        self.model = model
        self.training = model.training  # evaluation puts the mode back that it finds here
        self.size, self.overlap = size, overlap
        self.nms_thresh = nms_thresh
        self.whole_image = whole_image
        self.max_detections = max_detections

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> TiledDetector:
        """Wrap ``model`` as TEST.TILES says; ConfigError for what tiles cannot do."""
        check_tiles(cfg)
        tiles = cfg.TEST.TILES
        return cls(
            model,
            size=tiles.SIZE,
            overlap=tiles.OVERLAP,
            nms_thresh=tiles.NMS_THRESH,
            whole_image=tiles.WHOLE_IMAGE,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        )

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Detections in pixels of ``height`` x ``width``, as detectron2's detectors give them.

        Args:
            batched_inputs: ``image`` (3, H, W) and the original ``height`` and ``width``.
        """
        return [{"instances": self._detect(entry)} for entry in batched_inputs]

    def _detect(self, entry: dict) -> Instances:
        image = entry["image"]
        height, width = image.shape[-2:]
        rows = tile_starts(height, self.size, self.overlap)
        columns = tile_starts(width, self.size, self.overlap)
        if len(rows) == len(columns) == 1:
            return self.model([entry])[0]["instances"]
        parts = [self._tile(entry, top, left) for top in rows for left in columns]
        if self.whole_image:
            parts.append(self._run(image))
        boxes, scores, classes = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        keep = batched_nms(boxes, scores.float(), classes, self.nms_thresh)[: self.max_detections]
        size = (entry.get("height", height), entry.get("width", width))
        merged = Instances(size)
        merged.pred_boxes = Boxes(boxes[keep])
        merged.pred_boxes.scale(size[1] / width, size[0] / height)
        merged.pred_boxes.clip(size)
        merged.scores, merged.pred_classes = scores[keep], classes[keep]
        return merged

    def _run(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Boxes XYXY in pixels of ``image``, scores and classes."""
        height, width = image.shape[-2:]
        found = self.model([{"image": image, "height": height, "width": width}])[0]["instances"]
        return found.pred_boxes.tensor, found.scores, found.pred_classes

    def _tile(self, entry: dict, top: int, left: int):
        """As :meth:`_run` for one tile, in pixels of the whole image, without cut objects."""
        image = entry["image"]
        bottom = min(top + self.size, image.shape[-2])
        right = min(left + self.size, image.shape[-1])
        boxes, scores, classes = self._run(image[:, top:bottom, left:right])
        boxes = boxes + boxes.new_tensor([left, top, left, top])
        cut = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        for axis, (low, high, end) in enumerate(
            [(left, right, image.shape[-1]), (top, bottom, image.shape[-2])]
        ):
            short = boxes[:, axis + 2] - boxes[:, axis] < self.overlap
            if low > 0:
                cut |= short & (boxes[:, axis] < low + BORDER)
            if high < end:
                cut |= short & (boxes[:, axis + 2] > high - BORDER)
        return boxes[~cut], scores[~cut], classes[~cut]
