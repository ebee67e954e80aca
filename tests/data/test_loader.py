"""The loader's batches depend on seed, rank and place only, and keep detectron2's options."""

import itertools
import random
from pathlib import Path

import kd_models
import numpy as np
import pytest
import torch
import toy_data
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from projects.kd import ConfigError, DataError
from projects.kd.data.loader import (
    GroupedBatchSampler,
    SeededDataset,
    build_train_loader,
    without_unused,
)
from projects.kd.data.mapper import build_train_mapper

NAME = "noise_loader"


@pytest.fixture
def dicts(tmp_path):
    return toy_data.register_noise(tmp_path, NAME)


def make_cfg(**overrides):
    return kd_models.tiny_cfg(
        **{
            "DATASETS__TRAIN": (NAME,),
            "INPUT__MIN_SIZE_TRAIN": (40, 48, 56, 64),
            "INPUT__MAX_SIZE_TRAIN": 96,
            "SEED": 7,
            **overrides,
        }
    )


def take(cfg, count, start_iter=0, **kwargs):
    return list(itertools.islice(build_train_loader(cfg, start_iter, **kwargs), count))


def same(one, other):
    return len(one) == len(other) and all(
        a["file_name"] == b["file_name"]
        and torch.equal(a["image"], b["image"])
        and torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_augmentation_does_not_depend_on_the_workers(dicts):
    alone = take(make_cfg(), 6)
    random.seed(99)
    np.random.seed(99)
    shared = take(make_cfg(DATALOADER__NUM_WORKERS=2), 6)
    assert same(alone, shared)
    assert len({image["image"].shape for batch in alone for image in batch}) > 3


def test_every_pass_over_the_data_is_augmented_anew(dicts):
    seen = {}
    for batch in take(make_cfg(), 36):
        for image in batch:
            seen.setdefault(image["file_name"], set()).add(tuple(image["image"].shape))
    assert all(len(shapes) > 1 for shapes in seen.values())


@pytest.mark.parametrize("accum_steps", [1, 3])
def test_fast_forward_equals_skipping_and_reads_nothing(dicts, accum_steps):
    cfg = make_cfg(SOLVER__ACCUM_STEPS=accum_steps)
    whole = take(cfg, 4 * accum_steps)
    read = []
    mapper = build_train_mapper(cfg)

    def watched(image):
        read.append(image["file_name"])
        return mapper(image)

    rest = take(cfg, accum_steps, start_iter=3, mapper=watched)
    assert same(rest, whole[3 * accum_steps :])
    assert len(read) == 2 * accum_steps


def test_batches_are_wide_or_not(dicts):
    mixed = 0
    for batch in take(make_cfg(), 30):
        assert len({image["width"] > image["height"] for image in batch}) == 1
    for batch in take(make_cfg(DATALOADER__ASPECT_RATIO_GROUPING=False), 30):
        mixed += len({image["width"] > image["height"] for image in batch}) > 1
    assert mixed > 0


def test_grouping_neither_loses_nor_repeats_an_index():
    indices = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]
    groups = bytes(i % 2 for i in range(10))
    batches = list(GroupedBatchSampler(indices, groups, 2))
    flat = [pair for batch in batches for pair in batch]
    assert all(indices[position] == index for position, index in flat)
    assert len({position for position, _ in flat}) == len(flat) == 14
    assert all(groups[a[1]] == groups[b[1]] for a, b in batches)
    # batches come in the order in which their last image is drawn
    assert [b[0] for _, b in batches] == sorted(b[0] for _, b in batches)
    assert list(GroupedBatchSampler(indices, groups, 2, skip=3)) == batches[3:]


def test_without_grouping_batches_follow_the_sampler():
    batches = list(GroupedBatchSampler([4, 2, 0, 1, 3], None, 2))
    assert batches == [[(0, 4), (1, 2)], [(2, 0), (3, 1)]]


def test_ranks_share_every_pass(dicts, monkeypatch):
    drawn = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(comm, "all_gather", lambda data, group=None: [data])
        cfg = make_cfg(SOLVER__IMS_PER_BATCH=2, DATALOADER__ASPECT_RATIO_GROUPING=False)
        drawn.append([image["file_name"] for batch in take(cfg, 6) for image in batch])
    assert len(drawn[0]) == len(drawn[1]) == 6
    assert set(drawn[0]) | set(drawn[1]) == {image["file_name"] for image in dicts}


def test_ranks_augment_differently():
    def draw(image):
        return (random.random(), np.random.rand(), torch.rand(()).item())

    one, other = (SeededDataset([{}], draw, 5, rank) for rank in (0, 1))
    assert one[0, 0] == one[0, 0]
    assert one[0, 0] != one[1, 0] and one[0, 0] != other[0, 0]
    assert SeededDataset([{}], draw, 6, 0)[0, 0] != one[0, 0]


