"""One synthetic picture with exact ground truth: the content of the built-in ``shapes`` data.

Coordinates: ``(x, y)`` in pixels, x to the right and y down; ``0`` is the left (upper) edge of the
first pixel, so a picture spans ``[0, width] x [0, height]`` and pixel ``i`` has its centre at
``i + 0.5``. Geometry is rasterised four times finer than the picture and averaged down, which gives
anti-aliased edges and masks that agree with them.

Rule of visibility: what is drawn is annotated and what is annotated is drawn. An object is placed
only if at least 40 % of its full area (parts outside of the picture count as hidden) stays visible,
and only if every object already there keeps its 40 %; otherwise it is left out. Boxes enclose the
FULL object, clipped to the picture; masks and areas cover the VISIBLE part only.
"""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np

from .paint import finish, paint_background, paint_patch

CLASSES = ["arrow", "crescent", "drop", "heart", "house", "mushroom"]
KEYPOINTS = ["top", "left", "right", "bottom"]  # as seen when the object stands upright
MIN_VISIBLE = 0.4
SUPERSAMPLING = 4

_SIZES = ((256, 256), (256, 256), (256, 256), (256, 320), (320, 256))  # (height, width)
_OBJECTS = (3, 8)  # half-open range of the number of objects to place
_OBJECT_SIDE = (14.0, 220.0)  # longer side of the upright object, log-uniform
_DISTRACTORS = (0, 3)
_DISTRACTOR_SIDE = (10.0, 90.0)
_MAX_TILT = math.radians(15)
_TRIES = 15


@dataclasses.dataclass
class Thing:
    """One drawn object. ``category`` is an index into CLASSES, or -1 for a distractor.

    ``outline`` is (P, 2), ``keypoints`` (4, 2), both in pixels. ``window`` holds its rows and
    columns, ``whole`` and ``visible`` its area and the visible part of it, all on the fine grid.
    """

    category: int
    outline: np.ndarray
    keypoints: np.ndarray
    window: tuple[slice, slice] = (slice(0), slice(0))
    whole: int = 0
    visible: int = 0


@dataclasses.dataclass
class Scene:
    """``image`` (H, W, 3) uint8 BGR, ``semantic`` (H, W) uint8 (0 = background, 1 + class index),
    ``annotations`` COCO dicts without ids: bbox XYWH, segmentation polygons, area, keypoints."""

    image: np.ndarray
    semantic: np.ndarray
    annotations: list[dict]


def make_scene(seed: tuple[int, ...]) -> Scene:
    """Draw the scene of one seed. The same seed gives the same scene on every call."""
    rng = np.random.Generator(np.random.PCG64(list(seed)))
    height, width = _SIZES[rng.integers(len(_SIZES))]
    things, labels = _arrange(rng, height, width)
    image = paint_background(rng, height, width)
    semantic = np.zeros((height, width), np.uint8)
    annotations = []
    for label, thing in enumerate(things, start=1):
        fine = labels[thing.window] == label
        rows, columns = (
            slice(s.start // SUPERSAMPLING, s.stop // SUPERSAMPLING) for s in thing.window
        )
        coverage = _average_down(fine)
        patch = image[rows, columns]
        # `fine` lacks what later things hide, so the order of painting does not matter
        patch += coverage[..., None] * (paint_patch(rng, patch, coverage) - patch)
        if thing.category >= 0:
            semantic[rows, columns][coverage >= 0.5] = thing.category + 1
            annotations.append(_annotate(thing, fine, label, labels))
    return Scene(finish(rng, image), semantic, annotations)


# ---------------------------------------------------------------------------------------------
# outlines: unit size (longer side 1), centred, mirror-symmetric in x, front and back differ
# ---------------------------------------------------------------------------------------------


def _arc(radius_x: float, radius_y: float, start: float, stop: float, count: int = 24):
    """Points on an ellipse around the origin, angles in degrees, clockwise from the +x axis."""
    angles = np.radians(np.linspace(start, stop, count))
    return np.stack([radius_x * np.cos(angles), radius_y * np.sin(angles)], axis=1)


def _mirrored(right_half: list[tuple[float, float]]) -> np.ndarray:
    half = np.array(right_half, dtype=np.float64)
    return np.concatenate([half, (half * (-1, 1))[::-1]])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 49)[:-1]
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1)


def _drop() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 41)[:-1]
    return np.stack([0.6 * np.sin(t) * np.sin(t / 2) ** 2, -0.5 * np.cos(t)], axis=1)


def _crescent() -> np.ndarray:
    inner = _arc(0.42, 0.42, 188, -8) + (0, -0.22)
    return np.concatenate([_arc(0.5, 0.5, -34, 214), inner])


