"""Colours and textures of the built-in ``shapes`` data: the same for all classes and distractors.

All pictures are float32 (H, W, 3) in 0..255 until :func:`finish` makes them uint8. Nothing here
knows a class, so that colour and texture cannot tell classes apart.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

_CONTRAST = (55.0, 140.0)  # distance of an object's colour from what lies behind, grey levels


def paint_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A colour gradient, one texture over it, and clutter strokes."""
    first, second = (rng.uniform(30, 225, 3) for _ in range(2))
    ramp = _ramp(rng, height, width)[..., None]
    image = (first + ramp * (second - first) * rng.uniform(0.2, 0.8)).astype(np.float32)
    image += _texture(rng, height, width, strength=rng.uniform(3, 12))[..., None]
    for _ in range(rng.integers(1, 6)):
        _stroke(rng, image)
    return np.clip(image, 0, 255)


def paint_patch(rng: np.random.Generator, behind: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """Paint for one object: (h, w, 3), textured, with a drawn contrast to what lies behind it.

    Args:
        behind: (h, w, 3) the picture so far.
        coverage: (h, w) the share of each pixel that the object takes.
    """
    height, width = coverage.shape
    weight = coverage[..., None] / max(float(coverage.sum()), 1e-6)
    mean = (behind * weight).sum(axis=(0, 1))
    low, high = _CONTRAST
    contrast = low * math.exp(rng.random() * math.log(high / low))
    direction = np.where(rng.random(3) < 0.5, -1.0, 1.0) * rng.uniform(0.3, 1.0, 3)
    direction /= np.abs(direction).max()
    # a channel that would leave the range goes the other way instead of losing its contrast
    shifted = mean + contrast * direction
    direction = np.where((shifted < 5) | (shifted > 250), -direction, direction)
    colour = np.clip(mean + contrast * direction, 0, 255)
    paint = np.empty((height, width, 3), np.float32)
    paint[:] = colour
    paint += (_ramp(rng, height, width)[..., None] - 0.5) * rng.uniform(-30, 30, 3)
    if rng.random() < 0.7:
        paint += _texture(rng, height, width, strength=rng.uniform(2, 10))[..., None]
    return np.clip(paint, 0, 255).astype(np.float32)


def finish(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Sensor noise and, now and then, a little blur; to uint8."""
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (3, 3), float(rng.uniform(0.4, 0.9)))
    noise = rng.standard_normal(image.shape[:2], dtype=np.float32)[..., None]
    return np.clip(np.round(image + noise * rng.uniform(1, 5)), 0, 255).astype(np.uint8)


def _ramp(rng, height: int, width: int) -> np.ndarray:
    """(H, W) from 0 to 1 along a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
    return (x * math.cos(angle) + y * math.sin(angle)) / math.sqrt(2) + 0.5


def _texture(rng, height: int, width: int, strength: float) -> np.ndarray:
    """(H, W) around 0, roughly within +-strength: stripes, checks, blotches or grain."""
    kind = rng.integers(4)
    if kind < 2:
        period, angle = rng.uniform(5, 40), rng.uniform(0, math.pi)
        x = np.arange(width, dtype=np.float32)
        y = np.arange(height, dtype=np.float32)[:, None]
        factor = 2 * math.pi / period
        along = np.sin(factor * (x * math.cos(angle) + y * math.sin(angle)))
        if kind == 0:
            return strength * along
        return strength * along * np.sin(factor * (y * math.cos(angle) - x * math.sin(angle)))
    if kind == 2:
        cell = rng.uniform(6, 40)
        coarse = rng.uniform(-1, 1, (2 + int(height / cell), 2 + int(width / cell)))
        coarse = coarse.astype(np.float32)
        return 1.5 * strength * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return strength * rng.uniform(-1, 1, (height, width)).astype(np.float32)


def _stroke(rng, image: np.ndarray) -> None:
    """A translucent line or open arc over the background, in place."""
    height, width = image.shape[:2]
    drawn = np.zeros((height, width), np.uint8)
    thickness = int(rng.integers(1, 6))
    centre = (int(rng.integers(width)), int(rng.integers(height)))
    if rng.random() < 0.6:
        end = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.line(drawn, centre, end, 255, thickness, cv2.LINE_AA)
    else:
        axes = (int(rng.integers(8, 90)), int(rng.integers(8, 90)))
        start = float(rng.uniform(0, 360))
        stop = start + float(rng.uniform(40, 200))
        turn = float(rng.uniform(0, 180))
        cv2.ellipse(drawn, centre, axes, turn, start, stop, 255, thickness, cv2.LINE_AA)
    colour = rng.uniform(0, 255, 3).astype(np.float32)
    opacity = np.float32(rng.uniform(0.2, 0.7) / 255)
    x, y, w, h = cv2.boundingRect(drawn)
    patch = image[y : y + h, x : x + w]
    patch += opacity * drawn[y : y + h, x : x + w, None] * (colour - patch)
