"""DETR's augmentation: sizes, boxes that follow the pixels, and what is refused."""

import random

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from kd_models import tiny_cfg
from PIL import Image

from projects.kd.data.detr_augmentation import ResizeOrCrop, detr_augmentations
from projects.kd.data.mapper import build_train_mapper
from projects.kd.errors import ConfigError


def config(**overrides):
    values = {
        "INPUT__DETR_AUGMENTATION": True,
        "INPUT__MIN_SIZE_TRAIN": (48, 64),
        "INPUT__MAX_SIZE_TRAIN": 100,
        "INPUT__DETR_CROP_RESIZE": (40, 50),
        "INPUT__DETR_CROP_RANGE": (20, 30),
        **overrides,
    }
    return tiny_cfg("ConditionalDETR", **values)


def example(folder):
    """A white rectangle of 20x30 pixels at (40, 25) on black."""
    pixels = np.zeros((80, 120, 3), dtype=np.uint8)
    pixels[25:55, 40:60] = 255
    path = folder / "image.png"
    Image.fromarray(pixels).save(path)
    box = {"bbox": [40, 25, 60, 55], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, "iscrowd": 0}
    return {"file_name": str(path), "height": 80, "width": 120, "image_id": 1, "annotations": [box]}


def test_boxes_follow_pixels_and_sizes_are_those_of_the_config(tmp_path):
    mapper = build_train_mapper(config())
    record = example(tmp_path)
    short, ratios, empty = set(), set(), 0
    for seed in range(60):
        random.seed(seed), np.random.seed(seed)
        mapped = mapper(record)
        image, boxes = mapped["image"], mapped["instances"].gt_boxes.tensor
        height, width = image.shape[1:]
        assert max(height, width) <= 100
        short.add(min(height, width))
        ratios.add(round(width / height, 2))
        if not len(boxes):
            empty += 1
            continue
        lit = (image[0] > 127).nonzero()
        found = torch.tensor(
            [lit[:, 1].min(), lit[:, 0].min(), lit[:, 1].max() + 1, lit[:, 0].max() + 1]
        )
        assert (found - boxes[0]).abs().max() < 4, "half a pixel before the resize by up to 64/20"
    assert short >= {48, 64} and len(ratios) > 5, "both scales; crops have many shapes"


def test_both_ways_are_taken_half_of_the_time():
    choice = ResizeOrCrop([], [])
    choice.plain, choice.cropped = (lambda x: True), (lambda x: False)
    random.seed(0)
    taken = [choice(None) for _ in range(400)]
    assert 160 < sum(taken) < 240


def test_keys_are_read():
    flip, choice = detr_augmentations(config())
    assert isinstance(flip, T.RandomFlip) and isinstance(choice, ResizeOrCrop)
    resize, crop, again = choice.cropped.augs
    assert resize.short_edge_length == (40, 50) and crop.crop_size == (20, 30)
    assert again.short_edge_length == (48, 64) and again.max_size == 100
    assert choice.plain.augs[0].max_size == 100
    assert len(detr_augmentations(config(INPUT__RANDOM_FLIP="none"))) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("DETR_CROP_RANGE", (30, 20)), ("RANDOM_FLIP", "diagonal")]
)
def test_bad_values_name_their_key(key, value):
    with pytest.raises(ConfigError, match=f"INPUT.{key}"):
        detr_augmentations(config(**{f"INPUT__{key}": value}))
