"""The meaning of single values of a COCO file: ids, numbers, flags and boxes."""

from __future__ import annotations

import json
import math
import re

# Boxes may stick out of the image by this many pixels: rounding, common in published data sets.
TOLERANCE = 0.5
# Sides (pixels) below this are no object that a detector could find; losses that divide by the
# side of a box would be governed by it. Not 1: a conversion may make 0.999 of one pixel.
MIN_SIDE = 0.99

_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,99}")


def id_key(value) -> int | float | str | None:
    """What an id means: 7, 7.0 and "7" are one; other text stands for itself; None = no id."""
    if type(value) is int:
        return value
    if isinstance(value, str):
        return int(value) if _WHOLE.fullmatch(value) else value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else value
    return None


def number(value) -> int | float | None:
    """A number, also one in quotes; None for everything else, and for what is not finite."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if type(value) not in (int, float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an int that no float can hold
        return None


def shown(value, length: int = 80) -> str:
    """As the file has it, so that text is seen to be text; cut."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else text[: length - 3] + "..."


def is_box(box) -> bool:
    """Whether it is a list of four numbers; they may be in quotes, or not finite."""
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(v) in (int, float) or number(v) is not None for v in box)
    )


def flag(value) -> int | None:
    """0 or 1 of a flag: null or missing = 0, numbers and words in quotes; None for what is none."""
    if value is None or value is False or value is True:
        return int(bool(value))
    if isinstance(value, str) and value.lower() in ("", "true", "false"):
        return int(value.lower() == "true")
    value = number(value)
    return None if value is None else int(value != 0)


def in_parts(box: list[float]) -> bool:
    """Whether a box seems to be in parts of the image, not in pixels."""
    return all(0 <= v <= 1.001 for v in box) and any(v != int(v) for v in box)


def usable_box(box: list[float], width: int, height: int) -> tuple[list[float] | None, str]:
    """The box to use (XYWH, None = leave the annotation out), and what was wrong with it or ""."""
    x, y, w, h = box
    if number(x + y + w + h) is None:
        return None, "left out (not finite)"
    if w <= 0 or h <= 0:
        return None, "left out (no positive size)"
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if right <= left or bottom <= top:
        return None, "left out (outside of the image)"
    if max(left - x, top - y, x + w - right, y + h - bottom) > TOLERANCE:
        box, problem = [left, top, right - left, bottom - top], "clipped to the image"
    else:
        problem = ""
    if min(box[2:]) < MIN_SIDE:
        return None, "left out (narrower than a pixel)"
    return box, problem
