"""Sizes of a data set's objects at training size, and anchors that fit them.

"Size" is the square root of a box's area, in pixels of the network's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.transforms import ResizeShortestEdge

from ..errors import ConfigError
from .size_pictures import objects_of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
GOOD_IOU = 0.5  # of a box with the best anchor of the same centre


@dataclass(frozen=True)
class SizeAdvice:
    """What :func:`size_advice` found.

    Attributes:
        sizes: (N,) of the objects at training size.
        quantiles: share to size.
        tiny: share of objects below 8 pixels, a cell of p3.
        present: share of objects that an anchor of the config meets with GOOD_IOU or more; None
            for detectors without anchors.
        anchors: suggested MODEL.ANCHOR_GENERATOR.SIZES, a list a level; None without anchors.
        suggested: the share with these.
    """

    sizes: np.ndarray
    quantiles: dict[float, float]
    tiny: float
    present: float | None = None
    anchors: list[list[int]] | None = None
    suggested: float | None = None

    def text(self) -> str:
        """A few lines for the console."""
        listed = ", ".join(
            f"{100 * q:.0f} % below {size:.0f}" for q, size in self.quantiles.items()
        )
        lines = [f"{len(self.sizes)} objects at training size, pixels: {listed}"]
        if self.tiny > 0.1:
            lines.append(
                f"{100 * self.tiny:.0f} % are below 8 pixels: raise INPUT.MIN_SIZE_TRAIN and "
                "MIN_SIZE_TEST, or cut crops (INPUT.CROP) and test in tiles (TEST.TILES)"
            )
        if self.anchors is not None:
            shares = f"{100 * self.present:.0f} % (suggested sizes: {100 * self.suggested:.0f} %)"
            lines.append(f"objects that an anchor meets with IoU {GOOD_IOU} or more: {shares}")
            lines.append(f"MODEL.ANCHOR_GENERATOR.SIZES: {self.anchors}")
        return "\n".join(lines)


def size_advice(dataset: str, cfg: CfgNode) -> SizeAdvice:
    """Object sizes of a registered data set at the training size of a config, and what fits them.

    Of several INPUT.MIN_SIZE_TRAIN the middle one counts. A crop that is cut before resizing counts
    with its size.

    Args:
        dataset: with boxes.
        cfg: a detector's config; its anchors, if it has any, are judged.

    Raises:
        ConfigError: a data set without boxes.
    """
    short = sorted(cfg.INPUT.MIN_SIZE_TRAIN)[len(cfg.INPUT.MIN_SIZE_TRAIN) // 2]
    found = []
    for entry in DatasetCatalog.get(dataset):
        boxes, _ = objects_of(entry)
        height, width = _cropped(entry["height"], entry["width"], cfg)
        scale = 1.0
        if short > 0:
            new = ResizeShortestEdge.get_output_shape(
                height, width, short, cfg.INPUT.MAX_SIZE_TRAIN
            )
            scale = math.sqrt(new[0] * new[1] / (height * width))
        found.append(boxes[:, 2:] * scale)
    sides = np.concatenate(found) if found else np.zeros((0, 2))
    if not len(sides):
        raise ConfigError(f"--dataset: '{dataset}' has no boxes")
    sizes = np.sqrt(sides.prod(axis=1))
    quantiles = {q: float(np.quantile(sizes, q)) for q in QUANTILES}
    tiny = float((sizes < 8).mean())
    levels = anchor_levels(cfg)
    if levels is None:
        return SizeAdvice(sizes, quantiles, tiny)
    generator = cfg.MODEL.ANCHOR_GENERATOR
    given = [list(x) for x in generator.SIZES]
    given = given * levels if len(given) == 1 else given
    ratios = sorted({r for level in generator.ASPECT_RATIOS for r in level})
    anchors = suggest_anchors(sizes, levels, max(len(given[0]), 1))
    return SizeAdvice(
        sizes,
        quantiles,
        tiny,
        covered(sides, [s for level in given for s in level], ratios),
        anchors,
        covered(sides, [s for level in anchors for s in level], ratios),
    )


def anchor_levels(cfg: CfgNode) -> int | None:
    """Number of levels that have anchors; None for detectors that do not read the anchor sizes."""
    arch = cfg.MODEL.META_ARCHITECTURE
    if arch == "RetinaNet":
        return len(cfg.MODEL.RETINANET.IN_FEATURES)
    if arch in ("GeneralizedRCNN", "PanopticFPN", "ProposalNetwork"):
        return len(cfg.MODEL.RPN.IN_FEATURES)
    return None


def _cropped(height: int, width: int, cfg: CfgNode) -> tuple[float, float]:
    """Sides of what is resized."""
    crop = cfg.INPUT.CROP
    if not crop.ENABLED or cfg.INPUT.CROP.AFTER_RESIZE:
        return height, width
    low, high = crop.SIZE
    if crop.TYPE == "absolute":
        return min(height, low), min(width, high)
    if crop.TYPE == "relative":
        return height * low, width * high
    if crop.TYPE == "relative_range":  # the mean
        return height * (1 + low) / 2, width * (1 + high) / 2
    return min(height, width, (low + high) / 2), min(height, width, (low + high) / 2)


def suggest_anchors(sizes: np.ndarray, levels: int, number: int) -> list[list[int]]:
    """Anchor sizes in a geometric progression between the 5th and 95th percentile of the sizes.

    Equal factors serve every size in between alike, whatever is most frequent. Ours.

    Args:
        sizes: (N,) of the objects, in pixels.
        levels: lists to return, the finest level first.
        number: sizes a level.
    """
    low, high = (max(float(np.quantile(sizes, q)), 2.0) for q in (0.05, 0.95))
    total = levels * number
    steps = (np.arange(total) + 0.5) / total
    values = [round(low * (high / low) ** step) for step in steps.tolist()]
    return [values[i : i + number] for i in range(0, total, number)]


def covered(sides: np.ndarray, sizes: Sequence[float], ratios: Sequence[float]) -> float:
    """Share of boxes that an anchor of the same centre meets with GOOD_IOU or more.

    Args:
        sides: (N, 2) width and height of the boxes.
        sizes: of the anchors, square root of the area.
        ratios: height over width of the anchors.
    """
    size, ratio = (x.ravel() for x in np.meshgrid(sizes, ratios))
    anchors = np.stack([size / np.sqrt(ratio), size * np.sqrt(ratio)], axis=1)
    inner = np.minimum(sides[:, None], anchors[None]).prod(axis=2)
    union = sides.prod(axis=1)[:, None] + anchors.prod(axis=1)[None] - inner
    return float(((inner / union).max(axis=1) >= GOOD_IOU).mean())
