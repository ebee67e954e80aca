"""Images are looked at before a run: random breakage is one line, legal sets pass."""

import json
import os
import random
import time

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from projects.kd.config import add_kd_config, get_cfg
from projects.kd.data import image_check
from projects.kd.data.image_check import check_images, images_of, look_at
from projects.kd.data.mapper import build_train_mapper
from projects.kd.data.register import register_configured
from projects.kd.errors import ConfigError, DataError


def make_cfg(folder, train, val=(), **overrides):
    """Two registered sets of (file name, width, height), from files that the test has written."""
    cfg = get_cfg()
    add_kd_config(cfg)
    name = f"{folder.parent.name}_{folder.name}"
    cfg.KD.DATASETS = []
    for split, rows in (("train", train), ("val", val)):
        content = {
            "images": [
                {"id": i, "file_name": file, "width": width, "height": height}
                for i, (file, width, height) in enumerate(rows)
            ],
            "categories": [{"id": 1, "name": "thing"}],
            "annotations": [],
        }
        (folder / f"{split}.json").write_text(json.dumps(content))
        cfg.KD.DATASETS.append([f"{name}_{split}", str(folder / f"{split}.json"), str(folder)])
    cfg.DATASETS.TRAIN = (f"{name}_train",)
    cfg.DATASETS.TEST = (f"{name}_val",) if val else ()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (40,), 60
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 40, 60
    for key, value in overrides.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    register_configured(cfg)
    return cfg


def write(path, width, height, orientation=1):
    exif = Image.Exif()
    exif[274] = orientation
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    return path.name


BREAKAGE = {
    "missing": (lambda path: path.unlink(), "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "in no format"),
    "text": (lambda path: path.write_text("404 Not Found"), "in no format"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:400]), "(?i)truncated|in no format"),
    "size": (lambda path: write(path, 31, 29), "has 31x29 pixels, its annotations say"),
    "turned": (lambda path: write(path, 33, 27, 6), "EXIF orientation 6 turns it"),
    "deep": (
        lambda path: cv2.imwrite(str(path), np.zeros((27, 33), np.uint16)),
        "has mode I;16 .*INPUT.WHITE",
    ),
}


@pytest.mark.parametrize("seed", range(25))
def test_random_breakage_is_one_line_that_names_the_first_image(tmp_path, seed):
    rng = random.Random(seed)
    count = rng.randint(2, 40)
    names = [write(tmp_path / f"{i}.{rng.choice(['png', 'jpg'])}", 33, 27) for i in range(count)]
    cut = rng.randint(1, count - 1)
    rows = [(name, 33, 27) for name in names]
    cfg = make_cfg(tmp_path, rows[:cut], rows[cut:])
    check_images(cfg, training=True)
    kind = rng.choice(sorted(BREAKAGE))
    broken = sorted(rng.sample(range(count), rng.randint(1, count)))
    for i in broken:
        if kind == "deep":
            names[i] = os.path.splitext(names[i])[0] + ".png"
            rows[i] = (names[i], 33, 27)
        BREAKAGE[kind][0](tmp_path / names[i])
    folder = tmp_path / "again"
    folder.mkdir()
    for name in names:
        if (tmp_path / name).exists():
            os.link(tmp_path / name, folder / name)
    cfg = make_cfg(folder, rows[:cut], rows[cut:])
    with pytest.raises(DataError, match=BREAKAGE[kind][1]) as error:
        check_images(cfg, training=True)
    line = str(error.value)
    assert line.startswith(str(folder / names[broken[0]])) and "\n" not in line
    more = f"and {len(broken) - 1} more of {count} images"
    assert (more in line) == (len(broken) > 1)
    if all(i < cut for i in broken):  # evaluation alone does not need them
        check_images(cfg, training=False)


