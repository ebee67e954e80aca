"""VisDrone-DET: its annotation format, conversion to COCO's, and registration.

A line of an annotation file is ``left,top,width,height,score,category,truncation,occlusion``:
integers, pixels of the stored image, origin at its top left corner. Category 0 is an ignored
region, 1 to 10 are the classes, 11 is "others". Score 1 = evaluated, 0 = ignored (README of the
VisDrone2018-DET toolkit).

In the COCO json, objects of the ten classes are annotations; ``iscrowd`` 1 marks those of score 0.
Ignored regions and "others" belong to no class: they are lists of XYWH boxes of their image,
``ignored_regions`` and ``others``. "Others" are background for training and evaluation, as in the
toolkit, which looks at the classes 1 to 10 only.
"""

from __future__ import annotations

import math
import os

from detectron2.data import DatasetCatalog, MetadataCatalog

from .check import load_checked
from .coco_json import read_coco
from .problems import Problems

CLASSES = (
    *("pedestrian", "people", "bicycle", "car", "van"),
    *("truck", "tricycle", "awning-tricycle", "bus", "motor"),
)
IGNORED_REGION, OTHERS = 0, len(CLASSES) + 1
CATEGORIES = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
# split -> folder of the official archive
SPLITS = {
    "train": "VisDrone2019-DET-train",
    "val": "VisDrone2019-DET-val",
    "test_dev": "VisDrone2019-DET-test-dev",
}
CROPS = "train_crops"
FIELDS = 8

# What can be wrong with a line, and what is done about it.
BLANK = "blank lines, skipped"
WINDOWS = "lines with a Windows line end, read"
TRAILING_COMMA = "lines with a trailing comma, read"
SPACES = "lines with spaces, read"
MORE_FIELDS = "lines with more than 8 fields, the first 8 read"
FEWER_FIELDS = "lines with fewer than 8 fields, left out"
NO_NUMBER = "lines with a field that is no number, left out"
FRACTION = "lines with fractions, rounded"
BAD_SCORE = "lines with a score other than 0 and 1, left out"
BAD_CATEGORY = "lines with a category outside of 0..11, left out"
NO_SIZE = "boxes without positive width and height, left out"
OUTSIDE = "boxes outside of the image, left out"
CLIPPED = "boxes clipped to the image"


def parse_annotations(text: str, name: str, problems: Problems) -> list[list[int]]:
    """The lines that can be read, as lists of the 8 integers, in their order.

    Args:
        text: content of an annotation file.
        name: of the file, for ``problems``.
        problems: what is wrong with which line is counted here.
    """
    rows = []
    lines = text.removeprefix("\ufeff").split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        row = _parse_line(line, f"{name}:{number}", problems)
        if row is not None:
            rows.append(row)
    return rows


def _parse_line(line: str, place: str, problems: Problems) -> list[int] | None:
    if line.endswith("\r"):
        problems.add(WINDOWS, place)
    bare = line.strip()
    if not bare:
        return problems.add(BLANK, place)
    if " " in line or "\t" in line:
        problems.add(SPACES, place)
    if bare.endswith(","):
        problems.add(TRAILING_COMMA, place)
        bare = bare.rstrip(", ")
    parts = [part.strip() for part in bare.split(",")] if "," in bare else bare.split()
    if len(parts) < FIELDS:
        return problems.add(FEWER_FIELDS, place)
    if len(parts) > FIELDS:
        problems.add(MORE_FIELDS, place)
    try:
        numbers = [float(part) for part in parts[:FIELDS]]
    except ValueError:
        return problems.add(NO_NUMBER, place)
    if not all(math.isfinite(value) for value in numbers):
        return problems.add(NO_NUMBER, place)
    if numbers[4] not in (0, 1):
        return problems.add(BAD_SCORE, place)
    if numbers[5] not in range(OTHERS + 1):
        return problems.add(BAD_CATEGORY, place)
    row = [math.floor(value + 0.5) for value in numbers]
    if row != numbers:
        problems.add(FRACTION, place)
    return row


def clip_rows(
    rows: list[list[int]], width: int, height: int, name: str, problems: Problems
) -> list[list[int]]:
    """Rows with boxes clipped to the image; those without a positive size there are left out."""
    kept = []
    for row in rows:
        x, y, w, h = row[:4]
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        shown = f"{name}: {','.join(map(str, row))} in {width}x{height}"
        if w <= 0 or h <= 0:
            problems.add(NO_SIZE, shown)
        elif right <= left or bottom <= top:
            problems.add(OUTSIDE, shown)
        else:
            box = [left, top, right - left, bottom - top]
            if box != row[:4]:
                problems.add(CLIPPED, shown)
            kept.append(box + row[4:])
    return kept


def to_record(rows: list[list[int]], file_name: str, width: int, height: int) -> dict:
    """One image: COCO's entry of ``images`` with its ``annotations`` inside, ids still missing."""
    return {
        "file_name": file_name,
        "width": width,
        "height": height,
        "ignored_regions": [row[:4] for row in rows if row[5] == IGNORED_REGION],
        "others": [row[:4] for row in rows if row[5] == OTHERS],
        "annotations": [
            {
                "category_id": row[5],
                "bbox": row[:4],
                "area": row[2] * row[3],
                "iscrowd": 1 - row[4],
                "truncation": row[6],
                "occlusion": row[7],
            }
            for row in rows
            if IGNORED_REGION < row[5] < OTHERS
        ],
    }


