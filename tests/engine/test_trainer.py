"""A run that is interrupted and resumed continues to the bit; hooks, averages and files."""

import json
import logging
import random

import kd_models
import numpy as np
import pytest
import torch
import toy_data
from kd_runs import ITERATIONS, interrupt, run_settings, start

from projects.kd import evaluation
from projects.kd.engine.hooks import running_floats, set_floats
from projects.kd.errors import ConfigError, DataError, TrainingError

NAME = "noise_trainer"


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda cfg, model: {"bbox": {"AP": 1.0}})
    return toy_data.register_noise(tmp_path, NAME)


def scramble():
    """Random numbers of another life: a resumed process has other generator states."""
    random.seed(123)
    np.random.seed(123)
    torch.manual_seed(123)


def curve(trainer, keys=("total_loss", "loss_cls", "loss_box_reg", "lr")):
    return {key: {i: v for v, i in trainer.storage.history(key).values()} for key in keys}


def assert_same_end(resumed, straight):
    ours, theirs = resumed.student.state_dict(), straight.student.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    state, other = resumed.state_dict(), straight.state_dict()
    assert_equal(state, other)


def assert_equal(one, other, path=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            if key not in ("data_time", "config"):  # the folder's name, and workers
                assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}[{i}]")
    else:
        assert one == other, path


