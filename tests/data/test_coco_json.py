"""What single findings in a COCO file lead to: read by their meaning, left out, or refused."""

import copy
import json
import logging
import math
import random

import pytest
import torch
from coco_files import CLASSES, POINTS, config, detections, plain, registered, scores, write
from detectron2.data import DatasetCatalog, MetadataCatalog

from projects.kd.data.check import load_checked
from projects.kd.data.coco_json import inspect_annotations, read_coco
from projects.kd.data.loader import load_dataset_dicts
from projects.kd.data.needs import check_data_sets
from projects.kd.errors import ConfigError, DataError


@pytest.fixture
def content():
    """Four images with five objects each."""
    return plain(random.Random(1))


def set_in(rows, **fields):
    for row in rows:
        row.update(fields)


def objects(path, folder, name):
    dicts = load_checked(path, str(folder), name)
    return [row for entry in dicts for row in entry["annotations"]]


def test_an_id_is_one_whether_number_or_text(tmp_path, content):
    for row in content["annotations"]:
        row["image_id"], row["category_id"] = str(row["image_id"]), float(row["category_id"])
    data = read_coco(write(tmp_path, "refs", content))
    assert [row["id"] for row in data.images] == [1, 2, 3, 4]
    assert {row["image_id"] for row in data.annotations} == {1, 2, 3, 4}
    assert all(type(row["category_id"]) is int for row in data.annotations)


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        ((3, 1, 2), ["dog", "owl", "cat"]),
        (("10", "9", "1"), ["owl", "dog", "cat"]),  # numbers in quotes are numbers
        (("b", "c", "a"), ["owl", "cat", "dog"]),
        ((2.5, 1, 3.0), ["dog", "cat", "owl"]),
    ],
)
def test_classes_come_by_ascending_id(tmp_path, content, ids, names):
    new = dict(zip((1, 2, 3), ids, strict=True))
    set_in(content["annotations"], category_id=new[1])
    for row in content["categories"]:
        row["id"] = new[row["id"]]
    name = registered(tmp_path, f"order_{'_'.join(names)}_{ids[0]}", content)
    assert MetadataCatalog.get(name).thing_classes == names
    entry = DatasetCatalog.get(name)[0]
    assert {row["category_id"] for row in entry["annotations"]} == {names.index("cat")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: set_in(c["categories"][1:2], id="7"), 'numbers .* and text .*"7"'),
        (lambda c: set_in(c["categories"][1:2], name="cat"), "category 2 .* another .* has too"),
        (lambda c: set_in(c["categories"][1:2], name=["cat"]), "category 2 has a name that is no"),
        (lambda c: set_in(c["images"][2:3], id="1"), "image 1 has an id that is used twice"),
        (lambda c: set_in(c["images"][2:3], id=[3]), "has an id that is neither a number nor text"),
        (lambda c: set_in(c["images"][2:3], id=math.nan), "has an id that is neither"),
        (lambda c: set_in(c["images"][2:3], id=True), "has an id that is neither"),
        (
            lambda c: set_in(c["images"][1:], file_name=5),
            r"image 2 has a file_name .*\(5\); so do 2",
        ),
        (lambda c: set_in(c["images"][1:2], width="wide"), r"that is no number \(\"wide\" x 64\)"),
        (lambda c: set_in(c["images"][1:2], width=math.inf), r"that is no number \(Infinity x 64"),
        (lambda c: set_in(c["images"][1:2], height=64.5), r"no whole number .*\(96 x 64.5\)"),
        (lambda c: set_in(c["images"][1:2], height=10**9), "no whole number of pixels up to"),
        (
            lambda c: set_in(c["annotations"][4:], image_id=[1]),
            r"annotation 5 .*\(\[1\]\); so do 15",
        ),
        (lambda c: set_in(c["annotations"][4:5], image_id="x"), r'image_id not in .*\("x"\)'),
        (lambda c: set_in(c["annotations"][4:5], category_id=None), "category_id not in"),
        (lambda c: set_in(c["annotations"][4:5], id={}), "has an id that is neither"),
        (
            lambda c: set_in(c["annotations"], bbox=[0.1, 0.2, 0.5, 0.25]),
            "all 20 boxes lie between",
        ),
        (lambda c: set_in(c["annotations"], bbox=[1, 2, 0, 5]), "none of the 20 boxes can be used"),
    ],
)
def test_what_is_refused(tmp_path, content, change, message):
    change(content)
    path = write(tmp_path, "refused", content)
    with pytest.raises(DataError, match=message) as error:
        read_coco(path)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value)) < 400


