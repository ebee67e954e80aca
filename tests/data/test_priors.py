"""Class frequencies and box sizes of a data set, and the file that keeps them."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from projects.kd.data.priors import box_moments, dataset_priors, uniform_priors
from projects.kd.data.register import register_coco_data
from projects.kd.errors import ConfigError, DataError

NAME = "priors_test"


@pytest.fixture
def data(tmp_path):
    """A function that writes a COCO file with boxes (image, category, XYWH) and registers it."""

    def write(boxes, sizes=((100, 200), (50, 50)), **extra):
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": w, "height": h}
                for i, (w, h) in enumerate(sizes, start=1)
            ],
            "categories": [{"id": i, "name": f"c{i}"} for i in (3, 5, 9)],
            "annotations": [
                {"id": i, "image_id": image, "category_id": of, "bbox": box, "area": 1, **extra}
                for i, (image, of, box) in enumerate(boxes, start=1)
            ],
        }
        for image in content["images"]:
            (tmp_path / image["file_name"]).touch()
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(content))
        if NAME not in DatasetCatalog:
            register_coco_data(NAME, str(path), str(tmp_path))
        return path

    yield write
    if NAME in DatasetCatalog:
        from projects.kd.data import register

        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
        del register._configured[NAME]


BOXES = [
    (1, 3, [0, 0, 20, 20]),  # 0.2 x 0.1
    (1, 3, [10, 10, 40, 60]),  # 0.4 x 0.3
    (2, 3, [0, 0, 15, 10]),  # 0.3 x 0.2
    (2, 9, [5, 5, 25, 40]),  # 0.5 x 0.8
]


def test_statistics_of_every_class(data, tmp_path):
    data(BOXES)
    found = dataset_priors([NAME], 3, str(tmp_path / "cache"))
    np.testing.assert_allclose(found.frequency, [0.75, 0, 0.25])
    np.testing.assert_allclose(found.mean[0], [0.3, 0.2])
    np.testing.assert_allclose(found.std[0], [np.std([0.2, 0.4, 0.3]), np.std([0.1, 0.3, 0.2])])
    np.testing.assert_allclose(found.mean[2], [0.5, 0.8])
    np.testing.assert_allclose(found.std[2], [0, 0], atol=1e-7)
    # the class without boxes: the sizes of all boxes
    np.testing.assert_allclose(found.mean[1], [np.mean([0.2, 0.4, 0.3, 0.5]), 0.35])
    np.testing.assert_allclose(
        found.std[1], np.std([[0.2, 0.1], [0.4, 0.3], [0.3, 0.2], [0.5, 0.8]], axis=0)
    )


def test_crowds_are_left_out(data, tmp_path):
    data(BOXES, iscrowd=1)
    with pytest.raises(DataError, match=f"DATASETS.TRAIN: {NAME} holds no boxes"):
        dataset_priors([NAME], 3, str(tmp_path / "cache"))


def test_box_modes_and_sizes_are_understood():
    entry = {"width": 100, "height": 50, "file_name": "a"}
    annotations = [
        {"category_id": 1, "bbox": [10, 10, 30, 20], "bbox_mode": BoxMode.XYXY_ABS},
        {"category_id": 1, "bbox": [10, 10, 20, 10], "bbox_mode": BoxMode.XYWH_ABS},
        {"category_id": 0, "bbox": [10, 10, 10, 20], "bbox_mode": BoxMode.XYXY_ABS},  # no area
    ]
    moments = box_moments("toy", [{**entry, "annotations": annotations}, entry])
    np.testing.assert_allclose(moments, [[0] * 5, [2, 0.4, 0.4, 0.08, 0.08]])
    del entry["height"]
    with pytest.raises(DataError, match="'toy' gives no width and height of a"):
        box_moments("toy", [{**entry, "annotations": annotations}])


def test_measured_once(data, tmp_path, caplog, monkeypatch):
    data(BOXES)
    folder = str(tmp_path / "cache")
    first = dataset_priors([NAME], 3, folder)
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: pytest.fail("measured again"))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        second = dataset_priors([NAME], 3, folder)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not caplog.records


@pytest.mark.parametrize("spoil", ["other annotations", "torn file", "other version"])
def test_a_file_that_does_not_belong_is_rebuilt_with_one_line(data, tmp_path, caplog, spoil):
    data(BOXES[:1])
    folder = tmp_path / "cache"
    dataset_priors([NAME], 3, str(folder))
    (path,) = folder.iterdir()
    data(BOXES)
    if spoil != "other annotations":
        dataset_priors([NAME], 3, str(folder))
        content = path.read_text()
        path.write_text(content[:20] if spoil == "torn file" else content.replace("1,", "0,", 1))
        caplog.clear()
    with caplog.at_level(logging.INFO, logger="projects.kd.data.priors"):
        found = dataset_priors([NAME], 3, str(folder))
    lines = [r.getMessage() for r in caplog.records if r.name == "projects.kd.data.priors"]
    assert len(lines) == 1 and "measuring again" in lines[0] and str(path) in lines[0]
    np.testing.assert_allclose(found.frequency, [0.75, 0, 0.25])
    caplog.clear()
    dataset_priors([NAME], 3, str(folder))
    assert not [r for r in caplog.records if r.name == "projects.kd.data.priors"]
    assert list(folder.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_costs_a_line(data, tmp_path, caplog):
    data(BOXES)
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        found = dataset_priors([NAME], 3, str(tmp_path / "file"))
    assert found.frequency[0] == 0.75
    assert sum("cannot be written" in r.getMessage() for r in caplog.records) == 1


def test_the_default_folder_lies_beside_the_data(data, tmp_path, monkeypatch):
    data(BOXES)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "all"))
    dataset_priors([NAME], 3)
    assert (tmp_path / "all" / "icd_priors" / f"{NAME}.json").is_file()


def test_several_data_sets_are_one(data, tmp_path):
    data(BOXES)
    once, twice = (dataset_priors(names, 3, str(tmp_path)) for names in ([NAME], [NAME] * 2))
    for one, other in zip(once, twice, strict=True):
        np.testing.assert_allclose(one, other)


def test_too_few_classes_are_refused(data, tmp_path):
    data(BOXES)
    with pytest.raises(ConfigError, match="has boxes of class 2 .* set to 2 classes"):
        dataset_priors([NAME], 2, str(tmp_path))


def test_data_that_cannot_be_loaded(monkeypatch, tmp_path):
    def missing(name):
        raise FileNotFoundError("nowhere.json")

    monkeypatch.setattr(DatasetCatalog, "get", missing)
    with pytest.raises(ConfigError, match=f"DATASETS.TRAIN: '{NAME}' cannot be loaded.*uniform"):
        dataset_priors([NAME], 3, str(tmp_path))


def test_uniform_rule():
    found = uniform_priors(4)
    assert found.frequency.tolist() == [0.25] * 4
    assert found.mean.tolist() == found.std.tolist() == [[0.2, 0.2]] * 4