def metrics(folder):
    """The last line of each iteration in metrics.json, without the timings."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    drop = ("time", "data_time", "rank_data_time", "eta_seconds")
    return {line["iteration"]: {k: v for k, v in line.items() if k not in drop} for line in lines}


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, workers):
    straight = start(kd_models.tiny_cfg(**run_settings(tmp_path, "straight", NAME)))
    straight.train()
    assert straight.student.loss_normalizer != 100

    settings = run_settings(tmp_path, "broken", NAME) | {"DATALOADER__NUM_WORKERS": workers}
    cfg = kd_models.tiny_cfg(**settings)
    interrupt(start(cfg), at=5)  # loses iteration 4, which is after the last checkpoint
    scramble()
    resumed = start(cfg, resume=True, seed=99)
    assert resumed.start_iter == 4
    resumed.train()
    assert curve(resumed) == curve(straight) | {
        "lr": {i: v for i, v in curve(straight)["lr"].items() if i >= 4}
    }
    assert_same_end(resumed, straight)
    # what users read: the medians reach back over the interruption
    assert metrics(tmp_path / "broken")[5] == metrics(tmp_path / "straight")[5]


def test_distilling_run_resumes_with_its_heads_and_images_without_labels(tmp_path):
    teacher = kd_models.write_teacher(
        tmp_path,
        kd_models.tiny_cfg(
            MODEL__BACKBONE__NAME="build_toy_fpn_backbone", MODEL__FPN__OUT_CHANNELS=24
        ),
    )
    settings = {
        "SOLVER__OPTIMIZER": "AdamW",
        "SOLVER__BASE_LR": 0.001,
        "SOLVER__ACCUM_STEPS": 2,
        "SOLVER__EMA__ENABLED": True,
        "SOLVER__EMA__DECAY": 0.9,
        "KD__WARMUP_ITERS": 3,
        "KD__UNLABELED__DATASETS": (NAME,),
        "KD__UNLABELED__IMAGES_PER_BATCH": 1,
    }

    def cfg(folder):
        return kd_models.distill_cfg(teacher, **(run_settings(tmp_path, folder, NAME) | settings))

    straight = start(cfg("straight"))
    adapters = straight.model.heads.state_dict()
    assert adapters  # the head has parameters that a resume must restore
    straight.train()
    interrupt(start(cfg("broken")), at=3)
    scramble()
    resumed = start(cfg("broken"), resume=True, seed=99)
    resumed.train()
    keys = ("total_loss", "loss_kd_mimic", "loss_cls")
    assert curve(resumed, keys) == curve(straight, keys)
    assert_same_end(resumed, straight)
    assert_equal(resumed.model.heads.state_dict(), straight.model.heads.state_dict())
    assert_equal(resumed.ema.average, straight.ema.average)
    saved = torch.load(tmp_path / "broken/model_final.pth", weights_only=True)
    assert set(saved) == {"model", "distill", "trainer", "ema", "iteration"}
    assert saved["iteration"] == ITERATIONS - 1
    assert set(saved["model"]) == set(straight.student.state_dict())


def test_random_seed_is_kept_in_the_checkpoint(tmp_path):
    settings = run_settings(tmp_path, "run", NAME) | {"SEED": -1}
    first = start(kd_models.tiny_cfg(**settings), seed=5)
    interrupt(first, at=5)
    np.random.seed(77)
    resumed = start(kd_models.tiny_cfg(**settings), resume=True)
    assert resumed.seed == first.seed
    resumed.train()
    assert curve(resumed)["loss_cls"].keys() == set(range(ITERATIONS))
    assert curve(resumed)["loss_cls"][3] == curve(first)["loss_cls"][3]


def test_evaluation_gets_the_plain_student_and_the_averaged_weights(tmp_path, monkeypatch):
    seen = []

    def evaluate(cfg, model):
        seen.append((type(model).__name__, model.head.cls_score.weight.detach().clone()))
        return {"bbox": {"AP": 1.0}}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    settings = run_settings(tmp_path, "run", NAME) | {
        "SOLVER__EMA__ENABLED": True,
        "SOLVER__EMA__EVAL_ONLY": True,
        "SOLVER__EMA__DECAY": 0.5,
        "TEST__EVAL_PERIOD": 3,
    }
    trainer = start(kd_models.tiny_cfg(**settings))
    assert trainer.train() == {"bbox": {"AP": 1.0}}
    assert [name for name, _ in seen] == ["RetinaNet", "RetinaNet"]
    assert torch.equal(seen[-1][1], trainer.ema.average["head.cls_score.weight"])
    assert not torch.equal(seen[-1][1], trainer.student.head.cls_score.weight)
    lines = metrics(tmp_path / "run")
    assert lines[2]["bbox/AP"] == lines[ITERATIONS]["bbox/AP"] == 1.0


def test_precise_bn_leaves_the_loss_normaliser_alone(tmp_path):
    settings = run_settings(tmp_path, "run", NAME) | {
        "TEST__PRECISE_BN__ENABLED": True,
        "TEST__PRECISE_BN__NUM_ITER": 2,
        "TEST__EVAL_PERIOD": 2,
    }
    with_it = start(kd_models.tiny_cfg(**settings))
    with_it.train()
    without = start(kd_models.tiny_cfg(**run_settings(tmp_path, "other", NAME)))
    without.train()
    assert curve(with_it) == curve(without)
    name = "backbone.bottom_up.stages.0.1.running_mean"
    assert not torch.equal(with_it.student.state_dict()[name], without.student.state_dict()[name])


def test_nan_stops_with_the_last_checkpoint(tmp_path, monkeypatch):
    evaluated = []
    monkeypatch.setattr(evaluation, "evaluate", lambda cfg, model: evaluated.append(1) or {})
    trainer = start(kd_models.tiny_cfg(**run_settings(tmp_path, "run", NAME)))
    step = trainer.run_step

    def run_step():
        if trainer.iter == ITERATIONS - 1:
            with torch.no_grad():
                trainer.student.head.bbox_pred.weight.fill_(float("nan"))
        step()

    trainer.run_step = run_step
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "iteration 5: not finite: loss_box_reg=nan" in message and "loss_cls=" in message
    assert "model_0000003.pth" in message and "\n" not in message
    assert not evaluated  # detectron2 alone would evaluate the broken weights
    assert not (tmp_path / "run/model_final.pth").exists()


def test_user_errors_leave_no_traceback_in_the_log(tmp_path, data):
    records = []
    log, handler = logging.getLogger("detectron2.engine.train_loop"), logging.Handler()
    handler.emit = lambda record: records.append(record) if record.exc_info else None
    log.addHandler(handler)
    try:
        (tmp_path / f"{NAME}_3.png").unlink()
        with pytest.raises(DataError, match=f"{NAME}_3.png"):
            start(kd_models.tiny_cfg(**run_settings(tmp_path, "run", NAME))).train()
        assert not records
        interrupt(start(kd_models.tiny_cfg(**run_settings(tmp_path, "other", NAME))), at=0)
        assert len(records) == 1  # a defect keeps its traceback
    finally:
        log.removeHandler(handler)


def test_changed_optimizer_cannot_resume(tmp_path):
    settings = run_settings(tmp_path, "run", NAME)
    interrupt(start(kd_models.tiny_cfg(**settings)), at=3)
    merged = settings | {"SOLVER__WEIGHT_DECAY_NORM": 0.0001}  # as all others: one group
    with pytest.raises(ConfigError, match="parameter groups of optimizer 'student'"):
        start(kd_models.tiny_cfg(**merged), resume=True)


def test_running_floats_are_those_that_change():
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.momentum = 0.9
            self.inner = torch.nn.Module()
            self.inner.mean = 1.0

    model = Counter()
    constants = running_floats(model, {})
    assert constants == {".momentum": 0.9, "inner.mean": 1.0}
    assert running_floats(model, constants) == {}
    model.inner.mean = 2.5
    model.inner.loss_normalizer = 100.0
    values = running_floats(model, constants)
    assert values == {"inner.mean": 2.5, "inner.loss_normalizer": 100.0}
    other = Counter()
    set_floats(other, values)
    assert (other.inner.mean, other.inner.loss_normalizer, other.momentum) == (2.5, 100.0, 0.9)
