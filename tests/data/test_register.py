"""KD.DATASETS: data sets without Python."""

import json
import os

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
)
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from PIL import Image

from projects.kd import add_kd_config
from projects.kd.data.register import is_configured, keypoint_flip_map, register_configured
from projects.kd.errors import ConfigError, DataError


def config(*entries):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.KD.DATASETS = list(entries)
    return cfg


@pytest.fixture
def data(tmp_path):
    """A folder with ``data.json`` and one image; category ids 7 and 2, in this order."""
    keypoints = ["nose", "left_eye", "right_eye"]
    categories = [
        {"id": 7, "name": "dog", "keypoints": keypoints, "skeleton": [[1, 2], [1, 3]]},
        {"id": 2, "name": "cat", "keypoints": keypoints},
    ]
    annotation = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 30, 20], "iscrowd": 0}
    annotation |= {"keypoints": [5, 6, 2, 0, 0, 0, 9, 9, 1], "num_keypoints": 2, "area": 600}
    images = [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}]
    content = {"images": images, "annotations": [annotation], "categories": categories}
    (tmp_path / "data.json").write_text(json.dumps(content))
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg")
    return tmp_path


def test_names_keypoints_and_skeleton_come_from_the_json(data):
    register_configured(config(["reg_full", str(data / "data.json"), str(data)]))
    metadata = MetadataCatalog.get("reg_full")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 7: 1}
    assert metadata.keypoint_names == ["nose", "left_eye", "right_eye"]
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]
    rules = metadata.keypoint_connection_rules
    assert [rule[:2] for rule in rules] == [("nose", "left_eye"), ("nose", "right_eye")]
    assert metadata.evaluator_type == "coco" and is_configured("reg_full")
    (entry,) = get_detection_dataset_dicts(["reg_full"], min_keypoints=1)
    assert entry["file_name"] == str(data / "a.jpg")
    assert entry["annotations"][0]["category_id"] == 1
    assert entry["annotations"][0]["keypoints"][:3] == [5.5, 6.5, 2]
    assert list(create_keypoint_hflip_indices(["reg_full"])) == [0, 2, 1]


def test_twice_is_once_and_another_definition_is_refused(data, tmp_path):
    entry = ["reg_twice", str(data / "data.json"), str(data)]
    register_configured(config(entry))
    register_configured(config(entry))
    assert DatasetCatalog.list().count("reg_twice") == 1
    with pytest.raises(ConfigError, match="KD.DATASETS: 'reg_twice' is registered with"):
        register_configured(config([entry[0], entry[1], str(tmp_path / "elsewhere")]))
    for name in ("coco_2017_val", "shapes_train"):
        with pytest.raises(ConfigError, match=f"KD.DATASETS: '{name}' is an existing data set"):
            register_configured(config([name, *entry[1:]]))


def test_relative_home_and_variable_paths(data, monkeypatch):
    monkeypatch.chdir(data)
    monkeypatch.setenv("HOME", str(data))
    monkeypatch.setenv("MY_DATA", str(data))
    for name, prefix in (("rel", "."), ("home", "~"), ("var", "$MY_DATA"), ("var2", "${MY_DATA}")):
        register_configured(config([f"reg_{name}", f"{prefix}/data.json", prefix]))
        monkeypatch.chdir("/")  # what was registered does not move with the working directory
        (entry,) = DatasetCatalog.get(f"reg_{name}")
        assert os.path.isfile(entry["file_name"])
        monkeypatch.chdir(data)


@pytest.mark.parametrize(
    "entry", ["name", ["a", "b"], ["a", "b", "c", "d", "e"], ["a", 1, "c"], ["", "b", "c"]]
)
def test_malformed_entries(entry):
    with pytest.raises(ConfigError, match="KD.DATASETS: .* is not .name, json file, image folder"):
        register_configured(config(entry))


def test_broken_files_leave_nothing_registered(data):
    with pytest.raises(ConfigError, match="KD.DATASETS: 'reg_none': there is no annotation file"):
        register_configured(config(["reg_none", str(data / "none.json"), str(data)]))
    (data / "broken.json").write_text('{"images": [')
    with pytest.raises(DataError, match="broken.json: is not JSON"):
        register_configured(config(["reg_none", str(data / "broken.json"), str(data)]))
    assert "reg_none" not in DatasetCatalog.list() and not is_configured("reg_none")


def test_missing_image_is_found_when_the_data_are_loaded(data):
    register_configured(config(["reg_lost", str(data / "data.json"), str(data / "lost")]))
    with pytest.raises(DataError, match=r"data.json: image 1 is missing: no file .*lost.a\.jpg"):
        DatasetCatalog.get("reg_lost")


def test_flip_map_equals_detectron2s_for_coco():
    assert tuple(keypoint_flip_map(COCO_PERSON_KEYPOINT_NAMES)) == COCO_PERSON_KEYPOINT_FLIP_MAP


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["L-hip", "R-hip", "tail"], [("L-hip", "R-hip")]),
        (["eye_l", "eye_r", "lip"], [("eye_l", "eye_r")]),
        (["frontLeft", "frontRight"], [("frontLeft", "frontRight")]),
        (["LEFT_WHEEL", "RIGHT_WHEEL"], [("LEFT_WHEEL", "RIGHT_WHEEL")]),
        (["left", "top"], []),
        (["wheel", "pedal"], []),
    ],
)
def test_left_and_right_names(names, pairs):
    assert keypoint_flip_map(names) == pairs


def test_categories_that_disagree_on_keypoints_are_said(data, caplog):
    content = json.loads((data / "data.json").read_text())
    content["categories"][1]["keypoints"] = ["hood", "left_eye", "right_eye"]
    (data / "mixed.json").write_text(json.dumps(content))
    register_configured(config(["reg_mixed", str(data / "mixed.json"), str(data)]))
    assert "keypoints are not registered" in caplog.text
    assert MetadataCatalog.get("reg_mixed").get("keypoint_names") is None


def test_the_evaluator_of_an_entry_can_be_chosen(data):
    entry = ["reg_eval", str(data / "data.json"), str(data), "visdrone"]
    register_configured(config(entry))
    assert MetadataCatalog.get("reg_eval").evaluator_type == "visdrone"
    register_configured(config(entry))
    with pytest.raises(ConfigError, match="'reg_eval' is registered with .* and visdrone already"):
        register_configured(config(entry[:3]))
    for wrong in ([*entry, "more"], [*entry[:3], 5]):
        with pytest.raises(ConfigError, match="with evaluator_type as a fourth value"):
            register_configured(config(wrong))
