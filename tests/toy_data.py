"""A data set of a dozen noise images, wide and high, for tests of loading and training."""

from __future__ import annotations

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image


def register_noise(folder, name: str, count: int = 12) -> list[dict]:
    """Write images of 64x48 and 48x64 with one box each; replaces a data set of the same name."""
    dicts = []
    for i in range(count):
        width, height = (48, 64) if i % 3 == 0 else (64, 48)
        path = folder / f"{name}_{i}.png"
        pixels = np.random.RandomState(i).randint(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        box = {
            "bbox": [4 + i, 6, 24 + i, 30],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": i % 3,
            "iscrowd": 0,
        }
        dicts.append(
            {
                "file_name": str(path),
                "image_id": i,
                "height": height,
                "width": width,
                "annotations": [box],
            }
        )
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).thing_classes = ["a", "b", "c"]
    return dicts