@pytest.mark.parametrize("seed", range(10))
def test_what_passes_can_be_drawn(tmp_path, seed):
    rng = random.Random(seed)
    rows = []
    for i in range(8):
        width, height = rng.choice([1, 2, 9, 50, 300]), rng.choice([1, 2, 9, 50, 300])
        orientation = rng.choice([1, 3, 6, 8])
        name = write(
            tmp_path / f"{i}.{rng.choice(['png', 'jpg', 'tif'])}", width, height, orientation
        )
        rows.append((name, *((height, width) if orientation > 4 else (width, height))))
    good = []
    for i, row in enumerate(rows):
        folder = tmp_path / str(i)
        folder.mkdir()
        os.link(tmp_path / row[0], folder / row[0])
        cfg = make_cfg(folder, [row])
        mapper = build_train_mapper(cfg)
        entry = {**DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[0], "annotations": []}
        try:
            check_images(cfg, training=True)
        except DataError as error:
            assert "is too thin for INPUT.MIN_SIZE_TRAIN 40" in str(error)
            with pytest.raises(DataError, match="cannot be resized"):
                mapper(entry)
        else:
            good.append(row)
            assert min(mapper(entry)["image"].shape) > 0
    assert good


def test_orientations_are_said_once(tmp_path, caplog):
    rows = [(write(tmp_path / f"{i}.jpg", 30, 20, 3), 30, 20) for i in range(3)]
    rows.append((write(tmp_path / "plain.jpg", 30, 20), 30, 20))
    with caplog.at_level("WARNING", logger=image_check.__name__):
        check_images(make_cfg(tmp_path, rows), training=True)
    (record,) = caplog.records
    assert record.getMessage().startswith("3 of 4 images are turned by their EXIF orientation")
    assert record.getMessage().endswith("0.jpg")


def test_sixteen_bits_pass_with_white(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 30), np.uint16))
    cfg = make_cfg(tmp_path, [("a.png", 30, 20)])
    with pytest.raises(DataError, match="INPUT.WHITE"):
        check_images(cfg, training=True)
    cfg.INPUT.WHITE = 4095.0
    check_images(cfg, training=True)


def test_the_time_is_bounded_and_what_is_left_is_said(tmp_path, caplog, monkeypatch):
    rows = [(write(tmp_path / f"{i}.png", 30, 20), 30, 20) for i in range(40)]
    cfg = make_cfg(tmp_path, rows)
    plain = image_check.find_problem
    monkeypatch.setattr(image_check, "find_problem", lambda *x: time.sleep(0.05) or plain(*x))
    monkeypatch.setattr(image_check, "THREADS", 1)
    cfg.DATALOADER.IMAGE_CHECK_SECONDS = 0.3
    with caplog.at_level("WARNING", logger=image_check.__name__):
        check_images(cfg, training=True)
    assert "of 40 images were not looked at" in caplog.records[-1].getMessage()
    cfg.DATALOADER.IMAGE_CHECK_SECONDS = 0.0
    (tmp_path / "0.png").unlink()
    check_images(cfg, training=True)
    cfg.DATALOADER.IMAGE_CHECK_SECONDS = -1.0
    with pytest.raises(ConfigError, match="^DATALOADER.IMAGE_CHECK_SECONDS"):
        check_images(cfg, training=True)


def test_findings_come_in_the_order_of_the_files():
    files = list(range(500))
    assert look_at(files, lambda x: time.sleep(0.001 * (x % 7)) or x, 60.0) == files


def test_label_maps_and_data_sets_of_others(tmp_path):
    name = f"{tmp_path.name}_others"
    write(tmp_path / "a.png", 30, 20)
    entry = {"file_name": str(tmp_path / "a.png"), "sem_seg_file_name": str(tmp_path / "l.png")}
    DatasetCatalog.register(name, lambda: [entry])
    try:
        cfg = get_cfg()
        add_kd_config(cfg)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), (name,)
        (file,) = images_of(cfg, training=True)
        assert file.size is None and [key for key, *_ in file.resizes] == ["TRAIN", "TEST"]
        for image, message in (
            (None, "l.png: image cannot be read: No such file"),
            (Image.new("RGB", (30, 20)), "l.png: label map has mode RGB"),
            (Image.new("L", (30, 21)), "l.png: the label map has 30x21 pixels, its image .*30x20"),
        ):
            if image is not None:
                image.save(tmp_path / "l.png")
            with pytest.raises(DataError, match=message):
                check_images(cfg, training=True)
        Image.new("P", (30, 20)).save(tmp_path / "l.png")
        check_images(cfg, training=True)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