def _star() -> np.ndarray:
    angles = np.arange(10) * math.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 0.5, 0.2)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _unit(outline, keypoints=((0.0, 0.0),) * 4) -> tuple[np.ndarray, np.ndarray]:
    outline, keypoints = np.array(outline, np.float64), np.array(keypoints, np.float64)
    low, high = outline.min(axis=0), outline.max(axis=0)
    centre, side = (low + high) / 2, (high - low).max()
    return (outline - centre) / side, (keypoints - centre) / side


_ARROW = _mirrored([(0, -0.5), (0.38, -0.05), (0.15, -0.05), (0.15, 0.5)])
_HOUSE = _mirrored([(0, -0.5), (0.46, -0.05), (0.34, -0.05), (0.34, 0.45)])
_STEM = _mirrored([(0.13, 0.0), (0.18, 0.45)])
_MUSHROOM = np.concatenate([_arc(0.5, 0.45, 180, 360), _STEM])
_CROSS = _mirrored(
    [(0.15, -0.5), (0.15, -0.15), (0.5, -0.15), (0.5, 0.15), (0.15, 0.15), (0.15, 0.5)]
)

# Keypoints (top, left, right, bottom) lie just inside of the outline, so that "visible" is decided
# by the object's own pixels.
_SHAPES = {
    "arrow": _unit(_ARROW, [(0, -0.44), (-0.29, -0.09), (0.29, -0.09), (0, 0.46)]),
    "crescent": _unit(_crescent(), [(0, 0.25), (-0.44, -0.2), (0.44, -0.2), (0, 0.46)]),
    "drop": _unit(_drop(), [(0, -0.40), (-0.36, 0.25), (0.36, 0.25), (0, 0.46)]),
    "heart": _unit(_heart(), [(0, -3.5), (-15, -5), (15, -5), (0, 15)]),
    "house": _unit(_HOUSE, [(0, -0.45), (-0.38, -0.08), (0.38, -0.08), (0, 0.41)]),
    "mushroom": _unit(_MUSHROOM, [(0, -0.41), (-0.45, -0.04), (0.45, -0.04), (0, 0.41)]),
}
_DISTRACTOR_SHAPES = [
    _unit(outline)
    for outline in (
        _arc(0.5, 0.5, 0, 345),
        _arc(0.5, 0.3, 0, 345),
        [(-0.5, -0.4), (0.5, -0.4), (0.5, 0.4), (-0.5, 0.4)],
        [(0, -0.45), (0.5, 0.42), (-0.5, 0.42)],
        _CROSS,
        _star(),
    )
]


# ---------------------------------------------------------------------------------------------
# arrangement
# ---------------------------------------------------------------------------------------------


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low * math.exp(rng.random() * math.log(high / low))


def _arrange(rng, height: int, width: int) -> tuple[list[Thing], np.ndarray]:
    """Place objects and distractors, roughly from large to small, later ones on top.

    Returns:
        The things that found room, and a label map (4H, 4W): 0 = background, i = things[i - 1].
    """
    wishes = [
        (_log_uniform(rng, *_OBJECT_SIDE), int(rng.integers(len(CLASSES))))
        for _ in range(rng.integers(*_OBJECTS))
    ]
    wishes += [
        (_log_uniform(rng, *_DISTRACTOR_SIDE), -1) for _ in range(rng.integers(*_DISTRACTORS))
    ]
    wishes.sort(key=lambda wish: wish[0] * math.exp(0.5 * rng.standard_normal()), reverse=True)
    labels = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    things: list[Thing] = []
    for side, category in wishes:
        for _ in range(_TRIES):
            thing = _pose(rng, category, side, height, width)
            if _place(thing, things, labels):
                break
    return things, labels


def _pose(rng, category: int, side: float, height: int, width: int) -> Thing:
    if category >= 0:
        outline, keypoints = _SHAPES[CLASSES[category]]
    else:
        outline, keypoints = _DISTRACTOR_SHAPES[rng.integers(len(_DISTRACTOR_SHAPES))]
    stretch = np.array([math.exp(0.2 * (2 * rng.random() - 1)), 1.0])
    angle = _MAX_TILT * (2 * rng.random() - 1)
    cosine, sine = math.cos(angle), math.sin(angle)
    turn = np.array([[cosine, sine], [-sine, cosine]])
    centre = np.array([rng.random() * width, rng.random() * height])
    outline, keypoints = ((part * stretch * side) @ turn + centre for part in (outline, keypoints))
    return Thing(category, outline, keypoints)


