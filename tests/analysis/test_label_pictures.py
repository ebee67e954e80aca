"""Pictures of a comparison of segmentation networks."""

import json

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as mask_util

from projects.kd.analysis import pictures


@pytest.fixture
def dataset(tmp_path):
    name = "label_pictures_toy"
    records = []
    for i in range(3):
        labels = np.zeros((20, 30), np.uint8)
        labels[5:, : 10 * i] = 1
        labels[:, 25:] = 255
        record = {"file_name": str(tmp_path / f"{i}.jpg"), "sem_seg_file_name": ""}
        record["sem_seg_file_name"] = str(tmp_path / f"{i}.png")
        cv2.imwrite(record["file_name"], np.full((20, 30, 3), 40 * i, np.uint8))
        cv2.imwrite(record["sem_seg_file_name"], labels)
        records.append(record)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(stuff_classes=["a", "b"], ignore_label=255)
    yield name, records
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def write_predictions(path, records, label):
    items = []
    for record in records:
        mask = mask_util.encode(np.ones((20, 30), np.uint8, order="F"))
        mask["counts"] = mask["counts"].decode()
        items.append({"file_name": record["file_name"], "category_id": label, "segmentation": mask})
    path.write_text(json.dumps(items))
    return str(path)


def test_label_maps_beside_each_other(dataset, tmp_path, monkeypatch):
    name, records = dataset
    shown = []
    own = pictures._coloured

    def coloured(labels, *args):
        shown.append(labels.copy())
        return own(labels, *args)

    monkeypatch.setattr(pictures, "_coloured", coloured)
    files = {"plain": write_predictions(tmp_path / "p.json", records, 0)}
    files["AT"] = write_predictions(tmp_path / "a.json", records, 1)
    path = tmp_path / "maps.png"
    pictures.label_maps_side_by_side(name, files, str(path), num_images=2)
    assert cv2.imread(str(path)).std() > 10
    assert len(shown) == 6  # two lines of a label map and two predictions
    for truth, plain, at in (shown[:3], shown[3:]):
        assert len(np.unique(truth)) >= 2 and not plain.any() and (at == 1).all()


def test_ignored_pixels_are_black():
    picture = pictures._coloured(np.array([[0, 1, 255]], np.uint8), 2, 255)
    assert picture[0, 0].any() and picture[0, 1].any() and not picture[0, 2].any()


def test_cost_plot(tmp_path):
    path = tmp_path / "cost.png"
    pictures.cost_scatter({"plain": (1.0, 40.0), "AT": (1.2, 42.0)}, str(path), "mIoU")
    assert cv2.imread(str(path)).std() > 10
