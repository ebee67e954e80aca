"""model_card.md says what the weights beside it are, and how to load them."""

import re
import subprocess
from pathlib import Path

import kd_models
import pytest
import torch

from projects.kd.engine import model_card
from projects.kd.engine.model_card import about, card_text, write_card

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {"model_final.pth": (90, {}), "model_best.pth": (60, {"bbox/AP": 31.237, "bbox/AP50": 5})}


def test_it_names_teacher_method_metrics_and_versions(tmp_path):
    teacher = kd_models.write_teacher(tmp_path)
    cfg = kd_models.distill_cfg(teacher, OUTPUT_DIR=str(tmp_path), KD__HEADS=("CWD", "FGFI"))
    cfg.KD.CWD.WEIGHT = 2.5
    student = torch.nn.Linear(4, 5)
    rows = dict(about(cfg, student, seed=7))
    assert rows["detector"].endswith(", 25 parameters") and "RetinaNet" in rows["detector"]
    assert rows["teacher"] == f"{cfg.KD.TEACHER.CONFIG_FILE}, {cfg.KD.TEACHER.WEIGHTS}"
    assert rows["method"].startswith("CWD (KD.CWD.WEIGHT 2.5), FGFI (KD.FGFI.WEIGHT ")
    assert "seed 7" in rows["trained on"] and "shapes_train" in rows["trained on"]
    assert torch.__version__ in rows["versions"]
    text = Path(write_card(cfg, student, 7, RESULTS)).read_text()
    assert "| file | iterations | bbox/AP | bbox/AP50 |" in text
    assert "| `model_best.pth` | 60 | 31.24 | 5.00 |" in text
    assert "| `model_final.pth` | 90 |  |  |" in text
    plain = dict(about(kd_models.tiny_cfg(), student, 7))
    assert not {"teacher", "method"} & plain.keys() and plain["started from"] == "random weights"


def test_the_commit_is_that_of_this_checkout_alone(tmp_path, monkeypatch):
    head = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(head, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a checkout of git")
    assert model_card.commit().removesuffix("-dirty") == found.stdout.strip()
    monkeypatch.setattr(model_card, "_ROOT", ROOT / "projects")  # a package inside another's
    assert model_card.commit() == ""
    monkeypatch.setattr(model_card, "_ROOT", tmp_path)
    assert model_card.commit() == ""


def test_the_code_on_it_loads_the_weights(tmp_path, monkeypatch):
    cfg = kd_models.tiny_cfg(OUTPUT_DIR=str(tmp_path))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    student = kd_models.build(cfg, seed=3)
    torch.save({"model": student.state_dict()}, tmp_path / "model_final.pth")
    text = card_text(cfg, student, 0, {"model_final.pth": (9, {})})
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    ours, theirs = student.state_dict(), names["model"].state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
