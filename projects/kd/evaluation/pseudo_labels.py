"""Pseudo-labels: what a detector finds on images, as a COCO file that can be trained on."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from pycocotools import mask as mask_util
from torch import nn

from ..errors import ConfigError
from ..files import replacing


@dataclass(frozen=True)
class LabelRules:
    """Which detections become annotations, and of which category.

    Attributes:
        categories: rows of the file, each with ``id`` and ``name``.
        ids: the detector's class index to the category id; classes that are missing are left out.
        thresholds: category id to the least score.
        keypoint_score: keypoints of a lower score get the flag 0 (not labelled).
    """

    categories: list[dict]
    ids: Mapping[int, int]
    thresholds: Mapping[int, float]
    keypoint_score: float = 0.05

    def rows(self, found: Instances) -> list[dict]:
        """Annotations of an image, without ids, by falling score.

        Boxes are XYWH in pixels, clipped to the image. Masks are run lengths; a detection whose
        mask is empty is left out. Keypoints are (x, y, flag), in pixel indices as COCO has them,
        the flag 2 or 0.

        Args:
            found: detections in pixels of the image, on any device.
        """
        found = found.to("cpu")
        found.pred_boxes.clip(found.image_size)
        found = found[found.pred_boxes.nonempty()]
        rows = [self._row(x) for x in instances_to_coco_json(found, 0)]
        return sorted((x for x in rows if x), key=lambda row: -row["score"])

    def _row(self, found: dict) -> dict | None:
        category = self.ids.get(found["category_id"])
        if category is None or found["score"] < self.thresholds[category]:
            return None
        box = [round(x, 3) for x in found["bbox"]]
        row = {"category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        row["score"] = round(found["score"], 5)
        if "segmentation" in found:
            mask = found["segmentation"]
            row["segmentation"] = mask
            row["area"] = int(mask_util.area(mask))
            if not row["area"]:
                return None
        if "keypoints" in found:
            points = found["keypoints"]
            row["keypoints"] = _flagged(points, self.keypoint_score)
            row["num_keypoints"] = sum(flag > 0 for flag in row["keypoints"][2::3])
        return row


def _flagged(points: Sequence[float], least: float) -> list[float]:
    flat = []
    for x, y, score in zip(points[::3], points[1::3], points[2::3], strict=True):
        flat += [round(x, 2), round(y, 2), 2] if score >= least else [0, 0, 0]
    return flat


def least_score(model: nn.Module) -> float:
    """The score below which a detector gives nothing; 0 if it does not say.

    Of detectron2's it is SCORE_THRESH_TEST, of torchvision's ``score_thresh``.
    """
    names = ("test_score_thresh", "score_thresh")
    scores = (getattr(module, name, 0.0) for module in model.modules() for name in names)
    return max((x for x in scores if isinstance(x, float)), default=0.0)


@dataclass
class Progress:
    """The images that are done, in a file of one line each, so that a run that ended goes on.

    The first line holds the settings; a line that was cut off is written anew.

    Args:
        path: of the file.
        settings: what a result depends on, JSON values.

    Raises:
        ConfigError: the file is of other settings.
    """

    path: str
    settings: dict
    done: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self):
        self.settings = json.loads(json.dumps(self.settings))
        end = 0
        if os.path.exists(self.path):
            with open(self.path, "rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._read(json.loads(line), first=end == 0)
                    end += len(line)
        self._file = open(self.path, "ab")  # noqa: SIM115  open as long as the run
        self._file.truncate(end)
        if end == 0:
            self._write({"settings": self.settings})

    def _read(self, line: dict, first: bool) -> None:
        if not first:
            self.done[line["image"]] = line
            return
        known = line.get("settings", {})
        changed = [key for key in self.settings if known.get(key) != self.settings[key]]
        if changed:
            raise ConfigError(
                f"--output: {self.path} is of a run with another {', '.join(changed)}: remove it "
                "to start anew, or choose another --output"
            )

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def add(self, image: str, **line) -> None:
        """Keep what was found on an image, under its file name."""
        self.done[image] = {"image": image, **line}
        self._write(self.done[image])

    def remove(self) -> None:
        """All is written elsewhere."""
        self._file.close()
        os.remove(self.path)


def tables(images: Iterator[dict], categories: list[dict], info: dict) -> dict:
    """A COCO file of images that each bring their annotations.

    Args:
        images: ``file_name``, ``width``, ``height`` and ``rows`` of :meth:`LabelRules.rows`.
        categories: of the file.
        info: what it says of itself.
    """
    content = {"info": info, "images": [], "annotations": [], "categories": categories}
    for number, image in enumerate(images, start=1):
        facts = {key: image[key] for key in ("file_name", "width", "height")}
        content["images"].append({"id": number, **facts})
        for row in image["rows"]:
            ids = {"id": len(content["annotations"]) + 1, "image_id": number}
            content["annotations"].append(ids | row)
    return content


def write_tables(path: str, content: dict) -> None:
    """Write the file as a whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(content).encode())


def counted(content: dict) -> dict[str, int]:
    """Annotations of each class of a COCO file, by name."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    counts = Counter(names[row["category_id"]] for row in content["annotations"])
    return {name: counts[name] for name in names.values()}
