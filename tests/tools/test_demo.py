"""kd-demo: the student alone on images, a folder and a video."""

import json

import cv2
import numpy as np
import pytest
import torch
from kd_detectors import detector_cfg, detector_distill_cfg
from kd_models import build, write_config

from projects.kd.commands import demo
from projects.kd.data.mapper import ImageMapper
from projects.kd.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(2):
        pixels = np.random.RandomState(i).randint(0, 255, (48 + 16 * i, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), pixels)
    (folder / "notes.txt").write_text("no image")
    return folder


def student(folder, name):
    """A distillation config with no teacher anywhere, and a checkpoint of the student."""
    model = build(detector_cfg(name))
    weights = folder / "student.pth"
    torch.save({"model": model.state_dict()}, weights)
    cfg = detector_distill_cfg(name, ("nowhere.yaml", "nowhere.pth"), ("CWD",))
    cfg.MODEL.WEIGHTS = str(weights)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    return model, write_config(cfg, folder / "student.yaml")


@pytest.mark.parametrize("name", ["FCOS", "Mask R-CNN", "Keypoint R-CNN", "Panoptic FPN"])
def test_images_and_folders(photos, tmp_path, name):
    model, config = student(tmp_path, name)
    out = tmp_path / "out"
    inputs = [str(photos / "1.png"), str(photos)]
    arguments = ["--config-file", config, "--input", *inputs, "--output", str(out)]
    demo.main(demo.parse_arguments([*arguments, "--confidence-threshold", "0.0"]))
    assert {x.name for x in out.iterdir()} == {
        *("0000_1.jpg", "0001_0.jpg", "0002_1.jpg", "detections.json")
    }
    report = json.loads((out / "detections.json").read_text())
    assert cv2.imread(str(out / "0001_0.jpg")).shape == (48, 64, 3)
    image = cv2.imread(str(photos / "0.png"))
    # short side 48 is enlarged to 64
    tensor = torch.as_tensor(cv2.resize(image, (85, 64)).transpose(2, 0, 1).astype("float32"))
    with torch.no_grad():
        shape = model.eval()([{"image": tensor, "height": 48, "width": 64}])[0]["instances"]
    found = report[str(photos / "0.png")]
    assert len(found) > 0 and abs(len(found) - len(shape)) <= max(5, len(shape) // 2)
    for one in found:
        x0, y0, x1, y1 = one["box"]
        assert 0 <= x0 <= x1 <= 64 and 0 <= y0 <= y1 <= 48


def test_bad_images_are_passed_over(photos, tmp_path, capsys):
    _, config = student(tmp_path, "FCOS")
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = (photos / "0.png").read_bytes()
    (folder / "a.png").write_bytes(good)
    (folder / "b.png").write_bytes(good[:300])
    (folder / "c.jpg").write_bytes(b"")
    cv2.imwrite(str(folder / "d.png"), np.zeros((900, 1, 3), np.uint8))  # resized to nothing
    cv2.imwrite(str(folder / "e.png"), np.full((40, 50), 40000, np.uint16))
    (folder / "f.png").write_bytes(good)
    out = tmp_path / "out"
    arguments = ["--config-file", config, "--input", str(folder), "--output", str(out)]
    with pytest.raises(DataError, match="4 of 6 images were passed over: .*b.png") as error:
        demo.main(demo.parse_arguments(arguments))
    assert "\n" not in str(error.value)
    assert {x.name for x in out.iterdir()} == {"0000_a.jpg", "0005_f.jpg", "detections.json"}
    report = json.loads((out / "detections.json").read_text())
    assert [path[-5:] for path in report] == ["a.png", "f.png"]
    assert report[str(folder / "a.png")] == report[str(folder / "f.png")]
    passed = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0][-5:] for line in passed] == ["b.png", "c.jpg", "d.png", "e.png"]
    assert "INPUT.MIN_SIZE_TEST" in passed[2] and "INPUT.WHITE" in passed[3]
    demo.main(
        demo.parse_arguments(
            [*arguments[:3], str(folder / "e.png"), *arguments[4:], "INPUT.WHITE", "65535.0"]
        )
    )