def test_text_that_is_no_table(tmp_path):
    for text, message in (
        ("", "is not JSON"),
        ("[" * 200_000, "nested too deeply"),
        ('{"images": [], "categories": [{}], "annotations": null}', "no list 'annotations'"),
        ('{"images": [], "categories": [{"id": 1' + "0" * 5000 + "}]}", "is not JSON: Exceeds"),
    ):
        with pytest.raises(DataError, match=message):
            read_coco(write(tmp_path, "text", text))


def test_what_a_box_detector_does_not_need_costs_no_box(tmp_path, content, caplog):
    expected = objects(write(tmp_path, "needed", content), tmp_path, "needed")
    for i, (mask, points) in enumerate(
        [
            ([[]], None),
            ([[1, 2, 3, 4]], []),
            ([1, 2, 3, 4], "ab"),
            ([[1, 2, 3, 4, 5]], [1, 2]),
            ("polygon", [1, 2, math.nan] * 2),
            ([[math.nan, 2, 3, 4, 5, 6]], [1, 2, 10**40] * 2),
            ([[0, 0, 2e8, 3e8, 5, 6]], {"left_eye": 1}),
            ({"size": [1, 1], "counts": "11"}, [1, 2, "2"] * 2),
            ({"size": [64, 96], "counts": "~"}, [[1, 2, 2]] * 2),
            (None, 7),
        ]
    ):
        set_in(content["annotations"][i : i + 1], segmentation=mask, keypoints=points)
    with caplog.at_level(logging.WARNING):
        actual = objects(write(tmp_path, "odd", content), tmp_path, "odd")
    assert [row["bbox"] for row in actual] == [row["bbox"] for row in expected]
    assert not any("segmentation" in row for row in actual[:10])
    assert actual[10:] == expected[10:]
    # one without keypoints has unlabelled ones beside others that have them
    assert all(row["keypoints"] == [0.5, 0.5, 0] * 2 for row in actual[:10])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "4 images, 20 annotations (0 crowds), 3 classes" in line
    for count in ("three points, an x and a y for each): 3", "no finite numbers): 1", "than its l"):
        assert count in line
    assert "keypoints left out (not a list of finite numbers): 6" in line


def test_polygons_that_can_be_used_stay_beside_others(tmp_path, content):
    good = content["annotations"][0]["segmentation"][0]
    content["annotations"][0]["segmentation"] = [[1, 2], good, [0, 0, 1e9, 0, 5, 5]]
    first, *_ = objects(write(tmp_path, "parts", content), tmp_path, "parts")
    assert first["segmentation"] == [good]


def test_boxes_below_a_pixel_are_left_out(tmp_path, content):
    for row, box in zip(
        content["annotations"],
        ([5.2, 5.2, 0.01, 0.01], [5, 5, 9, 0.5], [95.5, 5, 9, 9], [5, 5, 0.999, 4], [5, 5, 1, 1]),
        strict=False,
    ):
        row["bbox"] = box
    content["annotations"][5]["bbox"] = [5, 5, 10**400, 5]
    data = read_coco(write(tmp_path, "tiny", content))
    assert [row["id"] for row in data.annotations] == [4, 5, *range(7, 21)]
    assert data.problems.counts == {
        "boxes left out (narrower than a pixel)": 3,
        "boxes left out (not finite)": 1,
    }


