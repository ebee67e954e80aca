"""The one place that reads a COCO annotation file: what it holds, in one form, and what was wrong.

:func:`read_coco` gives images, categories and annotations in a form that training and evaluation
can rely on. What has one meaning is read as that (ids, sizes and boxes that are numbers in quotes,
flags that are null, an area that is missing). What cannot be meant is refused in one line with the
file, the row's id and the field. What is unusable in one annotation (its box, its mask, its
keypoints) is left out and counted; a mask or keypoints never cost the box. Files on disk are never
changed.

The schema is code of its own. On 100,000 annotations of 60 coordinates pydantic 2 takes 1.9 s for
the types alone and 1.2 s to give dicts back; the checks here, of types, ids, boxes and masks, take
1.7 s. A model of pydantic refuses a row or changes it, so that counting, leaving out one field, and
a line with the annotation's id in place of its position would have to be written around it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os

from ..errors import DataError
from .coco_fields import keypoint_names, usable_keypoints, usable_mask
from .coco_tables import by_id, read_annotations, read_categories, read_images
from .coco_values import id_key, in_parts, number, shown, usable_box
from .problems import Problems

MAX_AREA = 10**12  # square pixels
KEPT_IN_MEMORY = 200_000  # images and annotations of files that are not read again when asked for

_kept: dict[tuple, CocoFile] = {}  # by file stamp, the one read last at the end
_summaries: dict[tuple, CocoSummary] = {}


@dataclasses.dataclass
class Tally:
    """How many rows, and the id of the first."""

    count: int = 0
    first: int | float | str | None = None

    def add(self, row: dict) -> None:
        """Count one."""
        self.first = row["id"] if self.count == 0 else self.first
        self.count += 1


@dataclasses.dataclass(frozen=True)
class CocoSummary:
    """What an annotation file holds, without its rows.

    Attributes:
        path: of the file.
        categories: as in :class:`CocoFile`.
        images, annotations: how many, after unusable annotations were left out.
        objects: annotations that are no crowd.
        no_mask, bad_mask, runs: objects without a mask in the file; with one that cannot be used;
            with run lengths for a mask.
        labelled: objects with at least one keypoint of flag 1 or 2.
        keypoint_count: of the categories' names or, without names, of the annotations; 0 = none.
        problems: as in :class:`CocoFile`.
    """

    path: str
    categories: list[dict]
    images: int
    annotations: int
    objects: Tally
    no_mask: Tally
    bad_mask: Tally
    runs: Tally
    labelled: Tally
    keypoint_count: int
    problems: Problems


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
            have them, ``bbox`` (XYWH, pixels, inside the image), ``iscrowd`` 0 or 1, ``area`` > 0.
            ``segmentation`` (polygons or run lengths) and ``keypoints`` (x, y, flag of each) are
            there only where they can be used, see :mod:`.coco_fields`; with keypoints also
            ``num_keypoints``, those of flag 1 or 2.
        has_annotations: False for a file without a list ``annotations`` (a test set).
        problems: what was left out or mended.
        summary: counts.
    """

    path: str
    images: list[dict]
    categories: list[dict]
    annotations: list[dict]
    has_annotations: bool
    problems: Problems
    summary: CocoSummary


def inspect_annotations(json_file: str) -> CocoSummary:
    """Check a COCO annotation file; the answer is kept until the file changes.

    Raises:
        DataError: see :func:`read_coco`.
    """
    stamp = file_stamp(json_file)
    if stamp not in _summaries:
        read_coco(json_file)
    return _summaries[stamp]


def read_coco(json_file: str) -> CocoFile:
    """Read and check a COCO annotation file. Those read last are kept, very large ones are not.

    Raises:
        DataError: unreadable, not JSON, not COCO; ids that are missing, used twice or neither
            number nor text; an annotation of an unknown image or category, or without a box of
            four numbers; no box that can be used.
    """
    stamp = file_stamp(json_file)
    if stamp in _kept:
        return _kept[stamp]
    data = _read(json_file)
    _summaries[stamp] = data.summary
    room = KEPT_IN_MEMORY - _size(data)
    while _kept and sum(map(_size, _kept.values())) > room:
        del _kept[next(iter(_kept))]
    if room >= 0:
        _kept[stamp] = data
    return data


def _size(data: CocoFile) -> int:
    return len(data.images) + len(data.annotations)


