"""Made-up VisDrone results, and the metrics once more: by plain loops, and by pycocotools."""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from projects.kd.evaluation.visdrone_metrics import ImageResult


def image(gt=(), found=(), regions=(), size=(100, 100)):
    """gt: (x, y, w, h, class[, ignored]); found: (x, y, w, h, class, score), in file order."""
    gt = [(*row, 0)[:6] for row in gt]
    gt = np.array(gt, float).reshape(-1, 6)
    found = np.array(found, float).reshape(-1, 6)
    return ImageResult(
        height=size[0],
        width=size[1],
        gt_boxes=gt[:, :4],
        gt_classes=gt[:, 4].astype(int),
        gt_ignored=gt[:, 5].astype(bool),
        regions=np.array(regions, int).reshape(-1, 4),
        boxes=found[:, :4],
        classes=found[:, 4].astype(int),
        scores=found[:, 5],
    )


def brute_ignored(box, regions, height, width):
    """Rule 1 with a pixel map and loops."""
    ignored = np.zeros((height + 1, width + 1), bool)  # from 1
    for x, y, w, h in regions:
        x, y, w, h = (max(1, v) for v in (x, y, w, h))
        for row in range(y, min(height, y + h) + 1):
            for column in range(x, min(width, x + w) + 1):
                ignored[row, column] = True
    x, y, w, h = (max(1, math.floor(v + 0.5)) for v in box)
    x, y = min(x, width), min(y, height)
    inside = ignored[y + 1 : min(height, y + h) + 1, x + 1 : min(width, x + w) + 1].sum()
    return inside / (w * h) < 0.5


def random_images(seed, images=6, regions=True, ignored=0.2, detections=60, classes=3):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(images):
        count = 0 if number == 1 else int(rng.integers(5, 20))
        truth = np.concatenate(
            [rng.integers(0, 80, (count, 2)), rng.integers(4, 30, (count, 2))], 1
        )
        labels = rng.integers(1, classes + 1, count)
        total = 0 if number == 2 else detections
        if count:
            source = rng.integers(0, count, total)
            boxes = truth[source] + rng.normal(0, 1.5, (total, 4)).round(1)
            found_labels = np.where(rng.random(total) < 0.8, labels[source], 1)
        else:
            boxes = rng.uniform(5, 60, (total, 4))
            found_labels = rng.integers(1, classes + 1, total)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], 1)
        scores = np.sort(rng.random(total).round(2))[::-1]  # with ties
        spots = [[40, 40, 30, 30], [60, 10, 20, 50]] if regions and number % 2 == 0 else []
        made.append(
            ImageResult(
                height=100,
                width=110,
                gt_boxes=truth,
                gt_classes=labels,
                gt_ignored=rng.random(count) < ignored,
                regions=np.array(spots, int).reshape(-1, 4),
                boxes=boxes,
                scores=scores,
                classes=found_labels,
            )
        )
    return made


def loop_evaluation(images, classes):
    """The toolkit's numbers, one box at a time."""
    ap, ar, weights = [], [], []
    for label in classes:
        weights.append(0)
        ap.append([])
        ar.append([])
        for threshold in np.linspace(0.5, 0.95, 10):
            ar[-1].append([])
            for limit in (1, 10, 100, 500):
                objects, outcomes = 0, []
                for one in images:
                    rows = _kept(one, one.gt_boxes)
                    mine = [i for i in rows if one.gt_classes[i] == label]
                    normal = [one.gt_boxes[i] for i in mine if not one.gt_ignored[i]]
                    ignored = [one.gt_boxes[i] for i in mine if one.gt_ignored[i]]
                    objects += len(mine)
                    lines = [i for i in _kept(one, one.boxes)[:limit] if one.classes[i] == label]
                    taken = set()
                    for i in sorted(lines, key=lambda i: -one.scores[i]):
                        best, chosen = threshold, None
                        for j, truth in enumerate(normal):
                            value = _overlap(one.boxes[i], truth, False)
                            if j not in taken and value >= best:
                                best, chosen = value, j
                        kind = 0
                        if chosen is not None:
                            taken.add(chosen)
                            kind = 1
                        elif any(_overlap(one.boxes[i], b, True) >= threshold for b in ignored):
                            kind = -1
                        outcomes.append((one.scores[i], kind))
                ar[-1][-1].append(sum(kind == 1 for _, kind in outcomes) / max(objects, 1))
            outcomes.sort(key=lambda pair: -pair[0])
            true = false = 0
            points = []
            for _, kind in outcomes:
                true += kind == 1
                false += kind == 0
                points.append((true / max(objects, 1), true / max(true + false, 1)))
            area = last = 0.0
            for k, (recall, _) in enumerate(points):
                area += (recall - last) * max(p for _, p in points[k:])
                last = recall
            ap[-1].append(area)
        for one in images:
            weights[-1] += any(one.gt_classes[i] == label for i in _kept(one, one.gt_boxes))
    ap, ar, weights = np.array(ap), np.array(ar), np.array(weights) / sum(weights)
    result = {"AP": weights @ ap.mean(1), "AP50": weights @ ap[:, 0], "AP75": weights @ ap[:, 5]}
    for column, limit in enumerate((1, 10, 100, 500)):
        result[f"AR{limit}"] = weights @ ar[:, :, column].mean(1)
    return {key: 100 * value for key, value in result.items()}


def _kept(one, boxes):
    regions = one.regions.tolist()
    return [i for i, box in enumerate(boxes) if brute_ignored(box, regions, one.height, one.width)]


def _overlap(a, b, over_first):
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / (a[2] * a[3] if over_first else a[2] * a[3] + b[2] * b[3] - w * h)


def coco_numbers(images, limit=500):
    """pycocotools at maxDets 500: AP, AP50, AP75, AR500 and APs by class."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": 100, "width": 110} for i in range(len(images))],
        "categories": [{"id": label} for label in (1, 2, 3)],
        "annotations": [
            {
                **{"image_id": i, "category_id": int(label), "bbox": box.tolist()},
                **{"area": float(box[2] * box[3]), "iscrowd": int(ignored)},
            }
            for i, one in enumerate(images)
            for box, label, ignored in zip(
                one.gt_boxes, one.gt_classes, one.gt_ignored, strict=True
            )
        ],
    }
    for number, annotation in enumerate(coco.dataset["annotations"], start=1):
        annotation["id"] = number
    found = [
        {"image_id": i, "category_id": int(c), "bbox": box.tolist(), "score": float(s)}
        for i, one in enumerate(images)
        for box, c, s in zip(one.boxes, one.classes, one.scores, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.params.maxDets = [1, 10, limit]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    recall = evaluation.eval["recall"][:, :, 0, -1]
    result = {"AP": precision, "AP50": precision[0], "AP75": precision[5], "AR500": recall}
    result |= {f"AP-{name}": precision[:, :, i] for i, name in enumerate("abc")}
    return {key: 100 * value[value > -1].mean() for key, value in result.items()}
