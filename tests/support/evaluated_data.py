"""Small registered data sets with predictions on them, for tests of evaluators."""

import copy
import json

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes as BoxList
from detectron2.structures import BoxMode, Instances
from PIL import Image

from projects.kd.config import add_kd_config, get_cfg
from projects.kd.data.register import register_coco_data

SIZE = 200


KEYPOINTS = ["top", "left", "right"]


def config(name, **options):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TEST = (name,) if isinstance(name, str) else name
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TEST = 0
    for key, value in options.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def make_data(folder, name, boxes_per_image, keypoints=True, annotations=None, images=6, seed=0):
    """Register random boxes of three classes with polygons and keypoints."""
    rng = np.random.default_rng(seed)
    made = []
    for image in range(1, images + 1):
        Image.new("RGB", (SIZE, SIZE)).save(folder / f"{image}.png")
        for _ in range(boxes_per_image):
            w, h = np.exp(rng.uniform(np.log(6), np.log(150), 2))
            x, y = rng.uniform(0, SIZE - w), rng.uniform(0, SIZE - h)
            points = [x + w / 2, y, 2, x, y + h, 1, x + w, y + h, 2]
            made.append(
                {
                    "id": len(made) + 1,
                    "image_id": image,
                    "category_id": int(rng.integers(1, 4)) * 10,
                    "bbox": [x, y, w, h],
                    "area": w * h / 2,
                    "iscrowd": int(rng.random() < 0.08),
                    "segmentation": [[x, y + h, x + w / 2, y, x + w, y + h]],
                }
            )
            if keypoints:
                made[-1] |= {"keypoints": points, "num_keypoints": 3}
    categories = [{"id": 10 * i, "name": f"class{i}", "keypoints": KEYPOINTS} for i in (1, 2, 3)]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE}
            for i in range(1, images + 1)
        ],
        "annotations": made if annotations is None else annotations,
        "categories": categories,
    }
    (folder / f"{name}.json").write_text(json.dumps(content))
    register_coco_data(name, str(folder / f"{name}.json"), str(folder))
    return DatasetCatalog.get(name)


def predictions(dicts, noise, extra=0, seed=1, exact_scores=False):
    """{image id: Instances}: the ground truth with noise, and false positives; scores have ties."""
    rng = np.random.default_rng(seed)
    found = {}
    for entry in dicts:
        annotations = [a for a in entry["annotations"] if not a["iscrowd"]]
        boxes = np.array([BoxMode.convert(a["bbox"], 1, 0) for a in annotations]).reshape(-1, 4)
        points = np.array([a["keypoints"] for a in annotations]).reshape(-1, 3, 3)
        masks = [
            mask_util.decode(mask_util.frPyObjects(a["segmentation"], SIZE, SIZE))[..., 0]
            for a in annotations
        ]
        boxes = boxes + rng.normal(0, 1, boxes.shape) * noise
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        points = points + rng.normal(0, 1, points.shape) * noise * (1, 1, 0)
        classes = [a["category_id"] for a in annotations]
        corners = rng.uniform(0, SIZE - 30, (extra, 2))
        boxes = np.concatenate([boxes, np.hstack([corners, corners + 25])])
        masks += [np.roll(np.eye(SIZE, dtype=np.uint8), i, 0) for i in range(extra)]
        points = np.concatenate([points, rng.uniform(0, SIZE, (extra, 3, 3))])
        classes += rng.integers(0, 3, extra).tolist()
        scores = rng.uniform(0, 1, len(classes)).round(2)
        if exact_scores:
            scores = np.linspace(1, 0.5, len(classes))
        instances = Instances((SIZE, SIZE))
        instances.pred_boxes = BoxList(torch.tensor(boxes))
        instances.scores = torch.tensor(scores)
        instances.pred_classes = torch.tensor(classes)
        instances.pred_masks = torch.tensor(np.array(masks).reshape(-1, SIZE, SIZE)).bool()
        instances.pred_keypoints = torch.tensor(points)
        found[entry["image_id"]] = instances
    return found


def run(evaluator, found):
    evaluator.reset()
    for image_id, instances in found.items():
        evaluator.process([{"image_id": image_id}], [{"instances": copy.deepcopy(instances)}])
    return evaluator.evaluate()


class Oracle(torch.nn.Module):
    """A "model" that gives stored predictions."""

    def __init__(self, found, **fields):
        super().__init__()
        self.found, self.fields = found, fields

    def forward(self, batch):
        """Stored outputs."""
        return [
            {"instances": copy.deepcopy(self.found[entry["image_id"]])}
            | {key: value[entry["image_id"]] for key, value in self.fields.items()}
            for entry in batch
        ]
