"""Two sizes of one augmentation: what the teacher sees is what the student sees, only larger."""

import itertools
import random

import kd_models
import numpy as np
import pytest
import torch
import toy_data
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image

from projects.kd import DataError
from projects.kd.data.loader import build_train_loader
from projects.kd.data.mapper import MultiResolutionMapper, build_train_mapper
from projects.kd.levels import scaled_size

NAME = "noise_two_sizes"


@pytest.fixture
def dicts(tmp_path):
    return toy_data.register_noise(tmp_path, NAME)


def make_cfg(scale=2.0, **overrides):
    return kd_models.tiny_cfg(
        **{
            "DATASETS__TRAIN": (NAME,),
            "INPUT__MIN_SIZE_TRAIN": (36, 48),
            "INPUT__MAX_SIZE_TRAIN": 1000,
            "KD__META_ARCHITECTURE": "DistillMetaArch",
            "KD__TEACHER__INPUT_SCALE": float(scale),
            "SEED": 7,
            **overrides,
        }
    )


def seeded(mapper, image, seed):
    np.random.seed(seed)
    random.seed(seed)
    return mapper(image)


def two_sizes(augmentations, scale, image):
    mapper = MultiResolutionMapper(
        is_train=True, augmentations=augmentations, image_format="BGR", teacher_scale=scale
    )
    example = mapper(image)
    return example["image"], example["image_teacher"]


def original(image):
    return read_image(image["file_name"], "BGR")


def chw(image):
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))


CROP = {"INPUT__CROP__ENABLED": True, "INPUT__CROP__TYPE": "absolute"}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {**CROP, "INPUT__CROP__SIZE": [32, 40]},
        {"INPUT__RANDOM_FLIP": "vertical"},
        {**CROP, "INPUT__CROP__SIZE": [24, 24], "INPUT__RANDOM_FLIP": "none"},
    ],
)
def test_equal_to_training_at_twice_the_size_with_the_same_random_numbers(dicts, overrides):
    """Bit for bit: the teacher's image is that of a run whose INPUT sizes are doubled."""
    cfg, larger = make_cfg(**overrides), make_cfg(**overrides, INPUT__MIN_SIZE_TRAIN=(72, 96))
    ours, plain, double = build_train_mapper(cfg), DatasetMapper(cfg), DatasetMapper(larger)
    compared = 0
    for seed, image in itertools.product(range(6), dicts[:4]):
        example = seeded(ours, image, seed)
        student, teacher = seeded(plain, image, seed), seeded(double, image, seed)
        assert torch.equal(example["image"], student["image"])
        boxes = example["instances"].gt_boxes.tensor
        assert torch.equal(boxes, student["instances"].gt_boxes.tensor)
        if teacher["image"].shape[-2:] == scaled_size(student["image"].shape[-2:], 2):
            compared += 1  # else detectron2 rounds the longer side of the two in different ways
            assert torch.equal(example["image_teacher"], teacher["image"])
    assert compared >= 12


def test_a_crop_behind_the_resize_is_scaled(dicts):
    """The flip stands between the two crops."""
    crops = T.CropTransform(5, 7, 30, 20), T.CropTransform(2, 3, 20, 10)
    augmentations = [T.Resize((40, 56)), crops[0], T.RandomFlip(1.0), crops[1]]
    student, teacher = two_sizes(augmentations, 2.0, dicts[1])
    small = T.ResizeTransform(48, 64, 40, 56).apply_image(original(dicts[1]))
    large = T.ResizeTransform(48, 64, 80, 112).apply_image(original(dicts[1]))
    assert torch.equal(student, chw(small[7:27, 5:35][:, ::-1][3:13, 2:22]))
    assert torch.equal(teacher, chw(large[14:54, 10:70][:, ::-1][6:26, 4:44]))


def test_two_resizes_keep_the_detail_of_the_original(dicts):
    augmentations = [T.Resize((24, 32)), T.Resize((48, 64))]
    teacher = two_sizes(augmentations, 2.0, dicts[1])[1]
    kept = T.ResizeTransform(48, 64, 48, 64).apply_image(original(dicts[1]))
    assert torch.equal(teacher, chw(T.ResizeTransform(48, 64, 96, 128).apply_image(kept)))


def test_without_a_resize_the_last_image_is_resized(dicts):
    student, teacher = two_sizes([T.CropTransform(3, 5, 31, 21)], 2.0, dicts[1])
    crop = original(dicts[1])[5:26, 3:34]
    assert torch.equal(student, chw(crop))
    assert torch.equal(teacher, chw(T.ResizeTransform(21, 31, 42, 62).apply_image(crop)))


@pytest.mark.parametrize("scale", [1.5, 0.5, 1 / 3, 3.0])
def test_sides_are_rounded_to_the_nearest_halves_up(dicts, scale):
    augmentations = [T.Resize((33, 47)), T.CropTransform(13, 8, 33, 25), T.RandomFlip(0.5)]
    for seed in range(8):
        np.random.seed(seed)
        student, teacher = two_sizes(augmentations, scale, dicts[1])
        assert student.shape == (3, 25, 33)
        assert teacher.shape[-2:] == (int(25 * scale + 0.5), int(33 * scale + 0.5))
    # a crop that ends at the border stays inside, though both its start and its side round up
    corner = [T.Resize((33, 47)), T.CropTransform(47 - 33, 33 - 25, 33, 25)]
    assert two_sizes(corner, scale, dicts[1])[1].shape == teacher.shape


def test_augmentations_that_cannot_be_repeated_are_refused_in_one_line(dicts):
    augmentations = [T.Resize((33, 47)), T.RandomRotation([10.0, 20.0])]
    with pytest.raises(DataError, match=r"KD\.TEACHER\.INPUT_SCALE 2: RotationTransform") as error:
        two_sizes(augmentations, 2.0, dicts[1])
    assert "\n" not in str(error.value)
    # before the resize anything goes
    shown = two_sizes([T.RandomRotation([15.0, 15.0]), T.Resize((40, 40))], 2.0, dicts[1])
    assert shown[1].shape == (3, 80, 80)


def test_scale_one_and_plain_training_have_no_second_image(dicts):
    for cfg in (make_cfg(1.0), make_cfg(2.0, KD__META_ARCHITECTURE="")):
        mapper = build_train_mapper(cfg)
        assert mapper.mapper.teacher_scale == 1.0
        assert "image_teacher" not in mapper(dicts[0])
    augmentations = [T.Resize((33, 47))]
    mapper = MultiResolutionMapper(
        is_train=True, augmentations=augmentations, image_format="BGR", teacher_scale=1.0
    )
    assert "image_teacher" not in mapper(dicts[0])


def test_the_loader_gives_both_with_and_without_workers(dicts):
    batches = [
        list(itertools.islice(build_train_loader(make_cfg(DATALOADER__NUM_WORKERS=n)), 3))
        for n in (0, 2)
    ]
    for alone, shared in zip(*batches, strict=True):
        for a, b in zip(alone, shared, strict=True):
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["image_teacher"], b["image_teacher"])
            assert a["image_teacher"].shape[-2:] == scaled_size(a["image"].shape[-2:], 2)
