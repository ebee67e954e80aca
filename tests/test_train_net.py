"""The command line: training, resuming, evaluation of the student alone, and refusals."""

import os
import subprocess
import sys
from pathlib import Path

import kd_models
import pytest
import torch
import toy_data

from projects.kd import evaluation, teacher_building
from projects.kd.commands import train
from projects.kd.errors import ConfigError

ROOT = Path(__file__).parents[1]
NAME = "noise_command"


@pytest.fixture
def config(tmp_path, monkeypatch):
    toy_data.register_noise(tmp_path, NAME)
    evaluated = []

    def evaluate(cfg, model, output_dir=None):
        evaluated.append(model)
        return {"bbox": {"AP": 2.0}}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(train, "evaluate", evaluate)
    cfg = kd_models.tiny_cfg(
        MODEL__BACKBONE__NAME="build_toy_fpn_backbone",
        DATASETS__TRAIN=(NAME,),
        DATASETS__TEST=(NAME,),
        INPUT__MIN_SIZE_TRAIN=(32,),
        SOLVER__MAX_ITER=2,
        SOLVER__STEPS=(),
        SOLVER__CHECKPOINT_PERIOD=1,
        SEED=1,
        OUTPUT_DIR=str(tmp_path / "out"),
    )
    return kd_models.write_config(cfg, tmp_path / "student.yaml"), evaluated


def run(*words):
    return train.main(train.parse_arguments([str(word) for word in words]))


def test_train_refuse_resume_evaluate(config, tmp_path):
    path, evaluated = config
    out = tmp_path / "out"
    assert run("--config-file", path) == {"bbox": {"AP": 2.0}}
    assert {"config.yaml", "log.txt", "metrics.json", "model_final.pth"} <= set(os.listdir(out))
    before = {name: (out / name).read_bytes() for name in ("config.yaml", "model_final.pth")}

    with pytest.raises(ConfigError, match="already holds model_.*add --resume") as caught:
        run("--config-file", path, "SOLVER.MAX_ITER", "3")
    assert "\n" not in str(caught.value)
    assert all((out / name).read_bytes() == data for name, data in before.items())

    run("--config-file", path, "--resume", "SOLVER.MAX_ITER", "3")
    saved = torch.load(out / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 2 and "distill" not in saved

    trained = (out / "config.yaml").read_bytes()
    weights = out / "model_0000000.pth"
    run("--config-file", path, "--eval-only", "MODEL.WEIGHTS", weights)
    assert (out / "config.yaml").read_bytes() == trained
    state = torch.load(weights, weights_only=True)["model"]
    assert all(torch.equal(v, state[k]) for k, v in evaluated[-1].state_dict().items())


def test_eval_only_never_builds_a_teacher(config, tmp_path, monkeypatch):
    path, evaluated = config
    teacher = kd_models.write_teacher(tmp_path)
    monkeypatch.setattr(teacher_building, "build_teacher", lambda cfg: pytest.fail("teacher built"))
    options = ["KD.META_ARCHITECTURE", "DistillMetaArch", "KD.HEADS", "('Mimic',)"]
    options += ["KD.TEACHER.CONFIG_FILE", teacher[0], "KD.TEACHER.WEIGHTS", "missing.pth"]
    run("--config-file", path, "--eval-only", "--untrained", *options)
    assert type(evaluated[-1]).__name__ == "RetinaNet"


def test_tta_evaluates_the_augmented_student(tmp_path, monkeypatch):
    seen = []

    def evaluate(cfg, model, output_dir):
        seen.append((type(model).__name__, Path(output_dir).name))
        return {"bbox": {"AP": 3.0}}

    monkeypatch.setattr(train, "evaluate", evaluate)
    cfg = kd_models.tiny_cfg("GeneralizedRCNN", OUTPUT_DIR=str(tmp_path))
    student = kd_models.build(cfg)
    assert train.test_with_tta(cfg, student) == {"bbox_TTA": {"AP": 3.0}}
    assert seen == [("GeneralizedRCNNWithTTA", "inference_TTA")]


def test_flags_that_belong_together(config):
    path, _ = config
    with pytest.raises(ConfigError, match="--method need --teacher"):
        run("--config-file", path, "--method", "CWD")
    with pytest.raises(ConfigError, match="TEST.AUG.ENABLED"):
        options = ["MODEL.META_ARCHITECTURE", "ProposalNetwork", "TEST.AUG.ENABLED", "True"]
        options += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[16]]"]
        run("--config-file", path, "--eval-only", "--untrained", *options)


def test_user_errors_are_one_line_and_status_2(tmp_path):
    command = [sys.executable, "train_net.py", "--config-file", str(tmp_path / "none.yaml")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: --config-file") and "none.yaml" in line
    assert "Traceback" not in result.stderr


def test_random_weights_are_evaluated_only_when_asked_for(config, tmp_path):
    path, evaluated = config
    words = ("--config-file", path, "--eval-only")
    with pytest.raises(ConfigError, match=r"^MODEL\.WEIGHTS is empty: .* or add --untrained"):
        run(*words)
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR .*out holds none to --resume"):
        run(*words, "--resume")
    with pytest.raises(ConfigError, match=r"^DATASETS\.TEST is empty"):
        run(*words, "--untrained", "DATASETS.TEST", "()")
    assert not evaluated and not (tmp_path / "out").exists()
    assert run(*words, "--untrained") == {"bbox": {"AP": 2.0}}
    state = evaluated[0].state_dict()
    torch.save({"model": state}, tmp_path / "whole.pth")
    del state["head.cls_score.bias"]
    torch.save({"model": state}, tmp_path / "partial.pth")
    run(*words, "MODEL.WEIGHTS", tmp_path / "whole.pth")
    partial = ("MODEL.WEIGHTS", tmp_path / "partial.pth")
    with pytest.raises(ConfigError, match=r"lacks 1 of the parameters .*--untrained"):
        run(*words, *partial)
    run(*words, "--untrained", *partial)
    assert len(evaluated) == 3