def test_what_was_done_stays_when_the_rest_cannot_be(photos, tmp_path, monkeypatch):
    _, config = student(tmp_path, "FCOS")
    run = demo.Predictor.__call__

    def interrupted(self, image):
        if image.shape[0] != 48:
            raise KeyboardInterrupt
        return run(self, image)

    monkeypatch.setattr(demo.Predictor, "__call__", interrupted)
    arguments = ["--config-file", config, "--input", str(photos), "--output", str(tmp_path / "out")]
    with pytest.raises(KeyboardInterrupt):
        demo.main(demo.parse_arguments(arguments))
    report = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert list(report) == [str(photos / "0.png")]


@pytest.mark.parametrize("image_format", ["L", "RGB", "YUV-BT.601"])
def test_formats_are_those_of_evaluation(photos, tmp_path, image_format):
    cfg = detector_cfg("FCOS", INPUT__FORMAT=image_format)
    channels = 1 if image_format == "L" else 3
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [100.0] * channels, [50.0] * channels
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    model = build(cfg)
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    predictor = demo.Predictor(cfg, 0.0)
    path = str(photos / "1.png")
    example = ImageMapper(cfg, is_train=False)({"file_name": path})
    with torch.no_grad():
        expected = model.eval()([example])[0]["instances"]
    found = predictor(cv2.imread(path))
    assert len(expected) and torch.equal(found["instances"].scores, expected.scores)
    assert torch.equal(found["instances"].pred_boxes.tensor, expected.pred_boxes.tensor)
    assert predictor.draw(cv2.imread(path), found).shape == (64, 64, 3)


def test_video(tmp_path):
    _, config = student(tmp_path, "FCOS")
    source, target = str(tmp_path / "in.mp4"), str(tmp_path / "out.mp4")
    writer = cv2.VideoWriter(source, cv2.VideoWriter_fourcc(*"mp4v"), 10.0, (64, 48))
    for i in range(3):
        writer.write(np.full((48, 64, 3), 60 * i, np.uint8))
    writer.release()
    demo.main(
        demo.parse_arguments(["--config-file", config, "--video", source, "--output", target])
    )
    assert int(cv2.VideoCapture(target).get(cv2.CAP_PROP_FRAME_COUNT)) == 3


def test_user_errors(photos, tmp_path):
    _, config = student(tmp_path, "FCOS")
    common = ["--config-file", config, "--output", str(tmp_path / "out")]
    with pytest.raises(DataError, match="--input: no such file"):
        demo.main(demo.parse_arguments([*common, "--input", "nowhere.jpg"]))
    with pytest.raises(DataError, match="1 of 1 images .*notes.txt: image cannot be read"):
        demo.main(demo.parse_arguments([*common, "--input", str(photos / "notes.txt")]))
    with pytest.raises(DataError, match="--video"):
        demo.main(demo.parse_arguments([*common, "--video", str(photos / "notes.txt")]))
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS is empty"):
        own = ["--input", str(photos), *common, "MODEL.WEIGHTS", ""]
        demo.main(demo.parse_arguments(own))


def test_tiles_are_obeyed(photos, tmp_path):
    """The large picture in tiles gives what the tiled detector gives on it."""
    model, config = student(tmp_path, "RetinaNet")
    tiles = ("TEST.TILES.ENABLED", "True", "TEST.TILES.SIZE", 48, "TEST.TILES.OVERLAP", 16)
    words = ("--config-file", config, "--input", photos / "1.png", "--confidence-threshold", 0)
    found = {}
    for name, opts in (("whole", ()), ("tiles", tiles)):
        demo.main(
            demo.parse_arguments([str(x) for x in (*words, "--output", tmp_path / name, *opts)])
        )
        report = json.loads((tmp_path / name / "detections.json").read_text())
        found[name] = report[str(photos / "1.png")]
    assert found["whole"] != found["tiles"] and found["tiles"]
    cfg = demo.load_config(config, [str(x) for x in tiles])
    predictor = demo.Predictor(cfg, 0.0)
    assert isinstance(predictor.model, demo.TiledDetector)
    assert predictor.model.size == 48
