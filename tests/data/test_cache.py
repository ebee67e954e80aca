"""DATALOADER.CACHE: the same examples to the bit, from memory or a file, within its bound."""

import itertools
import logging
import os
import shutil

import kd_models
import numpy as np
import pytest
import torch
import toy_data

from projects.kd import ConfigError
from projects.kd.config.key_checks import check_each
from projects.kd.data import cache, images
from projects.kd.data import mapper as mapping
from projects.kd.data.cache import ImageStore
from projects.kd.data.loader import build_train_loader

NAME = "noise_cache"


@pytest.fixture
def dicts(tmp_path):
    return toy_data.register_noise(tmp_path, NAME)


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were read, in this process."""
    names = []

    def watched(path, *args):
        names.append(os.path.basename(path))
        return images.read_image(path, *args)

    monkeypatch.setattr(mapping, "read_image", watched)
    return names


def make_cfg(tmp_path, **overrides):
    return kd_models.tiny_cfg(
        **{
            "DATASETS__TRAIN": (NAME,),
            "INPUT__MIN_SIZE_TRAIN": (40,),
            "INPUT__MAX_SIZE_TRAIN": 96,
            "OUTPUT_DIR": str(tmp_path / "out"),
            "SEED": 7,
            **overrides,
        }
    )


def take(cfg, count=14):
    return [x for batch in itertools.islice(build_train_loader(cfg), count) for x in batch]


def lines_of(caplog):
    return [x for x in caplog.messages if x.startswith("DATALOADER.CACHE")]


def names(examples):
    return [os.path.basename(x["file_name"]) for x in examples]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key == "instances":
                assert torch.equal(a[key].gt_boxes.tensor, b[key].gt_boxes.tensor)
            elif isinstance(a[key], torch.Tensor):
                assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key
            else:
                assert a[key] == b[key], key


VARIANTS = {
    "one size": {},
    "sizes drawn": {"INPUT__MIN_SIZE_TRAIN": (40, 48, 56)},
    "crop first": {
        "INPUT__CROP__ENABLED": True,
        "INPUT__CROP__TYPE": "relative_range",
        "INPUT__CROP__SIZE": [0.6, 0.6],
    },
    "no resize": {"INPUT__MIN_SIZE_TRAIN": (0,)},
    "teacher of twice the size": {
        "KD__META_ARCHITECTURE": "DistillMetaArch",
        "KD__TEACHER__INPUT_SCALE": 2.0,
    },
    "grey": {
        "INPUT__FORMAT": "L",
        "MODEL__PIXEL_MEAN": [100.0],
        "MODEL__PIXEL_STD": [50.0],
    },
    "floats": {"INPUT__FORMAT": "YUV-BT.601"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_examples_are_the_same_to_the_bit_and_each_file_is_read_once(
    dicts, tmp_path, variant, read
):
    plain = take(make_cfg(tmp_path, **VARIANTS[variant]))
    assert len(read) == 28
    for kind in ("ram", "disk"):
        read.clear()
        cfg = make_cfg(tmp_path, DATALOADER__CACHE=kind, **VARIANTS[variant])
        assert_same(take(cfg), plain)
        assert sorted(read) == sorted(set(names(plain)))
    assert not os.listdir(tmp_path / "out"), "the file of pixels has no name"


def test_workers_fill_one_store_and_give_the_same(dicts, tmp_path):
    plain = take(make_cfg(tmp_path))
    stores = []
    cfg = make_cfg(tmp_path, DATALOADER__CACHE="ram", DATALOADER__NUM_WORKERS=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cache, "ImageStore", lambda *args: stores.append(ImageStore(*args)) or stores[-1]
        )
        assert_same(take(cfg), plain)
    (store,) = stores
    # this process has read nothing: the workers have; two may have read one image at once
    number, used = store.kept()
    assert number == 12 and used <= store.capacity
    shapes = {tuple(store.get(slot).shape) for slot in range(12)}
    assert shapes == {(40, 53, 3), (53, 40, 3)}
    assert {store.size(slot) for slot in range(12)} == {(48, 64), (64, 48)}


def test_what_does_not_fit_is_read_each_time(dicts, tmp_path, monkeypatch, caplog, read):
    plain = take(make_cfg(tmp_path))
    read.clear()
    monkeypatch.setattr(cache, "_MIB", 16000)  # the 12 resized images take 12 * 6360 bytes
    cfg = make_cfg(tmp_path, DATALOADER__CACHE="ram", DATALOADER__CACHE_MB=2)
    with caplog.at_level(logging.INFO, logger=cache.__name__):
        assert_same(take(cfg), plain)
    (line,) = lines_of(caplog)
    assert "12 resized images" in line and "the rest is read each time" in line
    # there is room for five; the others are read each time
    first = list(dict.fromkeys(names(plain)))[:5]
    assert len(read) == 5 + sum(name not in first for name in names(plain))


def test_more_than_there_is_memory_or_disk_is_one_line(dicts, tmp_path, monkeypatch, caplog, read):
    plain = take(make_cfg(tmp_path))
    monkeypatch.setattr(cache, "free_memory", lambda: 1000)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    for kind, what in (("ram", "memory"), ("disk", "disk")):
        read.clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, logger=cache.__name__):
            assert_same(take(make_cfg(tmp_path, DATALOADER__CACHE=kind)), plain)
        (line,) = lines_of(caplog)
        assert line.startswith(f"DATALOADER.CACHE {kind}: ") and f"MiB of {what} are free" in line
        assert len(read) == 28


def test_a_disk_that_fills_up_is_one_line(tmp_path, monkeypatch, caplog):
    store = ImageStore(3, 10_000, str(tmp_path))
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    store.put(0, pixels, (8, 10))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for slot in (1, 2):
        store.put(slot, pixels, (8, 10))
    (line,) = lines_of(caplog)
    assert "No space left" in line
    assert store.get(1) is None and store.size(2) is None
    assert np.array_equal(store.get(0), pixels) and store.size(0) == (8, 10)


@pytest.mark.parametrize("folder", [False, True])
def test_a_store_gives_copies_of_what_was_put_first(tmp_path, folder):
    store = ImageStore(3, 1000, str(tmp_path) if folder else "")
    random = np.random.RandomState(0)
    first = random.randint(0, 255, (5, 7, 3)).astype(np.uint8)
    floats = random.rand(4, 3, 3).astype(np.float32)
    store.put(2, first, (50, 70))
    store.put(0, floats, (4, 3))
    store.put(2, first + 1, (1, 1))
    store.get(2)[:] = 0
    assert np.array_equal(store.get(2), first) and store.size(2) == (50, 70)
    assert store.get(0).dtype == np.float32 and np.array_equal(store.get(0), floats)
    assert store.get(1) is None and store.kept()[0] == 2
    store.put(1, np.zeros((20, 20, 3), np.uint8), (20, 20))  # no room
    assert store.get(1) is None
    store.put(1, np.zeros((2, 2, 3)), (2, 2))  # float64 is nothing that images have
    assert store.get(1) is None


def test_a_mapper_that_reads_by_itself_is_told(dicts, tmp_path, caplog):
    cfg = make_cfg(tmp_path, DATALOADER__CACHE="ram")
    seen = []
    loader = build_train_loader(cfg, mapper=lambda image: seen.append(image) or image)
    next(iter(loader))
    assert "DATALOADER.CACHE ram: without effect" in caplog.text
    assert seen and not any(cache.SLOT in image for image in seen)


def test_wrong_values_name_the_key(tmp_path):
    for key, value in (("CACHE", "memory"), ("CACHE_MB", 0)):
        cfg = make_cfg(tmp_path)
        cfg.DATALOADER[key] = value
        with pytest.raises(ConfigError, match=rf"DATALOADER\.{key} is "):
            check_each(cfg)


def test_free_memory_is_that_of_this_machine():
    free = cache.free_memory()
    assert free is None or 2**20 < free < 2**50
