"""Evaluate VisDrone result files against the official annotation files.

    kd-evaluate visdrone --data VisDrone2019-DET-val --results FOLDER [--output FILE]

FOLDER holds one text file for each image, as in a submission: box, score, category, -1, -1. The
annotations are taken as they are (nothing is clipped, boxes without a size count as missed), so
that the numbers are those of the VisDrone2018-DET toolkit, see
projects/kd/evaluation/visdrone_metrics.py.
"""

from __future__ import annotations

import json
import os

import numpy as np

from ...arguments import Parser, output_file
from ...data import visdrone
from ...data.images import image_size
from ...errors import DataError
from ...evaluation.visdrone_metrics import (
    READINGS,
    ImageResult,
    evaluate_images,
)

CATEGORIES = range(12)  # 0 = ignored region, 11 = others: in annotations, without influence here


def read_image(image: str, annotations: str, results: str) -> ImageResult:
    with open(annotations, encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    rows = visdrone.parse_annotations(text, annotations, visdrone.Problems())
    rows = np.array(rows, int).reshape(-1, visdrone.FIELDS)
    objects, regions = rows[rows[:, 5] != 0], rows[rows[:, 5] == 0]
    found = read_results(results)
    width, height = image_size(image)
    return ImageResult(
        height=height,
        width=width,
        gt_boxes=objects[:, :4],
        gt_classes=objects[:, 5],
        gt_ignored=objects[:, 4] == 0,
        regions=regions[:, :4],
        boxes=found[:, :4],
        scores=found[:, 4],
        classes=found[:, 5],
    )


def read_results(path: str) -> np.ndarray:
    """(D, 6): box XYWH, score, category, in the order of the lines."""
    rows = []
    try:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                parts = line.strip().rstrip(",").split(",")
                if parts == [""]:
                    continue
                try:
                    row = [float(part) for part in parts[:6]]
                except ValueError:
                    row = []
                if len(row) < 6 or not np.isfinite(row).all():
                    raise DataError(f"{path}:{number}: not box, score, category: {line.strip()}")
                if row[5] not in CATEGORIES:
                    raise DataError(f"{path}:{number}: category {row[5]:g} is none of 0 to 11")
                rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: result file cannot be read: {error}") from error
    return np.array(rows, float).reshape(-1, 6)


def find(folder: str, extension: str) -> dict[str, str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    return {n[: -len(extension)]: os.path.join(folder, n) for n in names if n.endswith(extension)}


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="folder with images and annotations")
    parser.add_argument("--results", required=True, help="folder with a .txt file for each image")
    parser.add_argument(
        "--output", type=output_file, default="", help="a .json file for all metrics"
    )
    return parser.parse_args(argv)


def main(args) -> dict:
    annotations = find(os.path.join(args.data, "annotations"), ".txt")
    pictures = find(os.path.join(args.data, "images"), ".jpg")
    results = find(args.results, ".txt")
    if not annotations:
        raise DataError(f"--data: {args.data}/annotations holds no .txt file")
    for files, place in ((pictures, f"{args.data}/images"), (results, args.results)):
        missing = sorted(annotations.keys() - files.keys())
        if missing:
            raise DataError(f"{place}: no file for {missing[0]} ({len(missing)} are missing)")
    images = [read_image(pictures[stem], annotations[stem], results[stem]) for stem in annotations]
    metrics = evaluate_images(images, dict(enumerate(visdrone.CLASSES, start=1)), READINGS)
    print(f"{len(images)} images, in percent\n{'':20}" + "".join(f"{n:>10}" for n in metrics))
    for key in metrics["toolkit"]:
        print(f"{key:20}" + "".join(f"{numbers[key]:10.2f}" for numbers in metrics.values()))
    if args.output:
        with open(args.output, "w") as stream:
            json.dump(metrics, stream, indent=1)
    return metrics
