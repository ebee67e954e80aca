"""kd-pseudo-label: what a teacher finds becomes a COCO file; resuming, classes, bad images."""

import json

import kd_models
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from projects.kd import ConfigError, DataError
from projects.kd.commands import pseudo_label
from projects.kd.data.check import load_checked
from projects.kd.data.register import register_configured
from projects.kd.evaluation.label_classes import label_rules
from projects.kd.evaluation.pseudo_labels import LabelRules

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Config and weights of a detector whose classes are those of a json."""
    folder = tmp_path_factory.mktemp("teacher")
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
    tables = {"images": [], "annotations": [], "categories": categories}
    (folder / "own.json").write_text(json.dumps(tables))
    cfg = kd_models.tiny_cfg(
        KD__DATASETS=[["pseudo_own", str(folder / "own.json"), str(folder)]],
        DATASETS__TRAIN=("pseudo_own",),
        TEST__DETECTIONS_PER_IMAGE=8,
        TEST__AUG__MIN_SIZES=(32, 64),
    )
    return kd_models.write_teacher(folder, cfg)


@pytest.fixture(autouse=True)
def _no_log_of_its_own(monkeypatch):
    monkeypatch.setattr(pseudo_label, "setup_logger", lambda **options: None)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for i, name in enumerate(("0.png", "1.png", "inner/2.png")):
        pixels = np.random.RandomState(i).randint(0, 255, (40 + 8 * i, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def call(teacher, *words):
    words = ["--config-file", teacher[0], *words, "MODEL.WEIGHTS", teacher[1]]
    return pseudo_label.main(pseudo_label.parse_arguments([str(word) for word in words]))


def test_the_file_holds_what_the_detector_finds(teacher, images, tmp_path, capsys):
    output = tmp_path / "labels.json"
    found = call(teacher, "--images", images, "--threshold", 0.005, "--output", output)
    assert json.loads(output.read_text()) == found
    assert [x["file_name"] for x in found["images"]] == ["0.png", "1.png", "inner/2.png"]
    assert [x["name"] for x in found["categories"]] == NAMES
    assert not list(tmp_path.glob("*.unfinished")) and "KD.DATASETS:" in capsys.readouterr().out
    args = pseudo_label.parse_arguments(
        ["--config-file", teacher[0], "--images", "x", "--output", "", "MODEL.WEIGHTS", teacher[1]]
    )
    detector = pseudo_label.build(pseudo_label.read_config(args), student_input=False)
    model, rows = detector.model, iter(found["annotations"])
    for number, image in enumerate(found["images"], start=1):
        pixels = torch.from_numpy(np.array(Image.open(images / image["file_name"])))
        pixels = pixels.permute(2, 0, 1).flip(0)[None].float()
        size = round(64 / image["height"] * image["width"]) if image["height"] < 64 else 64
        assert (image["width"], image["height"]) == pixels.shape[:1:-1]
        with torch.no_grad():
            example = pseudo_label.ImageMapper(detector.cfg, is_train=False)(
                {"file_name": str(images / image["file_name"])}
            )
            expected = model([example])[0]["instances"]
        assert example["image"].shape[2] == min(size, 96)
        expected = expected[expected.scores >= 0.005]
        assert len(expected) > 0
        for k in range(len(expected)):
            row = next(rows)
            x1, y1, x2, y2 = expected.pred_boxes.tensor[k].tolist()
            assert row["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=2e-3)
            assert row["score"] == pytest.approx(expected.scores[k].item(), abs=1e-5)
            assert row["category_id"] == expected.pred_classes[k].item() + 1
            assert row["image_id"] == number and row["iscrowd"] == 0
    assert next(rows, None) is None


def test_it_can_be_trained_on(teacher, images, tmp_path):
    output = tmp_path / "labels.json"
    call(teacher, "--images", images, "--threshold", 0.005, "--output", output)
    cfg = kd_models.tiny_cfg(
        KD__DATASETS=[
            ["pseudo_photos", str(output), str(images)],
            ["pseudo_same_photos", str(output), "pseudo_photos"],
        ]
    )
    register_configured(cfg)
    assert MetadataCatalog.get("pseudo_same_photos").image_root == str(images)
    loaded = load_checked(str(output), str(images), "pseudo_photos")
    assert len(loaded) == 3 and sum(len(x["annotations"]) for x in loaded) > 3
    with pytest.raises(ConfigError, match=r"--output: .*labels\.json is there already"):
        call(teacher, "--images", images, "--output", output)


def test_a_run_that_was_killed_goes_on(teacher, images, tmp_path, monkeypatch):
    options = ("--images", images, "--threshold", 0.005, "--output")
    whole = call(teacher, *options, tmp_path / "whole.json")
    seen, rows = [], LabelRules.rows

    def until_the_third(self, found):
        seen.append(found)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return rows(self, found)

    monkeypatch.setattr(LabelRules, "rows", until_the_third)
    output, journal = tmp_path / "cut.json", tmp_path / "cut.json.unfinished"
    with pytest.raises(KeyboardInterrupt):
        call(teacher, *options, output)
    assert journal.is_file() and not output.exists()
    with journal.open("a") as file:
        file.write('{"image": "inner/2.png", "wid')  # a line that was being written
    with pytest.raises(ConfigError, match=r"--output: .*unfinished is of .* another threshold"):
        call(teacher, "--images", images, "--threshold", 0.006, "--output", output)
    assert call(teacher, *options, output) == whole
    assert len(seen) == 4, "one image was left"
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes() and not journal.exists()


def test_unreadable_images_are_named(teacher, images, tmp_path, caplog):
    (images / "bad.png").write_bytes(b"no image")
    whole = (images / "1.png").read_bytes()
    (images / "cut.png").write_bytes(whole[:60] + whole[-12:])  # its header is in order
    output = tmp_path / "labels.json"
    options = ("--images", images, "--threshold", 0.005, "--output", output)
    with pytest.raises(DataError, match=r"bad\.png: image cannot be read.*--skip-unreadable"):
        call(teacher, *options)
    assert not output.exists()
    (images / "bad.png").unlink()
    with pytest.raises(DataError, match=r"cut\.png: image cannot be read.*--skip-unreadable"):
        call(teacher, *options)
    assert not output.exists()
    (images / "bad.png").write_bytes(b"no image")
    (tmp_path / "labels.json.unfinished").unlink()
    found = call(teacher, *options, "--skip-unreadable")
    assert [x["file_name"] for x in found["images"]] == ["0.png", "1.png", "inner/2.png"]
    left_out = [x.getMessage() for x in caplog.records if "left out" in x.getMessage()]
    assert len(left_out) == 2 and "bad.png" in left_out[0] and "cut.png" in left_out[1]


def test_parts_of_data_sets_and_other_sizes_at_test_time(teacher, images, tmp_path):
    first = call(teacher, "--images", images, "--threshold", 0.0, "--output", tmp_path / "a.json")
    data = f"[['pseudo_parts', '{tmp_path / 'a.json'}', '{images}']]"
    words = ("--dataset", "pseudo_parts[1:]", "--threshold", 0.0, "--output")
    own = json.loads((tmp_path / "a.json").read_text())["categories"]
    found = call(teacher, *words, tmp_path / "b.json", "KD.DATASETS", data, *own_names(teacher))
    assert [x["file_name"] for x in found["images"]] == ["1.png", "inner/2.png"]
    assert found["categories"] == own
    boxes = [x["bbox"] for x in first["annotations"] if x["image_id"] > 1]
    assert [x["bbox"] for x in found["annotations"]] == boxes
    words = ("--dataset", "pseudo_parts[:1]", "--threshold", 0.0, "--tta", "--output")
    more = call(teacher, *words, tmp_path / "c.json", "KD.DATASETS", data, *own_names(teacher))
    assert len(more["annotations"]) > 0
    alone = [x["bbox"] for x in first["annotations"] if x["image_id"] == 1]
    assert [x["bbox"] for x in more["annotations"]] != alone


def own_names(teacher):
    """The detector's classes from a built-in place."""
    return ("DATASETS.TRAIN", "('pseudo_parts',)")


