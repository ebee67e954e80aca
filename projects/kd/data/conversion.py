"""Annotations in Pascal VOC's XML and in YOLO's text files, as COCO's tables.

Ours, as no library at hand does all of it: most read VOC's corners as they are, one pixel off, all
leave out what is marked difficult, and their errors do not name the file and the line.
"""

from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence

import yaml

from ..errors import ConfigError, DataError
from .images import image_header, size_problem

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
NOT_LABELS = ("classes.txt",)  # what annotation tools leave beside YOLO's label files
TOLERANCE = 0.01  # of a side, by which YOLO's numbers may leave 0..1: rounding


def files_below(folder: str, extensions: Sequence[str], flag: str) -> dict[str, str]:
    """Path without extension, relative to ``folder`` -> file, for all files below it.

    Raises:
        ConfigError: no such folder; it names ``flag``.
        DataError: two files that differ in their extension alone.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"{flag}: no such folder '{folder}'")
    found: dict[str, str] = {}
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            stem, extension = os.path.splitext(name)
            if extension.lower() in extensions:
                key = os.path.relpath(os.path.join(place, stem), folder)
                path = os.path.join(place, name)
                if key in found:
                    raise DataError(f"{path}: its annotations would be those of {found[key]} too")
                found[key] = path
    return found


def voc_records(annotations: str, images: str, first_pixel: int = 1) -> list[dict]:
    """One record for each XML file below a folder.

    The image is the one with the XML's name, at the same place below ``images``; where there is
    none, the one that its ``filename`` names.

    Args:
        annotations: folder of XML files.
        images: folder of images.
        first_pixel: 1 as in Pascal VOC: pixels are counted from 1, and xmax and ymax lie inside of
            the object. 0: corners are edges, counted from 0.

    Returns:
        ``{"file_name", "width", "height", "objects"}``, see :func:`coco_tables`. Objects marked
        difficult are crowds: training and evaluation ignore them.

    Raises:
        ConfigError: a folder is missing.
        DataError: an image is missing or of another size than the XML says, or the XML is wrong.
    """
    pictures = files_below(images, EXTENSIONS, "--images")
    found = files_below(annotations, (".xml",), "--annotations")
    if not found:
        raise DataError(f"{annotations}: no .xml file in it")
    records = []
    for stem, path in found.items():
        root = _xml(path)
        named = os.path.join(os.path.dirname(stem), (root.findtext("filename") or "").strip())
        image = pictures.get(stem) or os.path.join(images, named)
        if not os.path.isfile(image):
            raise DataError(f"{path}: no image {stem}{EXTENSIONS[0]} (or .png, ...) in {images}")
        header = image_header(image)
        size = [root.findtext(f"size/{side}") for side in ("width", "height")]
        width, height = (round(_number(path, "size", x or "0")) for x in size)
        if width and height and (problem := size_problem(header, width, height)):
            raise DataError(f"{path}: {problem}")
        objects = []
        for i, node in enumerate(root.findall("object"), 1):
            where = f"{path}: object {i}"
            name = (node.findtext("name") or "").strip()
            if not name:
                raise DataError(f"{where} has no name")
            corners = [node.findtext(f"bndbox/{x}") for x in ("xmin", "ymin", "xmax", "ymax")]
            if None in corners:
                raise DataError(f"{where} has no bndbox with xmin, ymin, xmax and ymax")
            x1, y1, x2, y2 = (_number(where, "bndbox", x) for x in corners)
            box = [x1 - first_pixel, y1 - first_pixel, x2 - x1 + first_pixel, y2 - y1 + first_pixel]
            crowd = (node.findtext("difficult") or "0").strip() == "1"
            objects.append({"name": name, "bbox": box, "iscrowd": int(crowd)})
        records.append(_record(image, images, header, objects))
    return records


def yolo_records(labels: str, images: str, names: Sequence[str]) -> list[dict]:
    """One record for each image below a folder, from the label file of its name.

    A line is ``class centre_x centre_y width height`` in parts of the image, or ``class`` and a
    polygon's ``x y x y x y ...``. An image without a label file has no objects, as YOLO has it.

    Args:
        labels: folder of text files, with the same sub-folders as ``images``.
        images: folder of images.
        names: of the classes, by number.

    Returns:
        As :func:`voc_records`; polygons as "segmentation".

    Raises:
        ConfigError: a folder is missing.
        DataError: a label file without image, or a line that is wrong, with its number.
    """
    pictures = files_below(images, EXTENSIONS, "--images")
    found = files_below(labels, (".txt",), "--annotations")
    found = {k: v for k, v in found.items() if os.path.basename(v) not in NOT_LABELS}
    for stem, path in found.items():
        if stem not in pictures:
            raise DataError(f"{path}: no image {stem}{EXTENSIONS[0]} (or .png, ...) in {images}")
    if not found:
        raise DataError(f"{labels}: no .txt file in it")
    records = []
    for stem, image in pictures.items():
        header = image_header(image)
        objects = []
        for number, line in enumerate(_lines(found[stem]) if stem in found else (), 1):
            if line.strip():
                where = f"{found[stem]}: line {number}"
                objects.append(_yolo_object(where, line.split(), header, names))
        records.append(_record(image, images, header, objects))
    return records


def read_names(path: str) -> list[str]:
    """Class names by number: of YOLO's data.yaml (``names``), or one a line of a text file.

    Raises:
        ConfigError: it cannot be read, or holds no names from 0 on.
    """
    try:
        lines = _lines(path)
        content = None
        if path.endswith((".yaml", ".yml")):
            content = yaml.safe_load("\n".join(lines))
    except (DataError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--names: {error}") from error
    names = [line.strip() for line in "\n".join(lines).rstrip().splitlines()]
    if path.endswith((".yaml", ".yml")):
        names = content.get("names") if isinstance(content, dict) else None
        if isinstance(names, dict):
            names = [names.get(i, names.get(str(i))) for i in range(len(names))]
    right = isinstance(names, list) and all(isinstance(x, str) and x for x in names)
    if not right or not names or len(set(names)) < len(names):
        raise ConfigError(f"--names: '{path}' does not name every class from 0 on, each once")
    return names


def class_names(records: Iterable[dict]) -> list[str]:
    """The names that occur, sorted."""
    return sorted({item["name"] for record in records for item in record["objects"]})


def coco_tables(records: Sequence[dict], names: Sequence[str]) -> dict:
    """COCO's images, categories and annotations, ids from 1 in the order of records and names.

    Args:
        records: with "objects" of "name", "bbox" (XYWH, pixels), "iscrowd", perhaps "segmentation".
        names: of the categories.

    Raises:
        DataError: an object of another class.
    """
    ids = {name: i for i, name in enumerate(names, 1)}
    images, annotations = [], []
    for number, record in enumerate(records, 1):
        images.append({"id": number, **{k: v for k, v in record.items() if k != "objects"}})
        for item in record["objects"]:
            if item["name"] not in ids:
                raise DataError(
                    f"{record['file_name']}: class '{item['name']}' is none of {', '.join(names)}"
                )
            rest = {key: value for key, value in item.items() if key != "name"}
            area = item["bbox"][2] * item["bbox"][3]
            if "segmentation" in item:
                area = _polygon_area(item["segmentation"][0])
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": ids[item["name"]],
                 "area": area, **rest}
            )  # fmt: skip
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    return {"images": images, "categories": categories, "annotations": annotations}


def _record(image: str, folder: str, header, objects: list[dict]) -> dict:
    name = os.path.relpath(image, folder).replace(os.sep, "/")
    size = {"width": header.width, "height": header.height}
    return {"file_name": name, **size, "objects": objects}


def _xml(path: str):
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path}: is not XML: {error}") from error
    if root.tag != "annotation":
        raise DataError(f"{path}: is no Pascal VOC file: it begins with <{root.tag}>")
    return root


def _number(where: str, what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: {what} holds '{text.strip()}', which is no number")
    return value


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _yolo_object(where: str, fields: list[str], header, names: Sequence[str]) -> dict:
    label = _number(where, "the class", fields[0])
    if not (label.is_integer() and 0 <= label < len(names)):
        raise DataError(f"{where}: class {fields[0]} is not in 0..{len(names) - 1} of --names")
    values = [_number(where, "a coordinate", x) for x in fields[1:]]
    if len(values) == 5:
        raise DataError(f"{where}: six numbers, as predictions with scores have: give labels")
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise DataError(
            f"{where}: {len(fields)} numbers, neither class, centre and size nor class and polygon"
        )
    outside = [x for x in values if not -TOLERANCE <= x <= 1 + TOLERANCE]
    if outside:
        raise DataError(f"{where}: {outside[0]:g} is not in 0..1, parts of the image")
    sides = (header.width, header.height)
    found = {"name": names[int(label)], "iscrowd": 0}
    if len(values) == 4:
        centre_x, centre_y, width, height = (x * sides[i % 2] for i, x in enumerate(values))
        box = [centre_x - width / 2, centre_y - height / 2, width, height]
        return {**found, "bbox": [round(x, 6) for x in box]}
    polygon = [round(x * sides[i % 2], 6) for i, x in enumerate(values)]
    left, top = min(polygon[::2]), min(polygon[1::2])
    box = [left, top, max(polygon[::2]) - left, max(polygon[1::2]) - top]
    return {**found, "bbox": [round(x, 6) for x in box], "segmentation": [polygon]}


def _polygon_area(polygon: Sequence[float]) -> float:
    """By the shoelace formula."""
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    following = [*points[1:], points[0]]
    return abs(sum(x * v - u * y for (x, y), (u, v) in zip(points, following, strict=True))) / 2
