"""Conversion of VisDrone by the script, and the registered data sets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from projects.kd import check_config
from projects.kd.commands.convert import visdrone as tool
from projects.kd.config import add_kd_config, get_cfg
from projects.kd.data import visdrone
from projects.kd.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "convert.py"


def add_image(split, stem, text, size=(60, 40), seed=0):
    for kind in ("images", "annotations"):
        (split / kind).mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(split / "images" / f"{stem}.jpg", quality=100)
    if text is not None:
        (split / "annotations" / f"{stem}.txt").write_bytes(text.encode())


# --- the script ----------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """A training split with something of everything."""
    split = tmp_path / "VisDrone2019-DET-train"
    add_image(
        split, "b", "1,2,30,20,1,4,0,0\n0,0,10,10,0,0,0,0\n9,9,5,5,0,3,1,1\n40,30,9,9,0,11,0,0\n"
    )
    add_image(split, "a", "50,30,20,20,1,1,0,0,\r\n1,1,0,5,1,1,0,0\n", seed=1)
    add_image(split, "c", "", seed=2)
    add_image(split, "lonely", None)
    (split / "annotations" / "ghost.txt").write_text("1,2,30,20,1,4,0,0\n")
    return tmp_path


def run(root, *words):
    tool.main(tool.parse_arguments(["--root", str(root), "--jobs", "1", *words]))


def test_conversion(root, capsys):
    run(root, "--crops")
    text = capsys.readouterr().out
    content = json.loads((root / "annotations" / "visdrone_train.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [image["id"] for image in content["images"]] == [1, 2, 3]
    shown = [(a["id"], a["image_id"], a["bbox"], a["iscrowd"]) for a in content["annotations"]]
    assert shown == [
        (1, 1, [50, 30, 10, 10], 0),
        (2, 2, [1, 2, 30, 20], 0),
        (3, 2, [9, 9, 5, 5], 1),
    ]
    assert content["images"][1]["ignored_regions"] == [[0, 0, 10, 10]]
    info = content["info"]
    assert (info["images"], info["images without boxes"], info["boxes"]) == (3, 1, 2)
    assert (info["ignored regions"], info["ignored objects"], info["others"]) == (1, 1, 1)
    assert info["boxes by class"]["car"] == info["boxes by class"]["pedestrian"] == 1
    assert info["problems"] == {
        visdrone.TRAILING_COMMA: 1,
        visdrone.WINDOWS: 1,
        visdrone.NO_SIZE: 1,
        visdrone.CLIPPED: 1,
        tool.NO_ANNOTATION: 1,
        tool.NO_IMAGE: 1,
    }
    for problem in info["problems"]:
        assert problem in text
    assert "lonely.jpg" in text and "ghost.txt" in text

    crops = json.loads((root / "annotations" / "visdrone_train_crops.json").read_text())
    assert len(crops["images"]) == 12
    whole = np.array(Image.open(root / "VisDrone2019-DET-train" / "images" / "b.jpg")).astype(int)
    for number, (rows, columns) in enumerate(
        [(slice(0, 20), slice(0, 30)), (slice(0, 20), slice(30, 60))]
    ):
        crop = np.array(Image.open(root / "train_crops" / f"b_{number}.jpg")).astype(int)
        assert crop.shape == (20, 30, 3)
        other = np.abs(crop - np.roll(whole, 7, 1)[rows, columns]).mean()
        assert np.abs(crop - whole[rows, columns]).mean() < 0.5 * other


def test_a_second_run_changes_nothing_and_new_sources_count(root, capsys):
    run(root, "--crops")
    files = [p for p in sorted(root.rglob("*")) if p.is_file()]
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}
    run(root, "--crops")
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files} == before
    assert capsys.readouterr().out.count("up to date") == 2
    run(root, "--crops", "--force")
    assert {p: p.read_bytes() for p in files} == {p: content for p, (_, content) in before.items()}
    add_image(root / "VisDrone2019-DET-train", "d", "1,1,5,5,1,1,0,0\n")
    run(root, "--crops")
    crops = json.loads((root / "annotations" / "visdrone_train_crops.json").read_text())
    assert len(crops["images"]) == 16
    assert sorted(root.rglob("*tmp*")) == sorted(root.rglob("*unfinished*")) == []


def test_several_processes_write_the_same_bytes(root):
    run(root)
    path = root / "annotations" / "visdrone_train.json"
    first = path.read_bytes()
    tool.main(tool.parse_arguments(["--root", str(root), "--jobs", "2", "--force"]))
    assert path.read_bytes() == first


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_unreadable_image_leaves_nothing_behind(root, jobs):
    (root / "VisDrone2019-DET-train" / "images" / "c.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"c\.jpg: image cannot be read"):
        tool.main(tool.parse_arguments(["--root", str(root), "--jobs", jobs, "--crops"]))
    assert not (root / "annotations").exists() and not (root / "train_crops").exists()


def test_a_truncated_image_leaves_no_crops(root):
    run(root, "--crops")
    path = root / "VisDrone2019-DET-train" / "images" / "c.jpg"
    path.write_bytes(path.read_bytes()[:900])
    before = (root / "annotations" / "visdrone_train_crops.json").read_bytes()
    with pytest.raises(DataError, match=r"c\.jpg: image cannot be read: image file is truncated"):
        run(root, "--crops")
    assert (root / "annotations" / "visdrone_train_crops.json").read_bytes() == before
    assert len(list((root / "train_crops").iterdir())) == 12


def test_user_errors(tmp_path, root):
    with pytest.raises(ConfigError, match="--root: .* holds none of VisDrone2019-DET-train"):
        run(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="VisDrone2019-DET-val/images: no such folder"):
        run(root, "--splits", "val")
    with pytest.raises(ConfigError, match="--crops: it is made of the train split"):
        run(root, "--splits", "val", "--crops")
    for path in (root / "VisDrone2019-DET-train" / "annotations").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no image has an annotation file of its name"):
        run(root)
    command = [sys.executable, str(TOOL), "visdrone", "--root", str(tmp_path / "elsewhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: --root")


# --- registration --------------------------------------------------------------------------------


def test_the_splits_are_registered():
    folders = {
        "train": "VisDrone2019-DET-train/images",
        "val": "VisDrone2019-DET-val/images",
        "test_dev": "VisDrone2019-DET-test-dev/images",
        "train_crops": "train_crops",
    }
    for split, folder in folders.items():
        metadata = MetadataCatalog.get(f"visdrone_{split}")
        assert f"visdrone_{split}" in DatasetCatalog.list()
        assert metadata.evaluator_type == "visdrone"
        assert metadata.json_file.endswith(f"visdrone/annotations/visdrone_{split}.json")
        assert metadata.image_root.endswith(os.path.join("visdrone", folder))
        assert len(metadata.thing_classes) == 10 and metadata.thing_classes[3] == "car"


def test_registered_data_follow_the_environment_and_load(root, monkeypatch):
    (root / "data").mkdir()
    root.rename(root.parent / "moved")
    (root.parent / "all").mkdir()
    (root.parent / "moved").rename(root.parent / "all" / "visdrone")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root.parent / "all"))
    tool.main(tool.parse_arguments(["--jobs", "1", "--crops"]))
    for split, images in (("train", 3), ("train_crops", 12)):
        name = f"visdrone_test_{split}"
        visdrone.register_visdrone_data(
            name, visdrone.json_path(split), visdrone.image_folder(split)
        )
        dicts = DatasetCatalog.get(name)
        assert len(dicts) == images
        if split == "train":
            # the region, and the object of score 0
            assert dicts[1]["ignored_regions"] == [[0, 0, 10, 10], [9, 9, 5, 5]]
            assert [a["category_id"] for a in dicts[1]["annotations"]] == [3, 2]
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_missing_files_name_the_script():
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES = 10
    cfg.DATASETS.TEST = ("visdrone_test_missing",)
    visdrone.register_visdrone_data("visdrone_test_missing", "/nowhere/a.json", "/nowhere")
    with pytest.raises(ConfigError, match="make it with kd-convert visdrone, or set"):
        check_config(cfg, training=False)
