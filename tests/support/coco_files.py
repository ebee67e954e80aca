"""Small random COCO files, detections on them, and their scores."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from projects.kd.config import add_kd_config, get_cfg
from projects.kd.data import register
from projects.kd.evaluation.detection_evaluator import DetectionEvaluator

WIDTH, HEIGHT = 96, 64
CLASSES = ("cat", "dog", "owl")
POINTS = ("left_eye", "right_eye")


def plain(rng: random.Random, images: int = 4, boxes: int = 5) -> dict:
    """A COCO file as COCO writes it: whole numbers from 1 as ids, polygons, keypoints."""
    annotations = []
    for image in range(1, images + 1):
        for _ in range(boxes):
            w, h = rng.randint(4, 60), rng.randint(4, 40)
            x, y = rng.randint(0, WIDTH - w), rng.randint(0, HEIGHT - h)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": rng.randint(1, len(CLASSES)),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    "keypoints": [x, y, 2, x + w - 1, y + h - 1, 1],
                    "num_keypoints": 2,
                }
            )
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT}
            for i in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [
            {"id": i, "name": name, "keypoints": list(POINTS), "skeleton": [[1, 2]]}
            for i, name in enumerate(CLASSES, start=1)
        ],
    }


def write(folder, name: str, content: dict | str, images: int = 4) -> str:
    """Path of the file; images of the right size lie beside it."""
    path = folder / f"{name}.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    for i in range(1, images + 1):
        if not (folder / f"{i}.png").exists():
            Image.new("L", (WIDTH, HEIGHT)).save(folder / f"{i}.png")
    return str(path)


def registered(folder, name: str, content: dict | str) -> str:
    """The name, under which the file is registered as an entry of KD.DATASETS is."""
    register.register_coco_data(name, write(folder, name, content), str(folder))
    return name


def forget(name: str) -> None:
    """Make the name free again."""
    if register._configured.pop(name, None):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def config(name: str, masks: bool = False, keypoints: bool = False):
    """A config that trains and tests on one data set."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON = masks, keypoints
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(POINTS)
    return cfg


def detections(content: dict, seed: int) -> dict[str, Instances]:
    """By file name: the objects of a plain file with noise, and false ones; some scores tie."""
    rng = np.random.default_rng(seed)
    found = {}
    for image in content["images"]:
        rows = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = np.array([BoxMode.convert(a["bbox"], 1, 0) for a in rows], float).reshape(-1, 4)
        boxes = np.concatenate([boxes, boxes[:, [1, 0, 3, 2]]]) + rng.normal(
            0, 1, (2 * len(rows), 4)
        )
        boxes = boxes.clip(0, [WIDTH - 2, HEIGHT - 2] * 2)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        classes = [a["category_id"] - 1 for a in rows] * 2
        masks = np.zeros((len(boxes), HEIGHT, WIDTH), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().astype(int), strict=True):
            mask[y0:y1, x0:x1] = True
        points = np.array([a["keypoints"] for a in rows] * 2, float).reshape(-1, len(POINTS), 3)
        points[..., :2] += rng.normal(0, 1, (len(points), len(POINTS), 2))
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_boxes = Boxes(torch.tensor(boxes))
        instances.scores = torch.tensor(rng.uniform(0, 1, len(boxes)).round(1))
        instances.pred_classes = torch.tensor(classes, dtype=torch.long)
        instances.pred_masks = torch.tensor(masks)
        instances.pred_keypoints = torch.tensor(points)
        found[image["file_name"]] = instances
    return found


def scores(name: str, found: dict[str, Instances], fast: bool, output_dir=None) -> dict:
    """``{task: {metric: percent}}`` of the detections of each image, by its file name.

    -1 stands for what cannot be computed, so that results can be compared.
    """
    evaluator = DetectionEvaluator(
        name,
        distributed=False,
        output_dir=output_dir,
        kpt_oks_sigmas=[0.1] * len(POINTS),
        use_fast_impl=fast,
    )
    evaluator.reset()
    for entry in DatasetCatalog.get(name):
        own = found[entry["file_name"].rpartition("/")[2]]
        copy = Instances(own.image_size)
        for field, value in own.get_fields().items():
            copy.set(field, value.clone())  # the evaluator shifts keypoints in place
        evaluator.process([entry], [{"instances": copy}])
    return {
        task: {key: -1.0 if math.isnan(value) else value for key, value in metrics.items()}
        for task, metrics in evaluator.evaluate().items()
    }


def run_lengths(row: dict, as_list: bool) -> dict:
    """A mask's polygons as COCO's run lengths."""
    (packed,) = mask_util.frPyObjects(row["segmentation"], HEIGHT, WIDTH)
    if not as_list:
        return {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()}
    flat = mask_util.decode(packed).T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    return {
        "size": [HEIGHT, WIDTH],
        "counts": np.diff([0, *edges, HEIGHT * WIDTH]).tolist(),
    }
