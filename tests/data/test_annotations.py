"""Checks of COCO annotations: what is refused, what is mended, and what stays as it is."""

import json
import logging
import math
import os

import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image

from projects.kd.data import check, coco_json
from projects.kd.data.coco_json import inspect_annotations
from projects.kd.data.ground_truth import GroundTruth
from projects.kd.errors import DataError


def content(**changes):
    """Two images of 100x80 pixels with one good box each."""
    return {
        "images": [
            {"id": 3, "file_name": "a.jpg", "width": 100, "height": 80},
            {"id": 5, "file_name": "b.jpg", "width": 100, "height": 80},
        ],
        "categories": [{"id": 2, "name": "dog"}, {"id": 1, "name": "cat"}],
        "annotations": [
            annotation(11, image_id=3, category_id=1),
            annotation(12, image_id=5, category_id=2),
        ],
    } | changes


def annotation(number, bbox=(10, 20, 30, 40), image_id=3, category_id=1, **more):
    base = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": list(bbox)}
    return base | {"iscrowd": 0, "area": 5.0} | more


def write(folder, data):
    path = os.path.join(folder, "data.json")
    with open(path, "w") as stream:
        stream.write(data if isinstance(data, str) else json.dumps(data))
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (100, 80)).save(os.path.join(folder, name))
    return path