def test_flags_and_areas(tmp_path, content):
    values = [None, 0, 1, True, False, "0", "1", "true", "False", 2, 0.0, ""]
    for row, value in zip(content["annotations"], values, strict=False):
        row["iscrowd"] = value
    areas = [None, "12", 0, -1, math.nan, [], True, 10**400, 12, 12.5]
    for row, value in zip(content["annotations"], areas, strict=False):
        row["area"] = value
    del content["annotations"][19]["iscrowd"], content["annotations"][19]["area"]
    rows = read_coco(write(tmp_path, "flags", content)).annotations
    crowds = [0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0]
    assert [row["iscrowd"] for row in rows[:12]] == crowds and rows[19]["iscrowd"] == 0
    of_boxes = [row["bbox"][2] * row["bbox"][3] for row in rows]
    assert [row["area"] for row in rows] == [*of_boxes[:8], 12, 12.5, *of_boxes[10:]]


def test_names_and_skeletons(tmp_path, content, caplog):
    set_in(content["categories"], keypoints="nose", skeleton="x")
    set_in(content["categories"][:1], name=5)
    name = registered(tmp_path, "odd_names", content)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["5", "dog", "owl"]
    assert metadata.get("keypoint_names") is None
    set_in(
        content["categories"], keypoints=[1, 2], skeleton=[[1], [1, 2], "x", [1, 2, 3], ["a", 1]]
    )
    metadata = MetadataCatalog.get(registered(tmp_path, "odd_limbs", content))
    assert metadata.keypoint_names == ["1", "2"]
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [("1", "2")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(annotations=[]), "no annotation to train on"),
        (lambda c: c.pop("annotations"), "no annotation to train on"),
        (lambda c: set_in(c["annotations"], iscrowd=1), "no annotation to train on"),
        (lambda c: c.update(annotations=[], images=[]), "'images' is empty, .* to train on"),
        (
            lambda c: [a.pop("segmentation") for a in c["annotations"]],
            "annotation 1 and 19 more of",
        ),
        (lambda c: set_in(c["annotations"][3:4], segmentation=[]), "annotation 4 has no segm"),
        (
            lambda c: set_in(c["annotations"], segmentation="x"),
            "no mask can be used: .*: 20; first",
        ),
        (
            lambda c: [a.pop("keypoints") for a in c["categories"]],
            "needs the names of the keypoint",
        ),
        (lambda c: set_in(c["categories"], keypoints="nose"), "needs the names of the keypoints"),
        (
            lambda c: set_in(c["categories"][:1], keypoints=["a", "b"]),
            "needs the names of the keyp",
        ),
        (lambda c: set_in(c["annotations"], keypoints=None), "no annotation has keypoints of flag"),
        (
            lambda c: set_in(c["annotations"], keypoints=[1, 2, 2]),
            r"flag 1 or 2 \(.*: 20; first: a",
        ),
    ],
)
def test_what_training_needs_is_checked_before(tmp_path, content, change, message):
    change(content)
    name = registered(tmp_path, f"needs_{abs(hash(message + json.dumps(content)))}", content)
    with pytest.raises(DataError, match=message) as error:
        check_data_sets(config(name, masks=True, keypoints=True), training=True)
    assert f"{name}.json" in str(error.value)
    if content["images"]:
        check_data_sets(config(name, masks=True), training=False)


def test_number_of_keypoints_and_empty_test_sets(tmp_path, content):
    name = registered(tmp_path, "needs_count", content)
    cfg = config(name, keypoints=True)
    for training, number in ((True, 17), (False, 3)):
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = number
        with pytest.raises(ConfigError, match=f"NUM_KEYPOINTS is {number}, .* has 2 keypoints"):
            check_data_sets(cfg, training=training)
    cfg = config(name)
    cfg.DATASETS.TEST = (
        registered(tmp_path, "needs_images", {**content, "images": [], "annotations": []}),
    )
    with pytest.raises(DataError, match="needs_images.json: 'images' is empty, .* to evaluate on"):
        check_data_sets(cfg, training=True)


def test_background_beside_another_set_needs_the_filter_off(tmp_path, content):
    empty = registered(tmp_path, "needs_background", {**content, "annotations": []})
    cfg = config(registered(tmp_path, "needs_objects", content))
    cfg.DATASETS.TRAIN = (*cfg.DATASETS.TRAIN, empty)
    with pytest.raises(DataError, match="background.json: no annotation .*FILTER_EMPTY_ANNOTATION"):
        check_data_sets(cfg, training=True)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    check_data_sets(cfg, training=True)
    cfg.DATASETS.TRAIN = (empty,)
    with pytest.raises(DataError, match="background.json: no annotation to train on"):
        check_data_sets(cfg, training=True)


