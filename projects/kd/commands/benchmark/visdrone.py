"""Time the VisDrone metrics next to pycocotools' COCOeval on made-up results of a val set's size.

    kd-benchmark visdrone [--images 548] [--detections 500] [--output x.json]

Objects and detections have VisDrone's number, sizes and mix of classes in round figures: 70 objects
an image, sides of 6 to 120 pixels, half of them cars or pedestrians, two ignored regions. Every
image has the full number of detections: three jittered copies of each object, the rest anywhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ...arguments import Parser, output_file, whole
from ...data.visdrone import CLASSES
from ...evaluation.visdrone_metrics import ImageResult, evaluate_images

HEIGHT, WIDTH, OBJECTS, COPIES = 788, 1400, 70, 3
# pedestrian, people, bicycle, car, van, truck, tricycle, awning-tricycle, bus, motor
SHARES = np.array([0.23, 0.13, 0.03, 0.36, 0.05, 0.02, 0.03, 0.01, 0.01, 0.13])


def make_images(count: int, detections: int) -> list[ImageResult]:
    random = np.random.default_rng(0)
    return [make_image(random, detections) for _ in range(count)]


def make_image(random, detections: int) -> ImageResult:
    def boxes(number):
        sides = np.exp(random.uniform(np.log(6), np.log(120), (number, 2)))
        corners = random.uniform(0, 1, (number, 2)) * ([WIDTH, HEIGHT] - sides)
        return np.concatenate([corners, sides], 1)

    truth = boxes(OBJECTS).round()
    labels = random.choice(np.arange(1, 11), OBJECTS, p=SHARES)
    copies = np.repeat(truth, COPIES, 0)
    copies = copies + random.normal(0, 0.1, copies.shape) * np.tile(copies[:, 2:], 2)
    found = np.concatenate([copies, boxes(max(detections - len(copies), 0))])
    others = random.choice(np.arange(1, 11), len(found) - len(copies), p=SHARES)
    found_labels = np.concatenate([np.repeat(labels, COPIES), others])
    found[:, 2:] = np.maximum(found[:, 2:], 1)
    scores = random.random(len(found)) * np.where(np.arange(len(found)) < len(copies), 1, 0.5)
    order = np.argsort(-scores)[:detections]
    return ImageResult(
        height=HEIGHT,
        width=WIDTH,
        gt_boxes=truth,
        gt_classes=labels,
        gt_ignored=np.zeros(OBJECTS, bool),
        regions=np.array([[100, 50, 200, 80], [900, 300, 150, 200]]),
        boxes=found[order],
        scores=scores[order],
        classes=found_labels[order],
    )


def time_coco(images: list[ImageResult]) -> tuple[float, float]:
    """Seconds and AP of COCOeval at maxDets 500, all size bands."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(len(images))],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
        "annotations": [],
    }
    annotations = coco.dataset["annotations"]
    for i, image in enumerate(images):
        for box, label in zip(image.gt_boxes.tolist(), image.gt_classes.tolist(), strict=True):
            item = {"id": len(annotations) + 1, "image_id": i, "category_id": label, "bbox": box}
            annotations.append({**item, "area": box[2] * box[3], "iscrowd": 0})
    found = [
        {"image_id": i, "category_id": label, "bbox": box, "score": score}
        for i, image in enumerate(images)
        for box, label, score in zip(
            image.boxes.tolist(), image.classes.tolist(), image.scores.tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        start = time.perf_counter()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.params.maxDets = [1, 10, 500]
        evaluation.evaluate()
        evaluation.accumulate()
        seconds = time.perf_counter() - start
    precision = evaluation.eval["precision"][..., 0, -1]
    return seconds, 100 * float(precision[precision > -1].mean())


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--images", type=whole(1), default=548)
    parser.add_argument("--detections", type=whole(1), default=500)
    parser.add_argument(
        "--output", type=output_file, default="", help="a .json file for all numbers"
    )
    return parser.parse_args(argv)


def main(args) -> dict:
    images = make_images(args.images, args.detections)
    names = dict(enumerate(CLASSES, start=1))
    start = time.perf_counter()
    metrics = evaluate_images(images, names)
    ours = time.perf_counter() - start
    theirs, coco_ap = time_coco(images)
    print(f"{args.images} images with {args.detections} detections, {os.cpu_count()} CPUs")
    print(f"VisDrone metrics, both readings  {ours:7.1f} s  AP {metrics['toolkit']['AP']:.2f}")
    print(f"pycocotools, maxDets 500         {theirs:7.1f} s  AP {coco_ap:.2f} (no regions)")
    result = {"seconds": ours, "coco_seconds": theirs, "coco_ap": coco_ap, "metrics": metrics}
    if args.output:
        with open(args.output, "w") as file:
            json.dump(result, file, indent=1)
    return result
