"""tools/demo.py: the student alone on images, a folder and a video."""

import json

import cv2
import numpy as np
import pytest
import torch
from kd_detectors import detector_cfg, detector_distill_cfg
from kd_models import build, write_config
from kd_scripts import load_script

from projects.kd.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def demo():
    return load_script("tools/demo.py")


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
def test_images_and_folders(demo, photos, tmp_path, name):
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


def test_video(demo, tmp_path):
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


def test_user_errors(demo, photos, tmp_path):
    _, config = student(tmp_path, "FCOS")
    common = ["--config-file", config, "--output", str(tmp_path / "out")]
    with pytest.raises(DataError, match="--input: no such file"):
        demo.main(demo.parse_arguments([*common, "--input", "nowhere.jpg"]))
    with pytest.raises(DataError, match="cannot be read as an image"):
        demo.main(demo.parse_arguments([*common, "--input", str(photos / "notes.txt")]))
    with pytest.raises(DataError, match="--video"):
        demo.main(demo.parse_arguments([*common, "--video", str(photos / "notes.txt")]))
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS is empty"):
        own = ["--input", str(photos), *common, "MODEL.WEIGHTS", ""]
        demo.main(demo.parse_arguments(own))
