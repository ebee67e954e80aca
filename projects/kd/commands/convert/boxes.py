"""Convert boxes in Pascal VOC's XML files or YOLO's text files to one COCO json.

    kd-convert voc --annotations mine/xml --images mine/photos \\
        --output mine/train.json --val mine/val.json --val-share 0.2
    kd-convert yolo --annotations mine/labels --images mine/images \\
        --names mine/data.yaml --output mine/train.json

Nothing is copied or changed: KD.DATASETS names the json and the same image folder. Classes are
those that occur, sorted, or those of --classes, or --classes-of another json (YOLO: --names). With
--val a share of the images goes into a second file, chosen by a hash of their names: the same
images on every machine, whatever is added later.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter

from ...arguments import Parser, number, output_file
from ...data import conversion
from ...data.coco_json import inspect_annotations
from ...errors import ConfigError
from ...files import replacing


def is_validation(name: str, share: float) -> bool:
    """Whether the image of this file name belongs to the share that is kept for evaluation."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def read_records(args) -> tuple[list[dict], list[str]]:
    """Records of all images, and the names of the classes."""
    if args.part == "yolo":
        if not args.names:
            raise ConfigError("--names is needed: data.yaml, or a file with one class a line")
        names = conversion.read_names(args.names)
        return conversion.yolo_records(args.annotations, args.images, names), names
    records = conversion.voc_records(args.annotations, args.images, args.first_pixel)
    if args.classes_of:
        return records, [c["name"] for c in inspect_annotations(args.classes_of).categories]
    names = args.classes or conversion.class_names(records)
    if not names:
        raise ConfigError("--classes is needed: no annotation file holds an object")
    return records, names


def report(path: str, tables: dict) -> None:
    """What a file holds."""
    names = {category["id"]: category["name"] for category in tables["categories"]}
    counts = Counter(names[x["category_id"]] for x in tables["annotations"] if not x["iscrowd"])
    filled = {x["image_id"] for x in tables["annotations"]}
    difficult = sum(x["iscrowd"] for x in tables["annotations"])
    print(f"{path}: {len(tables['images'])} images ({len(tables['images']) - len(filled)} without "
          f"objects), {counts.total()} objects, {difficult} difficult")  # fmt: skip
    for name in names.values():
        print(f"  {counts[name]:>8} {name}")


def main(args) -> None:
    """Convert, write, report."""
    if args.val and not 0 < args.val_share < 1:
        raise ConfigError(f"--val-share is {args.val_share:g}, it must lie between 0 and 1")
    records, names = read_records(args)
    parts = {args.output: records}
    if args.val:
        chosen = [is_validation(x["file_name"], args.val_share) for x in records]
        parts = {
            args.output: [x for x, val in zip(records, chosen, strict=True) if not val],
            args.val: [x for x, val in zip(records, chosen, strict=True) if val],
        }
        for path, own in parts.items():
            if not own:
                raise ConfigError(f"--val-share {args.val_share:g}: no image is left for {path}")
    tables = {path: conversion.coco_tables(own, names) for path, own in parts.items()}
    for path, content in tables.items():
        with replacing(path) as file:
            file.write(json.dumps(content).encode())
    for path, content in tables.items():
        report(path, content)
        problems = inspect_annotations(path).problems  # what training clips or leaves out
        if problems.counts:
            print(f"  {problems}")


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--annotations", required=True, help="folder of .xml or .txt files")
    parser.add_argument("--images", required=True, help="folder of images, with the same names")
    parser.add_argument("--output", type=output_file, required=True, help="COCO json to write")
    parser.add_argument("--val", type=output_file, default="", help="a second one, for evaluation")
    parser.add_argument("--val-share", type=number(0, 1), default=0.2, help="of the images")
    parser.add_argument("--names", default="", help="yolo: data.yaml, or one class name a line")
    parser.add_argument("--classes", nargs="+", default=[], help="voc: names, in this order")
    parser.add_argument("--classes-of", default="", help="voc: a COCO json whose classes to take")
    parser.add_argument(
        "--first-pixel",
        type=int,
        choices=(0, 1),
        default=1,
        help="voc: 1 = pixels are counted from 1 and xmax lies inside (Pascal VOC, labelImg), "
        "0 = corners are edges, counted from 0",
    )
    return parser.parse_args(argv)