def two_bad(**fields):
    bad = [annotation(n) | fields for n in (21, 22, 23)]
    return content(annotations=[annotation(20), *bad])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{not json", "is not JSON"),
        ("[1, 2]", "is not in COCO format: the top level is not an object"),
        ({"images": []}, "no list 'categories'"),
        (content(images={"a": 1}), "no list 'images'"),
        (content(categories=[]), "'categories' is empty"),
        (content(annotations=[3]), "no list 'annotations'"),
        (content(categories=[{"id": 1}]), "category 1 lacks id or name"),
        (
            content(categories=[{"id": 1, "name": "a"}] * 2),
            "category 1 has an id that is used twice",
        ),
        (content(images=[{"id": 1, "file_name": "x"}]), "image 1 lacks one of id, file_name"),
        (
            content(images=[{"id": 1, "file_name": "x", "width": 0, "height": 5}]),
            "image 1 has a width or height that is not positive",
        ),
        (content(images=content()["images"] * 2), "image 3 has an id that is used twice"),
        (
            two_bad(category_id=9),
            r"annotation 21 has a category_id not in 'categories' \(9\); so do 2",
        ),
        (
            two_bad(image_id=99),
            r"annotation 21 has an image_id not in 'images' \(99\); so do 2 more",
        ),
        (two_bad(bbox=[1, 2, 3]), r"annotation 21 has no bbox of four numbers \(\[1, 2, 3\]\)"),
        (two_bad(bbox=None), "annotation 21 has no bbox"),
        (two_bad(bbox=[1, 2, "wide", 4]), "annotation 21 has no bbox"),
        (two_bad(iscrowd="maybe"), "annotation 21 has an iscrowd that is neither 0 nor 1"),
        (two_bad(ignore=1), 'annotation 21 has "ignore": write "iscrowd": 1 instead'),
        (
            content(annotations=[annotation(4), annotation(4)]),
            "annotation 4 has an id that is used",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, data, message):
    path = write(tmp_path, data)
    with pytest.raises(DataError, match=message) as error:
        inspect_annotations(path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(DataError, match="none.json: cannot be read: No such file"):
        inspect_annotations(str(tmp_path / "none.json"))
    path = tmp_path / "data.json"
    path.write_bytes(b"\xff\xfe\x00\x80" * 9)
    with pytest.raises(DataError, match="is not JSON"):
        inspect_annotations(str(path))


def test_missing_images_are_counted(tmp_path):
    path = write(tmp_path, content())
    os.remove(tmp_path / "a.jpg")
    os.remove(tmp_path / "b.jpg")
    with pytest.raises(DataError, match=r"image 3 is missing: no file .*a\.jpg; 1 more"):
        check.load_checked(path, str(tmp_path), "check_missing")


BROKEN = [
    annotation(31),
    annotation(32, (90, 70, 30, 40)),  # sticks out: clipped to 10x10
    annotation(33, (-20, 10, 50, 20)),  # sticks out on the left
    annotation(34, (100, 10, 5, 5)),  # wholly outside
    annotation(35, (10, 10, 0, 5)),
    annotation(36, (10, 10, -4, 5)),
    annotation(37, (math.nan, 10, 4, 5)),
    annotation(38, (10, 10, math.inf, 5)),
    annotation(39, (0, 0, 100.3, 80)),  # rounding: left alone
]


def test_boxes_are_clipped_or_left_out_with_one_warning(tmp_path, caplog):
    path = write(tmp_path, content(annotations=BROKEN))
    before = open(path, "rb").read()
    with caplog.at_level(logging.WARNING, logger=check.__name__):
        dicts = check.load_checked(path, str(tmp_path), "check_broken")
        again = check.load_checked(path, str(tmp_path), "check_broken")
    assert dicts == again
    boxes = [a["bbox"] for a in dicts[0]["annotations"]]
    assert boxes == [[10, 20, 30, 40], [90, 70, 10, 10], [0, 10, 30, 20], [0, 0, 100.3, 80]]
    assert not any("id" in a for a in dicts[0]["annotations"])
    (record,) = [r for r in caplog.records if r.name == check.__name__]
    line = record.getMessage()
    assert "2 images, 4 annotations (0 crowds), 2 classes" in line and "\n" not in line
    assert "boxes clipped to the image: 2" in line and "left out (outside of the image): 1" in line
    assert "left out (no positive size): 2" in line and "left out (not finite): 2" in line
    assert "first: annotation 32 of image 3 (100x80): box [90, 70, 30, 40] clipped" in line
    assert open(path, "rb").read() == before


def test_a_clean_file_gives_what_detectron2_gives(tmp_path):
    segmentation = [[10, 20, 40, 20, 40, 60]]
    good = [annotation(41, segmentation=segmentation), annotation(42, image_id=5, iscrowd=1)]
    path = write(tmp_path, content(annotations=good))
    ours = check.load_checked(path, str(tmp_path), "check_clean_ours")
    assert ours == load_coco_json(path, str(tmp_path), "check_clean_stock")
    assert ours[0]["annotations"][0]["category_id"] == 0


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path = write(tmp_path, content())
    reads = []
    original = coco_json._load
    monkeypatch.setattr(coco_json, "_load", lambda name: reads.append(name) or original(name))
    first = inspect_annotations(path)
    check.load_checked(path, str(tmp_path), "check_once")
    assert inspect_annotations(path) is first and len(reads) == 1
    assert [category["name"] for category in first.categories] == ["cat", "dog"]
    write(tmp_path, content(annotations=[annotation(1, category_id=7)]))
    with pytest.raises(DataError, match="category_id"):
        inspect_annotations(path)
    assert len(reads) == 2
    monkeypatch.setattr(coco_json, "KEPT_IN_MEMORY", 1)  # a large file is not kept
    write(tmp_path, content(info="other length"))
    inspect_annotations(path)
    check.load_checked(path, str(tmp_path), "check_once")
    assert len(reads) == 4


def test_categories_have_to_be_the_classes_of_the_data_set(tmp_path):
    path = write(tmp_path, content())
    check.load_checked(path, str(tmp_path), "check_classes")
    write(tmp_path, content(categories=[{"id": 2, "name": "wolf"}, {"id": 1, "name": "cat"}]))
    with pytest.raises(DataError, match="category 2 'wolf' is no class of data set 'check_classes"):
        check.load_checked(path, str(tmp_path), "check_classes")


def test_data_without_annotations_is_a_test_set(tmp_path):
    data = content()
    del data["annotations"]
    path = write(tmp_path, data)
    dicts = check.load_checked(path, str(tmp_path), "check_test_set")
    assert [len(entry["annotations"]) for entry in dicts] == [0, 0]


def test_ground_truth_of_evaluation_is_that_of_training(tmp_path):
    bare = [{k: v for k, v in a.items() if k not in ("area", "iscrowd")} for a in BROKEN]
    bare[0]["id"] = 0
    bare[0]["keypoints"] = [1, 2, 2, 0, 0, 0, 5, 5, 1]
    path = write(tmp_path, content(annotations=bare))
    metadata = MetadataCatalog.get("check_truth").set(json_file=path)
    coco = GroundTruth(metadata, mended=True).api
    annotations = list(coco.anns.values())
    assert [a["bbox"] for a in annotations] == [
        [10, 20, 30, 40],
        [90, 70, 10, 10],
        [0, 10, 30, 20],
        [0, 0, 100.3, 80],
    ]
    assert [a["id"] for a in annotations] == [1, 2, 3, 4]
    assert annotations[0]["area"] == 1200 and annotations[0]["num_keypoints"] == 2
    assert all(a["iscrowd"] == 0 for a in annotations)
    assert sum(len(found) for found in coco.imgToAnns.values()) == 4