def file_stamp(path: str) -> tuple:
    """What changes when a file is written again.

    Raises:
        DataError: there is no such file.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return os.path.abspath(path), status.st_mtime_ns, status.st_size


def _read(json_file: str) -> CocoFile:
    content = _load(json_file)
    images = read_images(json_file, content["images"])
    by_key = read_categories(json_file, content["categories"])
    rows = list(by_key.values())
    categories = by_id(rows) or sorted(rows, key=lambda row: row["id"])
    problems = Problems()
    annotations = read_annotations(json_file, content.get("annotations", []), images, by_key)
    annotations = _with_usable_boxes(json_file, annotations, images, problems)
    tallies = [Tally() for _ in range(5)]
    count = _mend_masks_and_keypoints(annotations, images, by_key, problems, *tallies)
    rows = list(images.values())
    return CocoFile(
        json_file,
        by_id(rows) or rows,
        categories,
        annotations,
        "annotations" in content,
        problems,
        CocoSummary(
            json_file, categories, len(images), len(annotations), *tallies, count, problems
        ),
    )


def _load(json_file: str) -> dict:
    collects = gc.isenabled()
    gc.disable()  # there is no garbage, and looking for it takes a third of the time
    try:
        with open(json_file, encoding="utf-8-sig") as stream:  # Windows writes a byte order mark
            content = json.load(stream)
    except OSError as error:
        raise DataError(f"{json_file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # bad JSON, or bytes that are not UTF-8
        raise DataError(f"{json_file}: is not JSON: {error}") from error
    except RecursionError as error:
        raise DataError(f"{json_file}: is not in COCO format: nested too deeply") from error
    finally:
        if collects:
            gc.enable()
    if not isinstance(content, dict):
        raise DataError(f"{json_file}: is not in COCO format: the top level is not an object")
    for key in ("images", "categories", "annotations"):
        table = content.get(key, [] if key == "annotations" else None)
        if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
            raise DataError(f"{json_file}: is not in COCO format: no list '{key}' of objects")
    if not content["categories"]:
        raise DataError(f"{json_file}: is not in COCO format: 'categories' is empty")
    return content


def _with_usable_boxes(json_file: str, rows: list[dict], images: dict, problems: Problems) -> list:
    """The annotations whose box is in the image, clipped to it where it stands out."""
    for row in rows:
        row["bbox"] = [v if type(v) in (int, float) else number(v) for v in row["bbox"]]
    if rows and all(in_parts(row["bbox"]) for row in rows):
        raise DataError(
            f"{json_file}: all {len(rows)} boxes lie between 0 and 1, as if in parts of the image; "
            f"bbox has to be in pixels (annotation {rows[0]['id']}: {rows[0]['bbox']})"
        )
    kept = []
    for row in rows:
        image = images[id_key(row["image_id"])]
        box, problem = usable_box(row["bbox"], image["width"], image["height"])
        if problem:
            problems.add(f"boxes {problem}", lambda r=row, i=image, p=problem: _place(r, i, p))
        if box is not None:
            area = row.get("area")
            if isinstance(area, str) or not 0 < (number(area) or 0) <= MAX_AREA:
                area = box[2] * box[3]
            row["bbox"], row["area"] = box, area
            kept.append(row)
    if rows and not kept:
        raise DataError(f"{json_file}: none of the {len(rows)} boxes can be used: {problems}")
    return kept


def _place(row: dict, image: dict, problem: str) -> str:
    size = f"{image['width']}x{image['height']}"
    where = f"annotation {row['id']} of image {row['image_id']} ({size})"
    return f"{where}: box {shown(row['bbox'])} {problem}"


def _mend_masks_and_keypoints(
    rows: list[dict],
    images: dict,
    categories: dict,
    problems: Problems,
    objects: Tally,
    no_mask: Tally,
    bad_mask: Tally,
    runs: Tally,
    labelled: Tally,
) -> int:
    """Leave unusable ones out, count, and return the number of keypoints."""
    counts = {row["id"]: len(keypoint_names(row)) for row in categories.values()}
    usual = max(counts.values())
    for row in rows:
        image = images[id_key(row["image_id"])]
        given = row.pop("segmentation", None)
        mask, problem = usable_mask(given, image["width"], image["height"])
        if problem:
            problems.add(problem, lambda r=row, g=given: f"annotation {r['id']}: {shown(g)}")
        given = row.pop("keypoints", None)
        points, wrong = usable_keypoints(given, counts[row["category_id"]] or usual)
        if wrong:
            problems.add(wrong, lambda r=row, g=given: f"annotation {r['id']}: {shown(g)}")
        if mask:
            row["segmentation"] = mask
        seen = 0
        if points:
            row["keypoints"] = points
            seen = row["num_keypoints"] = sum(flag > 0 for flag in points[2::3])
            usual = usual or len(points) // 3
        if row["iscrowd"]:
            continue
        objects.add(row)
        if not mask:
            (bad_mask if problem else no_mask).add(row)
        elif isinstance(mask, dict):
            runs.add(row)
        if seen:
            labelled.add(row)
    return usual
