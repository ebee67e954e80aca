"""A package outside the repository brings a detector, its taps, a head, keys and a data set."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from outside import BASE, IMPORTS, PACKAGE, STUDENT

ROOT = Path(__file__).resolve().parents[1]

# The student's file in detectron2 alone, with nothing of this repository on the path.
STOCK = """
import sys
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
import my_dots.dot
import torch

cfg = get_cfg()
my_dots.dot.add_dot_config(cfg)
cfg.merge_from_file(sys.argv[1])
model = build_model(cfg)
state = torch.load(sys.argv[2], weights_only=True)["model"]
assert set(state) == set(model.state_dict()), set(state) ^ set(model.state_dict())
DetectionCheckpointer(model).load(sys.argv[2])
assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
assert "projects" not in sys.modules
print("loaded", len(state))
"""


@pytest.fixture
def outside(tmp_path):
    """A folder with the package and the configs; runs Python there."""
    shutil.copytree(PACKAGE, tmp_path / "lib" / "my_dots", ignore=shutil.ignore_patterns("__py*"))
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "student.yaml").write_text(STUDENT)

    def run(*words):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


def last_metrics(folder) -> dict:
    """The newest value of every metric."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


def train(run, *words):
    result = run(ROOT / "train_net.py", *words)
    assert result.returncode == 0, result.stderr[-3000:]


def test_detector_taps_head_keys_and_data_from_outside(outside, tmp_path):
    wide = ("MODEL.DOT.WIDTH", 12, "OUTPUT_DIR", "teacher", "SOLVER.MAX_ITER", 1)
    train(outside, "--config-file", "base.yaml", *IMPORTS, *wide)
    assert "loss_dot" in last_metrics(tmp_path / "teacher")

    weights = ("KD.TEACHER.WEIGHTS", "teacher/model_final.pth")
    train(outside, "--config-file", "student.yaml", *IMPORTS, *weights)
    metrics = last_metrics(tmp_path / "student")
    assert metrics["loss_dot"] > 0 and metrics["loss_kd_score_match"] > 0
    assert metrics["loss_kd_mimic"] == 0, "its schedule starts after the last iteration"
    assert metrics["total_loss"] == pytest.approx(
        metrics["loss_dot"] + metrics["loss_kd_score_match"], rel=1e-4
    )
    assert 0 <= metrics["bbox/AP"] <= 100

    final = tmp_path / "student" / "model_final.pth"
    saved = torch.load(final, weights_only=True)
    assert not any("teacher" in name for name in saved["model"])
    # Mimic's adapters from 4 to 12 channels; ScoreMatch has no parameters
    assert sorted(name for name in saved["distill"] if name.endswith("weight")) == [
        "Mimic.adapters.coarse.weight",
        "Mimic.adapters.fine.weight",
    ]
    result = outside("-c", STOCK, "base.yaml", final)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["loaded", str(len(saved["model"]))]


def test_without_the_import_the_unknown_key_is_named(outside):
    result = outside(ROOT / "train_net.py", "--config-file", "base.yaml")
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert "base.yaml: unknown key MODEL.DOT (is the module that adds it in KD.IMPORTS?)" in line
    assert "Traceback" not in result.stderr