def test_objects_with_unusable_masks_are_left_out_of_training_of_masks(tmp_path, content, caplog):
    set_in(content["annotations"][:5], segmentation=[[1, 2, 3]])  # all of image 1
    set_in(content["annotations"][5:6], segmentation=[[math.nan] * 8])
    set_in(content["annotations"][6:7], iscrowd=1, segmentation=None)
    name = registered(tmp_path, "masks_some", content)
    cfg = config(name, masks=True)
    check_data_sets(cfg, training=True)
    dicts = load_dataset_dicts(cfg, [name])
    assert [entry["image_id"] for entry in dicts] == [2, 3, 4]
    assert [len(entry["annotations"]) for entry in dicts] == [4, 5, 5]
    assert "DATASETS.TRAIN: 6 objects without a usable mask left out" in caplog.text
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert [len(entry["annotations"]) for entry in load_dataset_dicts(cfg, [name])] == [0, 4, 5, 5]
    cfg.MODEL.MASK_ON = False
    assert sum(len(entry["annotations"]) for entry in load_dataset_dicts(cfg, [name])) == 20


@pytest.mark.parametrize("fast", [False, True], ids=["pycocotools", "faster-coco-eval"])
def test_one_annotation_without_a_mask_or_keypoints_does_not_cost_the_others(
    tmp_path, content, caplog, fast
):
    """Its object counts neither way: found or not, masks score as without it, and keypoints as
    if it had unlabelled ones.
    """
    if fast:
        pytest.importorskip("faster_coco_eval")
    content["annotations"][0]["bbox"] = [0, 0, 40, 40]  # the only one there
    for row in content["annotations"][1:5]:
        row["bbox"] = [60, 44, 30, 16]
    for row in content["annotations"][:5]:
        x, y, w, h = row["bbox"]
        row |= {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], "area": w * h}
    found = detections(content, 2)
    without = copy.deepcopy(content)
    del without["annotations"][0]
    boxes, masks = found["1.png"].pred_boxes.tensor, found["1.png"].pred_masks
    at_place = torch.tensor([True, *[False] * 4] * 2)
    boxes[at_place] = torch.tensor([2.0, 2, 38, 38])
    masks[at_place] = False
    masks[at_place, 2:38, 2:38] = True
    elsewhere = {**found, "1.png": found["1.png"][~at_place]}
    rest = scores(registered(tmp_path, f"rest_{fast}", without), elsewhere, fast)
    set_in(content["annotations"][:1], segmentation=[], keypoints=[])
    name = registered(tmp_path, f"one_{fast}", content)
    for detected in (found, elsewhere):
        actual = scores(name, detected, fast)
        assert actual["segm"] == pytest.approx(rest["segm"], abs=1e-6)
    set_in(content["annotations"][:1], keypoints=[0] * 6, num_keypoints=0)
    unlabelled = scores(registered(tmp_path, f"unlabelled_{fast}", content), found, fast)
    assert scores(name, found, fast)["keypoints"] == unlabelled["keypoints"]
    assert (
        "1 of 20 annotations have no segmentation: what is detected in their boxes" in caplog.text
    )
    assert 5 < rest["segm"]["AP"] < 95


def test_the_summary_counts_objects(tmp_path, content):
    set_in(content["annotations"][:2], iscrowd=1)
    set_in(content["annotations"][2:4], segmentation=None)
    set_in(content["annotations"][4:5], segmentation=3)
    set_in(content["annotations"][5:7], keypoints=[0, 0, 0] * 2)
    held = inspect_annotations(write(tmp_path, "summary", content))
    assert (held.images, held.annotations, held.objects.count) == (4, 20, 18)
    assert (held.no_mask.count, held.no_mask.first) == (2, 3)
    assert (held.bad_mask.count, held.bad_mask.first, held.runs.count) == (1, 5, 0)
    assert (held.labelled.count, held.keypoint_count) == (16, len(POINTS))
    assert [category["name"] for category in held.categories] == list(CLASSES)