@pytest.mark.parametrize(
    "name",
    [
        "TrainingSampler",
        "RepeatFactorTrainingSampler",
        "RandomSubsetTrainingSampler",
        "WeightedTrainingSampler",
        "WeightedCategoryTrainingSampler",
    ],
)
def test_every_sampler_repeats_with_its_seed(dicts, name):
    cfg = make_cfg(
        DATALOADER__SAMPLER_TRAIN=name,
        DATALOADER__REPEAT_THRESHOLD=0.9,
    )
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [[NAME, 2.0]]
    names = [[i["file_name"] for b in take(cfg, 9, seed=s) for i in b] for s in (3, 3, 4)]
    assert names[0] == names[1] != names[2]
    if name == "RandomSubsetTrainingSampler":
        assert len(set(names[0])) <= 6
    if name == "WeightedTrainingSampler":  # two of each image in a pass of 24
        assert max(names[0].count(n) for n in names[0]) == 2


def test_indices_are_detectron2s(dicts):
    cfg = make_cfg(DATALOADER__ASPECT_RATIO_GROUPING=False)
    ours = [image["image_id"] for batch in take(cfg, 6) for image in batch]
    assert ours == list(itertools.islice(iter(TrainingSampler(12, seed=7)), 12))


def test_random_seed_when_the_config_has_none(dicts):
    numpy_state = np.random.get_state()
    first = take(make_cfg(SEED=-1), 4)
    np.random.set_state(numpy_state)
    assert same(first, take(make_cfg(SEED=-1), 4))
    assert not same(first, take(make_cfg(SEED=-1), 4))


def test_refused_images_are_replaced_the_same_way(dicts):
    def only_small_ids(image):
        return image if image["image_id"] < 3 else None

    images = [{"image_id": i} for i in range(12)]
    dataset = SeededDataset(images, only_small_ids, 1, 0)
    got = [dataset[position, position % 12]["image_id"] for position in range(60)]
    assert got == [dataset[position, position % 12]["image_id"] for position in range(60)]
    assert set(got) == {0, 1, 2} and all(got[p] == p % 12 for p in range(60) if p % 12 < 3)
    refusing = SeededDataset(images, lambda image: None, 1, 0)
    assert "refuses" in str(refusing[0, 0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "other size"])
def test_unreadable_image_is_named_in_one_line(dicts, workers, damage):
    path = Path(dicts[5]["file_name"])
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "text":
        path.write_text("no image")
    else:
        path.write_bytes(Path(dicts[6]["file_name"]).read_bytes())
    with pytest.raises(DataError) as caught:
        take(make_cfg(DATALOADER__NUM_WORKERS=workers), 6)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_wrong_settings_name_their_key(dicts, monkeypatch):
    with pytest.raises(ConfigError, match="SAMPLER_TRAIN: no sampler 'Mine'"):
        build_train_loader(make_cfg(DATALOADER__SAMPLER_TRAIN="Mine"))
    del dicts[0]["width"]
    with pytest.raises(ConfigError, match="ASPECT_RATIO_GROUPING needs 'width'"):
        build_train_loader(make_cfg())
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(ConfigError, match="SOLVER.IMS_PER_BATCH 2 must be divisible"):
        build_train_loader(make_cfg())


@pytest.mark.parametrize(
    "arch, masks, kept",
    [
        ("RetinaNet", False, {"bbox"}),
        ("GeneralizedRCNN", True, {"bbox", "segmentation"}),
        ("PanopticFPN", True, {"bbox", "segmentation", "map"}),  # a subclass of GeneralizedRCNN
        ("SemanticSegmentor", False, {"bbox", "map"}),
        ("SomebodysDetector", False, {"bbox", "map"}),  # may read it
    ],
)
def test_only_what_the_detector_trains_on_is_read(arch, masks, kept):
    row = {"bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 1, 0, 1, 1]], "keypoints": [0, 0, 2]}
    given = [{"file_name": "a.png", "sem_seg_file_name": "map.png", "annotations": [row]}, {"b": 1}]
    cfg = make_cfg(MODEL__META_ARCHITECTURE=arch, MODEL__MASK_ON=masks)
    first, second = without_unused(cfg, given)
    found = set(first["annotations"][0]) | ({"map"} if "sem_seg_file_name" in first else set())
    assert found == kept and second == {"b": 1}
    assert set(row) == {"bbox", "segmentation", "keypoints"} and len(given[0]) == 3


def test_batches_are_the_same_without_what_is_unused(dicts):
    for entry in dicts:
        entry["sem_seg_file_name"] = entry["file_name"] + ".not_there"
    cfg = make_cfg()
    lean = take(cfg, 3)
    for entry in dicts:
        del entry["sem_seg_file_name"]
    assert same(lean, take(cfg, 3, mapper=build_train_mapper(cfg)))
