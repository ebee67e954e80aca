"""The contact sheet of ground truth."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from projects.kd.commands.visualize import PARTS
from projects.kd.errors import ConfigError, DataError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TOOL = os.path.join(ROOT, "tools", "visualize.py")


@pytest.fixture
def config_file(tmp_path):
    """A config that names a data set of three black 60x40 images with a box in the middle."""
    box = {"bbox": [15, 10, 30, 20], "category_id": 1, "iscrowd": 0}
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in range(3)],
        "annotations": [box | {"id": i + 1, "image_id": i} for i in range(3)],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "data.json").write_text(json.dumps(content))
    for i in range(3):
        Image.new("RGB", (60, 40)).save(tmp_path / f"{i}.png")
    path = tmp_path / "config.yaml"
    name = f"sheet_{tmp_path.name}"
    entry = [name, str(tmp_path / "data.json"), str(tmp_path)]
    path.write_text(json.dumps({"VERSION": 2, "KD": {"DATASETS": [entry]}}))
    return str(path), name


def test_sheet_of_a_configured_data_set(config_file, tmp_path):
    config, name = config_file
    output = str(tmp_path / "new" / "sheet.png")
    options = ["--num", "3", "--columns", "2", "--size", "120"]
    PARTS.call(["data", "--dataset", name, "--config-file", config, "--output", output, *options])
    sheet = np.array(Image.open(output))
    assert sheet.shape == (240, 240, 3)
    first = sheet[:80, :120].astype(int)  # 60x40 pixels at twice the size
    assert first[22:56, 28:33].sum(axis=2).max(axis=1).min() > 100, "the box's left side"
    assert first[:10, :10].max() < 30, "nothing is drawn outside of the box"
    assert (sheet[85:120, :120] == 128).all() and (sheet[120:, 120:] == 255).all()


def test_user_errors(config_file, tmp_path):
    config, name = config_file
    common = ["--config-file", config, "--output", str(tmp_path / "sheet.png")]
    with pytest.raises(ConfigError, match=f"'{name}x' is not registered; did you mean {name}"):
        PARTS.call(["data", "--dataset", name + "x", *common])
    with pytest.raises(ConfigError, match="--semantic: there is no semantic map"):
        PARTS.call(["data", "--dataset", name, "--semantic", *common])
    with pytest.raises(ConfigError, match="--output: .*sheet.odd cannot be written"):
        PARTS.call(
            ["data", "--dataset", name, *common[:2], "--output", str(tmp_path / "sheet.odd")]
        )
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png: image cannot be read"):
        PARTS.call(["data", "--dataset", name, *common])


def test_as_a_script_an_error_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, TOOL, "data", "--dataset", "shapes_trein", "--output", "x.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: --dataset: 'shapes_trein' is not registered; did you mean shapes_train")
    )
    assert "Traceback" not in done.stderr
