"""Noise with bright and dark squares, in COCO format, written beside this file when imported."""

import json
from pathlib import Path

import numpy as np
from detectron2.data.datasets import register_coco_instances
from PIL import Image

FOLDER = Path(__file__).parent / "images"
SIZE, SQUARE = 48, 12


def write():
    FOLDER.mkdir(exist_ok=True)
    random = np.random.RandomState(0)
    images, annotations = [], []
    for number in range(6):
        pixels = random.randint(80, 176, (SIZE, SIZE, 3), dtype=np.uint8)
        for kind, value in enumerate((255, 0)):
            x, y = random.randint(0, SIZE // 2 - SQUARE, 2) + kind * SIZE // 2
            pixels[y : y + SQUARE, x : x + SQUARE] = value
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": kind + 1,
                    "bbox": [int(x), int(y), SQUARE, SQUARE],
                    "area": SQUARE**2,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(FOLDER / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE})
    categories = [{"id": 1, "name": "bright"}, {"id": 2, "name": "dark"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (FOLDER / "dots.json").write_text(json.dumps(content))


write()
register_coco_instances("dots", {}, str(FOLDER / "dots.json"), str(FOLDER))