def _place(thing: Thing, things: list[Thing], labels: np.ndarray) -> bool:
    """Draw ``thing`` on top if the rule of visibility allows; updates ``things`` and ``labels``."""
    drawn, thing.window, thing.whole = _rasterise(thing.outline, labels.shape)
    patch = labels[thing.window]
    thing.visible = int(drawn.sum())
    hidden = np.bincount(patch[drawn], minlength=len(things) + 1)[1:]
    if thing.visible < MIN_VISIBLE * thing.whole:
        return False
    for other, loss in zip(things, hidden, strict=True):
        left = other.visible - loss
        if other.category >= 0 and loss and left < MIN_VISIBLE * other.whole:
            return False
    for other, loss in zip(things, hidden, strict=True):
        other.visible -= int(loss)
    things.append(thing)
    patch[drawn] = len(things)
    return True


def _rasterise(outline: np.ndarray, canvas: tuple[int, int]):
    """Fill an outline on the fine grid.

    Returns:
        ``(drawn, window, whole)``: a bool mask of the part inside the canvas, the rows and columns
        of the canvas it covers (whole coarse pixels), and the fine pixels of the entire shape.
    """
    low = np.floor(outline.min(axis=0)).astype(int) - 1
    high = np.ceil(outline.max(axis=0)).astype(int) + 1
    size = (high - low) * SUPERSAMPLING
    full = np.zeros((size[1], size[0]), np.uint8)
    points = (outline - low) * SUPERSAMPLING - 0.5  # OpenCV counts from pixel centres
    cv2.fillPoly(full, [np.round(points * 256).astype(np.int32)], 1, cv2.LINE_8, shift=8)
    left, top = low * SUPERSAMPLING
    rows = slice(max(top, 0), max(min(top + size[1], canvas[0]), 0))
    columns = slice(max(left, 0), max(min(left + size[0], canvas[1]), 0))
    inside = full[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return inside.astype(bool), (rows, columns), int(full.sum())


def _coarse(fine: slice) -> slice:
    return slice(fine.start // SUPERSAMPLING, fine.stop // SUPERSAMPLING)


def _average_down(fine: np.ndarray) -> np.ndarray:
    """(4h, 4w) bool to (h, w) float32 coverage in [0, 1]."""
    height, width = (n // SUPERSAMPLING for n in fine.shape)
    return cv2.resize(fine.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)


# ---------------------------------------------------------------------------------------------
# annotations
# ---------------------------------------------------------------------------------------------


def _annotate(thing: Thing, fine: np.ndarray, label: int, labels: np.ndarray) -> dict:
    """COCO annotation of one thing; ``fine`` is its visible mask within ``thing.window``."""
    height, width = (n / SUPERSAMPLING for n in labels.shape)
    low = np.clip(thing.outline.min(axis=0), 0, (width, height))
    high = np.clip(thing.outline.max(axis=0), 0, (width, height))
    if thing.visible == thing.whole:
        polygons = [thing.outline]
    else:
        rows, columns = thing.window
        corner = np.array([columns.start, rows.start])
        polygons = [(points + 0.5 + corner) / SUPERSAMPLING for points in trace(fine)]
    polygons = [np.round(points, 2) for points in polygons]
    keypoints: list[float] = []
    for x, y in thing.keypoints:
        if 0 <= x < width and 0 <= y < height:
            seen = labels[int(y * SUPERSAMPLING), int(x * SUPERSAMPLING)] == label
            # COCO keypoints count from pixel centres, boxes and polygons from pixel edges
            keypoints += [round(x - 0.5, 2), round(y - 0.5, 2), 2 if seen else 1]
        else:
            keypoints += [0, 0, 0]
    return {
        "category_id": thing.category + 1,
        "bbox": [round(float(v), 2) for v in (*low, *(high - low))],
        "segmentation": [points.ravel().tolist() for points in polygons],
        "area": round(sum(polygon_area(points) for points in polygons), 2),
        "iscrowd": 0,
        "keypoints": keypoints,
        "num_keypoints": sum(flag > 0 for flag in keypoints[2::3]),
    }


def trace(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines (P, 2) of a bool mask, in pixel centres. COCO polygons cannot hold holes, so a part
    with a hole is cut in two through the hole's middle column."""
    contours, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    holes = [points for points, node in zip(contours, tree[0], strict=True) if node[3] >= 0]
    if holes:
        column = int(holes[0][:, 0, 0].min() + holes[0][:, 0, 0].max()) // 2
        right = trace(mask[:, column:])
        return trace(mask[:, :column]) + [points + (column, 0) for points in right]
    smooth = [cv2.approxPolyDP(points, 0.8, closed=True)[:, 0].astype(float) for points in contours]
    return [points for points in smooth if len(points) >= 3 and polygon_area(points) > 4]


def polygon_area(outline: np.ndarray) -> float:
    """Area of a simple polygon (P, 2), in square pixels."""
    x, y = outline[:, 0], outline[:, 1]
    return abs(float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))) / 2