def test_masks_and_keypoints():
    found = Instances((20, 30))
    found.pred_boxes = Boxes(torch.tensor([[2.0, 3, 10, 9], [-4, 0, 6, 40], [1, 1, 4, 4]]))
    found.scores = torch.tensor([0.6, 0.9, 0.8])
    found.pred_classes = torch.tensor([1, 0, 1])
    masks = torch.zeros(3, 20, 30, dtype=torch.bool)
    masks[0, 3:9, 2:10], masks[1, :, :6] = True, True  # the third is empty
    found.pred_masks = masks
    points = torch.tensor([[5.0, 6, 0.9], [7.5, 8, 0.01]])
    found.pred_keypoints = points.repeat(3, 1, 1)
    categories = [{"id": 7, "name": "x"}, {"id": 3, "name": "y"}]
    rules = LabelRules(categories, {0: 3, 1: 7}, {3: 0.5, 7: 0.5}, 0.05)
    first, second = rules.rows(found)
    assert first["bbox"] == [0, 0, 6, 20] and first["category_id"] == 3 and first["area"] == 120
    assert second["bbox"] == [2, 3, 8, 6] and second["score"] == 0.6 and second["area"] == 48
    assert second["keypoints"] == [4.5, 5.5, 2, 0, 0, 0] and second["num_keypoints"] == 1
    assert second["segmentation"]["size"] == [20, 30]
    strict = LabelRules(categories, {1: 7}, {7: 0.7})
    assert strict.rows(found) == [], "a score too low, a class that is not wanted, an empty mask"