def quadrants(record: dict) -> list[tuple[tuple[int, int, int, int], dict]]:
    """The four-quadrant training set of QueryDet: ((left, top, right, bottom), record) of each.

    The image is cut at (width // 2, height // 2) without overlap: top left, top right, bottom
    left, bottom right, named ``<stem>_0`` to ``<stem>_3``. A box belongs to the quadrant of its top
    left corner and is clipped there (QueryDet, CVPR 2022, its code). Ignored regions are cut at the
    borders, so that each quadrant keeps its part (ours; QueryDet drops them, which makes them
    background: INPUT.IGNORED_REGIONS "keep").
    """
    width, height = record["width"], record["height"]
    x, y = width // 2, height // 2
    stem, extension = os.path.splitext(record["file_name"])
    result = []
    for number, (left, top, right, bottom) in enumerate(
        [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    ):
        frame = (left, top, right, bottom)
        quadrant = {
            "file_name": f"{stem}_{number}{extension}",
            "width": right - left,
            "height": bottom - top,
        }
        for key in ("ignored_regions", "others"):
            parts = [_cut(box, frame) for box in record[key]]
            quadrant[key] = [part for part in parts if part is not None]
        quadrant["annotations"] = []
        for annotation in record["annotations"]:
            if left <= annotation["bbox"][0] < right and top <= annotation["bbox"][1] < bottom:
                box = _cut(annotation["bbox"], frame)
                area = box[2] * box[3]
                quadrant["annotations"].append({**annotation, "bbox": box, "area": area})
        if right > left and bottom > top:
            result.append((frame, quadrant))
    return result


def _cut(box: list[int], frame: tuple[int, int, int, int]) -> list[int] | None:
    """The part of an XYWH box inside a frame, relative to it; None if there is none."""
    left, top = max(box[0], frame[0]), max(box[1], frame[1])
    right, bottom = min(box[0] + box[2], frame[2]), min(box[1] + box[3], frame[3])
    if right <= left or bottom <= top:
        return None
    return [left - frame[0], top - frame[1], right - left, bottom - top]


def to_coco(records: list[dict], info: dict) -> dict:
    """A COCO data set; image and annotation ids count from 1 in the order of the records."""
    images, annotations = [], []
    for image_id, record in enumerate(records, start=1):
        image = {key: value for key, value in record.items() if key != "annotations"}
        images.append({"id": image_id, **image})
        for annotation in record["annotations"]:
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**ids, **annotation})
    return {
        "info": info,
        "images": images,
        "annotations": annotations,
        "categories": CATEGORIES,
    }


# --- where the files lie, and registration -------------------------------------------------------


def visdrone_root() -> str:
    """``$DETECTRON2_DATASETS/visdrone`` (default: ``./datasets/visdrone``)."""
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    return os.path.abspath(os.path.join(root, "visdrone"))


def json_path(split: str, root: str | None = None) -> str:
    """The COCO json of a split of SPLITS, or of CROPS."""
    return os.path.join(root or visdrone_root(), "annotations", f"visdrone_{split}.json")


def image_folder(split: str, root: str | None = None) -> str:
    """The images of a split of SPLITS, or of CROPS."""
    root = root or visdrone_root()
    return os.path.join(root, CROPS if split == CROPS else os.path.join(SPLITS[split], "images"))


def register_visdrone() -> None:
    """Register ``visdrone_{train,val,test_dev,train_crops}``; names in use are left alone."""
    for split in (*SPLITS, CROPS):
        name = f"visdrone_{split}"
        if name not in DatasetCatalog.list():
            register_visdrone_data(name, json_path(split), image_folder(split))


def register_visdrone_data(name: str, json_file: str, image_root: str) -> None:
    """Register one json that ``kd-convert visdrone`` wrote."""
    DatasetCatalog.register(name, lambda: load_visdrone(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        evaluator_type="visdrone",
        json_file=json_file,
        image_root=image_root,
        made_by="kd-convert visdrone",
        checked_annotations=True,
        thing_classes=list(CLASSES),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
    )


def load_visdrone(json_file: str, image_root: str, name: str) -> list[dict]:
    """detectron2 dicts with ``ignored_regions`` (XYWH boxes in pixels) for the training mapper.

    Beside the data set's regions these are the objects of score 0, which the evaluation ignores.

    Raises:
        DataError: see :func:`~projects.kd.data.check.load_checked`.
    """
    dicts = load_checked(json_file, image_root, name)
    images = {image["id"]: image for image in read_coco(json_file).images}
    for entry in dicts:
        objects = [list(a["bbox"]) for a in entry["annotations"] if a["iscrowd"]]
        regions = images[entry["image_id"]].get("ignored_regions", [])
        entry["ignored_regions"] = [list(region) for region in regions] + objects
    return dicts
