"""The one place that reads a COCO annotation file: what it holds, in one form, and what was wrong.

:func:`read_coco` gives images, categories and annotations in a form that training and evaluation
can rely on. What has one meaning is read as that (ids, sizes and boxes that are numbers in quotes,
flags that are null, an area that is missing). What cannot be meant is refused in one line with the
file, the row's id and the field. What is unusable in one annotation (its box, its mask, its
keypoints) is left out and counted; a mask or keypoints never cost the box. Files on disk are never
changed.

The schema is code of its own. On 100,000 annotations of 60 coordinates pydantic 2 takes as long as
reading them here (2 s), and the same again to give dicts back; its models refuse a row or change
it, so that counting, leaving one field out, and a line with the annotation's id in place of its
position would all have to be written around it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable

from ..errors import DataError
from .problems import Problems

# Boxes may stick out of the image by this many pixels: rounding, common in published data sets.
TOLERANCE = 0.5
# Sides (pixels) below this are no object that a detector could find; losses that divide by the
# side of a box would be governed by it. Not 1: a conversion may make 0.999 of one pixel.
MIN_SIDE = 0.99
MAX_SIZE = 10**6  # pixels; of the sides of an image

_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,99}")


@dataclasses.dataclass(frozen=True)
class CocoFile:
    """A COCO annotation file as it was read. Not to be changed: it may be read again from memory.

    Attributes:
        path: of the file.
        images: ``id``, ``file_name`` (text), ``width``, ``height`` (whole numbers, pixels) and
            what else the file has; by ascending id where all ids are whole numbers, else in the
            file's order.
        categories: ``id``, ``name`` (text, unique), and what else; by ascending id. Their place is
            the class index.
        annotations: in the file's order. ``id``, ``image_id`` and ``category_id`` as those tables
            have them, ``bbox`` (XYWH, pixels, inside the image), ``iscrowd`` 0 or 1, ``area`` > 0;
            ``keypoints`` (x, y, flag of each, finite) and ``segmentation`` as in the file.
        has_annotations: False for a file without a list ``annotations`` (a test set).
        problems: what was left out or mended.
    """

    path: str
    images: list[dict]
    categories: list[dict]
    annotations: list[dict]
    has_annotations: bool
    problems: Problems


def read_coco(json_file: str) -> CocoFile:
    """Read and check a COCO annotation file.

    Raises:
        DataError: unreadable, not JSON, not COCO; ids that are missing, used twice or neither
            number nor text; an annotation of an unknown image or category, or without a box of
            four numbers; no box that can be used.
    """
    content = _load(json_file)
    images = _images(json_file, content["images"])
    categories = _categories(json_file, content["categories"])
    problems = Problems()
    annotations = _annotations(json_file, content.get("annotations", []), images, categories)
    annotations = _with_usable_boxes(json_file, annotations, images, problems)
    return CocoFile(
        json_file,
        _by_id(list(images.values())) or list(images.values()),
        _by_id(list(categories.values()))
        or sorted(categories.values(), key=lambda row: str(row["id"])),
        annotations,
        "annotations" in content,
        problems,
    )


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
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an int that no float can hold
        return None


def _by_id(rows: list[dict]) -> list[dict]:
    """By ascending id, if all are whole numbers (text of digits is); else nothing."""
    keys = []
    for row in rows:
        key = id_key(row["id"])
        if isinstance(key, str) and key.isdecimal() and len(key) < 100:
            key = int(key)
        if not isinstance(key, int):
            return []
        keys.append(key)
    return [rows[i] for i in sorted(range(len(rows)), key=keys.__getitem__)]


def _load(json_file: str) -> dict:
    try:
        with open(json_file, encoding="utf-8-sig") as stream:  # Windows writes a byte order mark
            content = json.load(stream)
    except OSError as error:
        raise DataError(f"{json_file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # bad JSON, or bytes that are not UTF-8
        raise DataError(f"{json_file}: is not JSON: {error}") from error
    except RecursionError as error:
        raise DataError(f"{json_file}: is not in COCO format: nested too deeply") from error
    if not isinstance(content, dict):
        raise DataError(f"{json_file}: is not in COCO format: the top level is not an object")
    for key in ("images", "categories", "annotations"):
        table = content.get(key, [] if key == "annotations" else None)
        if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
            raise DataError(f"{json_file}: is not in COCO format: no list '{key}' of objects")
    if not content["categories"]:
        raise DataError(f"{json_file}: is not in COCO format: 'categories' is empty")
    return content


def _images(json_file: str, rows: list[dict]) -> dict:
    """Images by the meaning of their id."""

    def no_size(row: dict) -> bool:
        sides = (number(row["width"]), number(row["height"]))
        return any(side is None or side <= 0 for side in sides)

    def part_of_a_pixel(row: dict) -> bool:
        sides = (number(row["width"]), number(row["height"]))
        return any(side != int(side) or side > MAX_SIZE for side in sides)

    needed = ("id", "file_name", "width", "height")
    _refuse(json_file, "image", rows, _lacks(*needed), f"lacks one of {', '.join(needed)}")
    _refuse_ids(json_file, "image", rows)
    _refuse(
        json_file,
        "image",
        rows,
        lambda row: not isinstance(row["file_name"], str) or not row["file_name"],
        "has a file_name that is no text",
        "file_name",
    )
    _refuse(
        json_file,
        "image",
        rows,
        no_size,
        "has a width or height that is not positive",
        "width",
        "height",
    )
    _refuse(
        json_file,
        "image",
        rows,
        part_of_a_pixel,
        f"has a width or height that is no whole number of pixels up to {MAX_SIZE}",
        "width",
        "height",
    )
    for row in rows:
        row["width"], row["height"] = int(number(row["width"])), int(number(row["height"]))
    return {id_key(row["id"]): row for row in rows}


def _categories(json_file: str, rows: list[dict]) -> dict:
    """Categories by the meaning of their id, with names that are text."""

    def no_name(row: dict) -> bool:
        name = row["name"]
        return number(name) is None and not (isinstance(name, str) and name)

    _refuse(json_file, "category", rows, _lacks("id", "name"), "lacks id or name")
    _refuse_ids(json_file, "category", rows)
    _refuse(json_file, "category", rows, no_name, "has a name that is no text", "name")
    for row in rows:
        row["name"] = str(row["name"])
    _refuse(
        json_file,
        "category",
        rows,
        _seen_before(lambda row: row["name"]),
        "has a name that another category has too",
        "name",
    )
    kinds = {isinstance(row["id"], str): row["id"] for row in rows}
    if len(kinds) > 1:
        raise DataError(
            f"{json_file}: ids of categories are numbers ({kinds[False]}) and text "
            f'("{kinds[True]}"), so that their order, that of the classes, is not clear: '
            "write all as numbers"
        )
    return {id_key(row["id"]): row for row in rows}


def _annotations(json_file: str, rows: list[dict], images: dict, categories: dict) -> list[dict]:
    """Annotations whose ids are those of the tables, with flags and areas that can be used."""
    _refuse(json_file, "annotation", rows, lambda row: row.get("id") is None, "has no id")
    _refuse_ids(json_file, "annotation", rows)
    for key, table, name in (
        ("image_id", images, "images"),
        ("category_id", categories, "categories"),
    ):
        _refuse(
            json_file,
            "annotation",
            rows,
            lambda row, key=key, table=table: id_key(row.get(key)) not in table,
            f"has {'an' if key[0] == 'i' else 'a'} {key} not in '{name}'",
            key,
        )
    for is_wrong, what, key in (
        (lambda row: not _is_box(row.get("bbox")), "has no bbox of four numbers", "bbox"),
        (lambda row: row.get("ignore"), 'has "ignore": write "iscrowd": 1 instead', "ignore"),
        (
            lambda row: _flag(row.get("iscrowd")) is None,
            "has an iscrowd that is neither 0 nor 1",
            "iscrowd",
        ),
    ):
        _refuse(json_file, "annotation", rows, is_wrong, what, key)
    for row in rows:
        row["image_id"] = images[id_key(row["image_id"])]["id"]
        row["category_id"] = categories[id_key(row["category_id"])]["id"]
        row["iscrowd"] = _flag(row.get("iscrowd"))
    return rows


def _with_usable_boxes(json_file: str, rows: list[dict], images: dict, problems: Problems) -> list:
    """The annotations whose box is in the image, clipped to it where it stands out."""
    for row in rows:
        row["bbox"] = [v if type(v) in (int, float) else number(v) for v in row["bbox"]]
    if rows and all(_in_parts(row["bbox"]) for row in rows):
        raise DataError(
            f"{json_file}: all {len(rows)} boxes lie between 0 and 1, as if in parts of the image; "
            f"bbox has to be in pixels (annotation {rows[0]['id']}: {rows[0]['bbox']})"
        )
    kept = []
    for row in rows:
        image = images[id_key(row["image_id"])]
        box, problem = _mend(row["bbox"], image["width"], image["height"])
        if problem:
            size = f"{image['width']}x{image['height']}"
            place = f"annotation {row['id']} of image {row['image_id']} ({size})"
            problems.add(f"boxes {problem}", f"{place}: box {_shown(row['bbox'])} {problem}")
        if box is not None:
            area = row.get("area")
            if not isinstance(area, (int, float)) or not (number(area) or 0) > 0:
                area = box[2] * box[3]
            row["bbox"], row["area"] = box, area
            kept.append(row)
    if rows and not kept:
        raise DataError(f"{json_file}: none of the {len(rows)} boxes can be used: {problems}")
    return kept


def _in_parts(box: list[float]) -> bool:
    return all(0 <= v <= 1.001 for v in box) and any(v != int(v) for v in box)


def _mend(box: list[float], width: int, height: int) -> tuple[list[float] | None, str]:
    """The box to use (XYWH, None = leave the annotation out), and what was wrong with it or ""."""
    x, y, w, h = box
    if any(number(value) is None for value in box):
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


def _is_box(box) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(v) in (int, float) or number(v) is not None for v in box)
    )


def _flag(value) -> int | None:
    """0 or 1 of a flag: null or missing = 0, numbers and words in quotes; None for what is none."""
    if value is None or value is False or value is True:
        return int(bool(value))
    if isinstance(value, str) and value.lower() in ("", "true", "false"):
        return int(value.lower() == "true")
    value = number(value)
    return None if value is None else int(value != 0)


def _lacks(*keys: str) -> Callable[[dict], bool]:
    return lambda row: any(row.get(key) is None for key in keys)


def _seen_before(key_of: Callable[[dict], object]) -> Callable[[dict], bool]:
    seen: set = set()
    return lambda row: key_of(row) in seen or seen.add(key_of(row)) is not None


def _refuse_ids(json_file: str, kind: str, rows: list[dict]) -> None:
    _refuse(
        json_file,
        kind,
        rows,
        lambda row: id_key(row["id"]) is None,
        "has an id that is neither a number nor text",
    )
    is_second = _seen_before(lambda row: id_key(row["id"]))
    _refuse(json_file, kind, rows, is_second, "has an id that is used twice")


def _refuse(json_file: str, kind: str, rows: Iterable[dict], is_wrong, what: str, *keys) -> None:
    """DataError that names the first row that is wrong, its values under keys, and the count."""
    wrong = [row for row in rows if is_wrong(row)]
    if wrong:
        row = wrong[0]
        name = f"{kind} {row['id'] if id_key(row.get('id')) is not None else _shown(row, 120)}"
        values = [_shown(row[key]) for key in keys if key in row]
        detail = f" ({' x '.join(values)})" if values else ""
        more = f"; so do {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DataError(f"{json_file}: {name} {what}{detail}{more}")


def _shown(value, length: int = 80) -> str:
    """As the file has it, so that text is seen to be text; cut."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else text[: length - 3] + "..."