def rules(**options):
    model = nn.Module()
    model.test_score_thresh = options.pop("least", 0.05)
    options = {"threshold": 0.5, **options}
    return label_rules(model, {"thing_classes": NAMES}, False, **options)


@pytest.fixture
def target(tmp_path):
    categories = [{"id": 4, "name": "car"}, {"id": 9, "name": "b"}, {"id": 2, "name": "c"}]
    path = tmp_path / "target.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    return str(path)


def test_classes_of_another_file(target, caplog):
    found = rules(classes_of=target, class_map=["a=car"], class_threshold=["b=0.7"])
    assert dict(found.ids) == {0: 4, 1: 9, 2: 2}
    assert dict(found.thresholds) == {4: 0.5, 9: 0.7, 2: 0.5}
    assert not caplog.records
    found = rules(classes_of=target)
    assert dict(found.ids) == {1: 9, 2: 2}
    assert "does not know car" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"class_map": ["d=a"]}, r"--class-map d=a: 'd' is none of a, b, c"),
        ({"class_map": ["a=d"]}, r"--class-map a=d: 'd' is none of a, b, c"),
        ({"class_map": ["a"]}, r"--class-map: 'a' is not NAME=VALUE"),
        ({"class_threshold": ["q=0.4"]}, r"--class-threshold q=0\.4: 'q' is none"),
        ({"class_threshold": ["a=1.4"]}, r"--class-threshold: is 1\.4, it must lie in \[0, 1\]"),
        ({"threshold": 0.01}, r"--threshold 0\.01: the detector gives nothing below 0\.05"),
        ({"classes_of": "none.json"}, r"--classes-of: 'none\.json' is neither a file nor"),
    ],
)
def test_wrong_classes_and_scores(options, message):
    with pytest.raises(ConfigError, match=message):
        rules(**options)


def test_nothing_in_common(tmp_path):
    path = tmp_path / "other.json"
    categories = [{"id": 1, "name": "zebra"}]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    with pytest.raises(ConfigError, match=r"--classes-of: none of .*a, b, c.* is one of zebra"):
        rules(classes_of=str(path))


@pytest.mark.parametrize(
    "words, message",
    [
        (("--images", "/nowhere"), r"--images: no such folder '/nowhere'"),
        (("--dataset", "nothing"), r"--dataset: no data set 'nothing' is registered"),
        ((), r"--images or --dataset"),
    ],
)
def test_wrong_places(teacher, tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        call(teacher, *words, "--output", tmp_path / "x.json")
