"""Batches with images without labels: what stays as it was, resuming, and what is refused."""

import itertools

import kd_models
import pytest
import torch
import toy_data
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from PIL import Image

from projects.kd import ConfigError, DataError
from projects.kd.check import check_config
from projects.kd.data.loader import build_train_loader
from projects.kd.data.register import register_configured
from projects.kd.data.unlabelled import check_unlabelled, images_below, scale_unlabelled

NAME = "noise_unlabelled"


@pytest.fixture
def dicts(tmp_path):
    return toy_data.register_noise(tmp_path, NAME)


def make_cfg(labelled=(f"{NAME}[:4]",), unlabelled=(f"{NAME}[4:]",), count=4, **overrides):
    cfg = kd_models.tiny_cfg(
        **{
            "DATASETS__TRAIN": labelled,
            "DATASETS__TEST": (),
            "KD__UNLABELED__DATASETS": unlabelled,
            "KD__UNLABELED__IMAGES_PER_BATCH": count if unlabelled else 0,
            "INPUT__MIN_SIZE_TRAIN": (40, 48),
            "SEED": 7,
            **overrides,
        }
    )
    register_configured(cfg)
    return cfg


def take(cfg, count, start_iter=0):
    return list(itertools.islice(build_train_loader(cfg, start_iter), count))


def same(one, other):
    return one["file_name"] == other["file_name"] and torch.equal(one["image"], other["image"])


def test_unlabelled_images_come_on_top_of_the_same_labelled_ones(dicts):
    plain, mixed = take(make_cfg(unlabelled=()), 6), take(make_cfg(), 6)
    seen = set()
    for alone, batch in zip(plain, mixed, strict=True):
        assert len(batch) == 6
        for one, other in zip(alone, batch[:2], strict=True):
            assert same(one, other) and "unlabeled" not in other
            boxes = (x["instances"].gt_boxes.tensor for x in (one, other))
            assert torch.equal(*boxes)
        for image in batch[2:]:
            assert image["unlabeled"] and not {"instances", "annotations"} & image.keys()
            seen.add(image["image_id"])
    assert seen == set(range(4, 12)), "two passes and a half over the other eight"


def test_a_batch_is_a_function_of_its_place(dicts):
    whole = take(make_cfg(DATALOADER__NUM_WORKERS=2), 6)
    rest = take(make_cfg(), 2, start_iter=4)
    for batch, other in zip(whole[4:], rest, strict=True):
        assert all(same(a, b) for a, b in zip(batch, other, strict=True))


def test_processes_split_both_kinds_alike(dicts, monkeypatch):
    drawn = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        batches = take(make_cfg(DATALOADER__ASPECT_RATIO_GROUPING=False), 2)
        assert all([bool(x.get("unlabeled")) for x in b] == [False, True, True] for b in batches)
        drawn += [x["image_id"] for b in batches for x in b[1:]]
    assert sorted(drawn) == list(range(4, 12)), "one pass, shared"
    with pytest.raises(ConfigError, match=r"KD\.UNLABELED\.IMAGES_PER_BATCH 3 must be divisible"):
        take(make_cfg(count=3), 1)


def test_images_alone_are_the_whole_batch(dicts):
    for batch in take(make_cfg(labelled=()), 2):
        assert len(batch) == 4 and all(image["unlabeled"] for image in batch)


def test_a_folder_of_images(dicts, tmp_path):
    (tmp_path / "inner").mkdir()
    Image.new("RGB", (50, 40), (9, 8, 7)).save(tmp_path / "inner" / "a.JPG", format="JPEG")
    (tmp_path / "notes.txt").write_text("no image")
    found = images_below(str(tmp_path))
    assert len(found) == 13 and found[-1]["image_id"] == "inner/a.JPG"
    assert (found[-1]["width"], found[-1]["height"]) == (50, 40)
    (batch,) = take(make_cfg(unlabelled=(str(tmp_path / "inner"),), count=1), 1)
    assert batch[-1]["file_name"] == str(tmp_path / "inner" / "a.JPG")
    (tmp_path / "inner" / "b.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"b\.png: image cannot be read"):
        images_below(str(tmp_path))
    with pytest.raises(DataError, match="no image"):
        images_below(str(tmp_path / "none"))


def test_parts_keep_what_the_data_set_says_of_its_classes(dicts):
    make_cfg()
    assert MetadataCatalog.get(f"{NAME}[:4]").thing_classes == ["a", "b", "c"]
    assert [x["image_id"] for x in DatasetCatalog.get(f"{NAME}[4:]")] == list(range(4, 12))
    make_cfg(labelled=(f"{NAME}[20:]",))
    with pytest.raises(DataError, match=r"\[20:\]' is empty: '.*' has 12 images"):
        DatasetCatalog.get(f"{NAME}[20:]")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"unlabelled": ("none",)}, r"KD\.UNLABELED\.DATASETS: no data set 'none' .*no such fold"),
        ({"unlabelled": ("none[:2]",)}, r"KD\.UNLABELED\.DATASETS: no data set 'none\[:2\]'"),
        ({"count": 0}, r"KD\.UNLABELED\.IMAGES_PER_BATCH is 0: set both"),
        (
            {"unlabelled": (), "KD__UNLABELED__IMAGES_PER_BATCH": 2},
            r"IMAGES_PER_BATCH is 2 and KD\.UNLABELED\.DATASETS is empty",
        ),
        ({"KD__META_ARCHITECTURE": ""}, r"KD\.UNLABELED\.DATASETS: without a teacher"),
        ({"labelled": (), "unlabelled": ()}, r"DATASETS\.TRAIN is empty"),
        ({"DATASETS__TEST": (f"{NAME}[:4]",)}, r"DATASETS\.TEST: '.*' is a part of a data set"),
        ({"labelled": (), "KD__BALANCE__TARGET": 0.3}, r"KD\.BALANCE .*DATASETS\.TRAIN is empty"),
        ({"labelled": (), "KD__MIMIC__SHARE": 0.3}, r"KD\.BALANCE .*DATASETS\.TRAIN is empty"),
        ({"labelled": (), "TEST__PRECISE_BN__ENABLED": True}, r"TEST\.PRECISE_BN\.ENABLED needs"),
    ],
)
def test_values_that_do_not_fit(dicts, overrides, message):
    values = {"KD__META_ARCHITECTURE": "DistillMetaArch", "KD__HEADS": ("Mimic",), **overrides}
    with pytest.raises(ConfigError, match=message):
        check_config(make_cfg(**values))


def test_the_count_grows_with_the_number_of_processes():
    cfg = kd_models.tiny_cfg(KD__UNLABELED__IMAGES_PER_BATCH=6)
    scaled = cfg.clone()
    scaled.SOLVER.IMS_PER_BATCH = 4
    scaled.freeze()
    found = scale_unlabelled(cfg, scaled)
    assert found.KD.UNLABELED.IMAGES_PER_BATCH == 12 and found.is_frozen()
    assert scale_unlabelled(cfg, cfg) is cfg


def test_nothing_is_said_of_a_config_without_them():
    check_unlabelled(kd_models.tiny_cfg())
