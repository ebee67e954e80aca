"""Pascal VOC and YOLO annotations to COCO: boxes to the pixel, and wrong files in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from projects.kd.commands.convert import PARTS
from projects.kd.data import conversion
from projects.kd.data.check import load_checked
from projects.kd.errors import ConfigError, DataError

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><part><bndbox><xmin>1</xmin></bndbox></part>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def make_image(path, width, height, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path, **options)


def make_xml(path, objects="", size=(40, 30), filename="other.jpg"):
    path.parent.mkdir(parents=True, exist_ok=True)
    sides = "" if size is None else f"<width>{size[0]}</width><height>{size[1]}</height>"
    path.write_text(
        f"<annotation><filename>{filename}</filename><size>{sides}</size>{objects}</annotation>"
    )


@pytest.fixture
def voc(tmp_path):
    make_image(tmp_path / "photos" / "a.JPG", 40, 30)
    make_image(tmp_path / "photos" / "sub" / "b.png", 20, 10)
    make_xml(
        tmp_path / "xml" / "a.xml",
        OBJECT.format("dog", 0, 1, 1, 40, 30) + OBJECT.format("cat", 1, 5, 7, 5, 9),
    )
    make_xml(tmp_path / "xml" / "sub" / "b.xml", OBJECT.format("cat", 0, 2.5, 3, 11, 10), None)
    return tmp_path


@pytest.fixture
def yolo(tmp_path):
    make_image(tmp_path / "images" / "a.jpg", 40, 30)
    make_image(tmp_path / "images" / "empty.jpg", 8, 8)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "classes.txt").write_text("cat\ndog\n")
    label = tmp_path / "labels" / "a.txt"
    label.write_text("1 0.5 0.5 1 1\n\n0 0.25 0.4 0.1 0.2\n0 0.1 0.1 0.6 0.1 0.1 0.6\n")
    return tmp_path


def test_voc_counts_pixels_from_one_and_both_corners_lie_inside(voc):
    a, b = conversion.voc_records(str(voc / "xml"), str(voc / "photos"))
    assert (a["file_name"], a["width"], a["height"]) == ("a.JPG", 40, 30)
    # from pixel 1 to 40 and 1 to 30: the whole image; one pixel wide and three high
    assert [x["bbox"] for x in a["objects"]] == [[0, 0, 40, 30], [4, 6, 1, 3]]
    assert [(x["name"], x["iscrowd"]) for x in a["objects"]] == [("dog", 0), ("cat", 1)]
    assert b["file_name"] == "sub/b.png" and b["objects"][0]["bbox"] == [1.5, 2, 9.5, 8]
    edges, _ = conversion.voc_records(str(voc / "xml"), str(voc / "photos"), first_pixel=0)
    assert edges["objects"][0]["bbox"] == [1, 1, 39, 29]


def test_voc_agrees_with_detectron2s_own_reader(voc):
    from detectron2.data.datasets.pascal_voc import load_voc_instances

    for folder, name in (("Annotations", "a.xml"), ("JPEGImages", "a.JPG")):
        (voc / "voc" / folder).mkdir(parents=True)
        source = voc / ("xml" if name.endswith("xml") else "photos") / name
        (voc / "voc" / folder / name).write_bytes(source.read_bytes())
    (voc / "voc" / "ImageSets" / "Main").mkdir(parents=True)
    (voc / "voc" / "ImageSets" / "Main" / "all.txt").write_text("a\na\n")
    theirs, _ = load_voc_instances(str(voc / "voc"), "all", ["dog", "cat"])
    ours, _ = conversion.voc_records(str(voc / "xml"), str(voc / "photos"))
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (o["bbox"] for o in ours["objects"])]
    assert boxes == [x["bbox"] for x in theirs["annotations"]]


def test_yolos_centres_are_parts_of_the_image(yolo):
    a, empty = conversion.yolo_records(str(yolo / "labels"), str(yolo / "images"), ["cat", "dog"])
    whole, small, polygon = a["objects"]
    assert whole == {"name": "dog", "iscrowd": 0, "bbox": [0, 0, 40, 30]}
    assert small["bbox"] == [8, 9, 4, 6] and small["name"] == "cat"
    assert polygon["bbox"] == [4, 3, 20, 15]
    assert polygon["segmentation"] == [[4, 3, 24, 3, 4, 18]]
    assert (empty["file_name"], empty["objects"]) == ("empty.jpg", [])
    tables = conversion.coco_tables([a, empty], ["cat", "dog"])
    assert [x["area"] for x in tables["annotations"]] == [1200, 24, 150]  # a triangle is half
    assert [x["category_id"] for x in tables["annotations"]] == [2, 1, 1]


def convert(*flags):
    PARTS.call(flags)


def test_the_written_file_is_what_training_reads(voc, capsys):
    output = voc / "out" / "train.json"
    flags = ["voc", "--annotations", voc / "xml", "--images", voc / "photos", "--output", output]
    convert(*flags)
    printed = capsys.readouterr().out
    assert "2 images (0 without objects), 2 objects, 1 difficult" in printed and "1 dog" in printed
    first, second = load_checked(str(output), str(voc / "photos"), "converted_voc")
    found = [(x["bbox"], x["category_id"], x["iscrowd"]) for x in first["annotations"]]
    assert found == [([0, 0, 40, 30], 1, 0), ([4, 6, 1, 3], 0, 1)]  # cat, dog: sorted
    assert second["file_name"] == str(voc / "photos" / "sub/b.png")
    convert(*flags, "--classes", "dog", "cat")
    names = [c["name"] for c in json.loads(output.read_text())["categories"]]
    assert names == ["dog", "cat"]
    convert(*flags[:-1], voc / "val.json", "--classes-of", output)
    assert json.loads((voc / "val.json").read_text())["categories"][0]["name"] == "dog"
    before = output.read_text()
    with pytest.raises(DataError, match="a.JPG: class 'cat' is none of dog"):
        convert(*flags, "--classes", "dog")
    assert output.read_text() == before


def test_a_share_is_kept_for_evaluation(tmp_path):
    for i in range(60):
        make_image(tmp_path / "images" / f"{i}.png", 8, 8)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "3.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "data.yaml").write_text("names: {0: cat, 1: dog}\nnc: 2\n")
    train, val = tmp_path / "train.json", tmp_path / "val.json"
    flags = ["yolo", "--annotations", tmp_path / "labels", "--images", tmp_path / "images"]
    flags += ["--names", tmp_path / "data.yaml", "--output", train, "--val", val]

    def names(path):
        return {image["file_name"] for image in json.loads(path.read_text())["images"]}

    convert(*flags, "--val-share", 0.3)
    first = names(val)
    assert 8 <= len(first) <= 28 and len(names(train) | first) == 60 and not names(train) & first
    assert len(json.loads(val.read_text())["categories"]) == 2
    make_image(tmp_path / "images" / "new.png", 8, 8)
    convert(*flags, "--val-share", 0.3)
    assert first <= names(val) <= first | {"new.png"}  # the others stay where they were
    with pytest.raises(ConfigError, match="--val-share is 0, it must lie between 0 and 1"):
        convert(*flags, "--val-share", 0)


@pytest.mark.parametrize(
    "objects, message",
    [
        ("<object>", "a.xml: is not XML"),
        ("<object></object>", "a.xml: object 1 has no name"),
        ("<object><name>x</name></object>", "object 1 has no bndbox with xmin"),
        (OBJECT.format("x", 0, 1, "two", 3, 4), "object 1: bndbox holds 'two', which is no number"),
        (OBJECT.format("x", 0, 1, "nan", 3, 4), "object 1: bndbox holds 'nan'"),
    ],
)
def test_a_wrong_xml_file_is_one_line(voc, objects, message):
    make_xml(voc / "xml" / "a.xml", objects)
    with pytest.raises(DataError, match=message):
        conversion.voc_records(str(voc / "xml"), str(voc / "photos"))


def test_sizes_and_images_have_to_fit(voc):
    make_xml(voc / "xml" / "a.xml", size=(30, 40))
    with pytest.raises(DataError, match="a.xml: image has 40x30 pixels, its annotations say 30x40"):
        conversion.voc_records(str(voc / "xml"), str(voc / "photos"))
    make_xml(voc / "xml" / "a.xml", size=(0, 0))  # what some tools write
    assert len(conversion.voc_records(str(voc / "xml"), str(voc / "photos"))) == 2
    make_xml(voc / "xml" / "c.xml", filename="a.JPG")  # the name inside, where its own is no image
    names = [x["file_name"] for x in conversion.voc_records(str(voc / "xml"), str(voc / "photos"))]
    assert names == ["a.JPG", "a.JPG", "sub/b.png"]
    make_xml(voc / "xml" / "c.xml", filename="")
    with pytest.raises(DataError, match="c.xml: no image c.jpg"):
        conversion.voc_records(str(voc / "xml"), str(voc / "photos"))
    (voc / "xml" / "c.xml").write_text("<html/>")
    with pytest.raises(DataError, match="c.xml: is no Pascal VOC file: it begins with <html>"):
        conversion.voc_records(str(voc / "xml"), str(voc / "photos"))
    with pytest.raises(ConfigError, match="--images: no such folder"):
        conversion.voc_records(str(voc / "xml"), str(voc / "nowhere"))
    with pytest.raises(DataError, match="no .xml file in it"):
        conversion.voc_records(str(voc / "photos"), str(voc / "photos"))


@pytest.mark.parametrize(
    "line, message",
    [
        ("2 0.5 0.5 1 1", "line 1: class 2 is not in 0..1 of --names"),
        ("0.5 0.5 0.5 1 1", "class 0.5 is not in"),
        ("cat 0.5 0.5 1 1", "the class holds 'cat', which is no number"),
        ("0 0.5 0.5 1", "4 numbers, neither class, centre"),
        ("0 0.5 0.5 1 1 0.9", "six numbers, as predictions with scores have"),
        ("0 12 9 4 6", "12 is not in 0..1, parts of the image"),
        ("0 0.5 0.5 1 inf", "a coordinate holds 'inf'"),
        ("0 0.1 0.1 0.6 0.1 0.1 0.6 0.7", "8 numbers, neither"),
    ],
)
def test_a_wrong_label_line_is_named(yolo, line, message):
    (yolo / "labels" / "a.txt").write_text(line)
    with pytest.raises(DataError, match=message):
        conversion.yolo_records(str(yolo / "labels"), str(yolo / "images"), ["cat", "dog"])


def test_labels_need_images_and_names(yolo):
    (yolo / "labels" / "b.txt").write_text("")
    with pytest.raises(DataError, match="b.txt: no image b.jpg"):
        conversion.yolo_records(str(yolo / "labels"), str(yolo / "images"), ["cat"])
    make_image(yolo / "images" / "a.png", 8, 8)
    with pytest.raises(DataError, match="a.png: its annotations would be those of .*a.jpg too"):
        conversion.yolo_records(str(yolo / "labels"), str(yolo / "images"), ["cat"])
    names = yolo / "labels" / "classes.txt"
    assert conversion.read_names(str(names)) == ["cat", "dog"]
    data = yolo / "data.yaml"
    for text in ("names: [cat, dog]", "names: {1: dog, 0: cat}", "names: {'0': cat, '1': dog}"):
        data.write_text(text)
        assert conversion.read_names(str(data)) == ["cat", "dog"]
    for text in ("names: {0: cat, 2: dog}", "nc: 3", "names: []", "names: [a, a]", "names: [1]"):
        data.write_text(text)
        with pytest.raises(ConfigError, match="--names: .* does not name every class from 0 on"):
            conversion.read_names(str(data))
    data.write_text("names: [")
    for path in (data, yolo / "missing.txt"):
        with pytest.raises(ConfigError, match="--names: "):
            conversion.read_names(str(path))
