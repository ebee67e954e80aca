"""The warning about a run that does not learn: silent on finished runs, and there at rate 0."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import kd_models
import pytest
from detectron2.utils.events import EventStorage

from projects.kd.engine.learning import (
    BLOCK,
    LEAST,
    SETTLING,
    LearningCheck,
    flat,
    suspects,
    task_losses,
)

# Task losses of the first tenth and more of runs on shapes, medians of 20 iterations: Faster and
# Cascade R-CNN and GFL, plain and with CWD or PKD, of 400 to 4800 iterations; they ended at 4 to 79
# AP.
LOGS = json.loads(Path(__file__).with_name("learning_logs.json").read_text())


@pytest.mark.parametrize("run", LOGS.values(), ids=LOGS)
def test_no_alarm_in_runs_that_learnt(run):
    series = list(run["losses"].values())
    looked = 0
    for length in range(SETTLING + LEAST, len(series[0]) + 1):
        if 10 * BLOCK * length >= run["iterations"]:
            looked += 1
            assert flat([values[SETTLING:length] for values in series]) is not True
    assert looked > 2


def train(steps, losses, max_iter=2000, start=0, metrics=None, whole=False, rate=0.02):
    """A hook that saw a run of made-up losses; ``metrics``: iterations to results."""
    cfg = kd_models.tiny_cfg(SOLVER__MAX_ITER=max_iter, SOLVER__BASE_LR=rate, OUTPUT_DIR="out")
    hook = LearningCheck(cfg, lambda: whole)
    with EventStorage(start) as storage:
        hook.trainer = SimpleNamespace(
            storage=storage, iter=start, start_iter=start, max_iter=max_iter, failed=False
        )
        hook.before_train()
        for done in range(start + 1, start + steps + 1):
            storage.iter = hook.trainer.iter = done - 1
            storage.put_scalars(**losses(done))
            storage.put_scalar("lr", rate, smoothing_hint=False)
            storage.put_scalars(**(metrics or {}).get(done, {}), smoothing_hint=False)
            hook.after_step()
        hook.trainer.iter = start + steps
        hook.after_train()
    return hook


def noise(draw, falling=0.0):
    """Losses that scatter by a third around what they are, as those of single batches do."""
    return lambda done: {
        "loss_cls": draw.lognormvariate(-falling * done, 0.33),
        "loss_box_reg": draw.lognormvariate(-1, 0.33),
        "loss_kd_cwd": 50.0 / done,  # distillation may go on all the same
    }


def test_a_learning_rate_of_zero_is_noticed_and_said_once(caplog):
    for seed in range(5):
        caplog.clear()
        train(1500, noise(random.Random(seed)), rate=1e-12)
        (record,) = caplog.records
        assert (
            "own losses are still what they were" in record.message
            and "Check first: (1)" in record.message
        )
        assert "SOLVER.BASE_LR 1e-12" in record.message and "rate is 1e-12 now" in record.message
        assert "\n" not in record.message


def test_a_normaliser_that_settles_hides_nothing(caplog):
    draw = random.Random(2)
    scale = [1.0]

    def losses(
        done,
    ):  # as detectron2's dense detectors divide: by a running mean that starts at 100
        scale[0] = 100.0 if done == 1 else 0.9 * scale[0] + 0.1 * 2.0
        return {"loss_cls": draw.lognormvariate(0, 0.2) / scale[0]}

    train(1500, losses, rate=1e-12)
    assert len(caplog.records) == 1


def test_losses_that_fall_are_not(caplog):
    for seed in range(5):
        train(1500, noise(random.Random(seed), falling=0.002))
    assert not caplog.records


def test_a_whole_detector_a_resumed_run_and_one_that_detects_are_not_judged_by_losses(caplog):
    train(1500, noise(random.Random(0)), whole=True)
    train(1500, noise(random.Random(0)), start=100)
    train(1500, noise(random.Random(0)), metrics={50: {"bbox/AP": 0.3}})
    train(1900, noise(random.Random(0)), max_iter=20000)  # before a tenth of the run
    assert not caplog.records


def test_an_ap_of_zero_at_the_first_evaluation_is_said(caplog):
    falling = noise(random.Random(0), falling=0.01)
    nothing = {"bbox/AP": 0.0, "bbox/AP50": 0.4, "segm/AP": float("nan")}
    train(600, falling, metrics={300: nothing, 600: nothing})
    (record,) = caplog.records
    assert "bbox/AP, segm/AP 0 at the first evaluation, after 300 iterations" in record.message
    caplog.clear()
    train(600, falling, metrics={100: nothing})  # too early to mean anything
    train(600, falling, metrics={300: {"bbox/AP": 0.02}, 600: {"bbox/AP": 0.0}})
    train(600, falling, metrics={300: {"bbox/AP": float("nan")}})
    train(600, falling, start=300, metrics={600: nothing})
    assert not caplog.records


def test_an_uncertain_answer_is_none():
    draw = random.Random(0)
    assert flat([[draw.gauss(1, 0.3) for _ in range(10)]]) is None
    assert flat([[1.0] * 6, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]]) is False
    assert flat([[1.0] * 6, [2.0, 2.1] * 3]) is True


def test_losses_are_medians_of_twenty_without_those_of_heads():
    with EventStorage(0) as storage:
        for i in range(105):
            storage.iter = i
            storage.put_scalars(loss_cls=float(i), loss_kd_x=1.0, loss_aux_x=1.0, loss_null=0.0)
        assert task_losses(storage) == [[69.5, 89.5]]


def test_what_to_check_follows_the_config():
    def of(**values):
        return suspects(kd_models.tiny_cfg(OUTPUT_DIR="out", **values), 0.005)

    assert "4 images a step" in of(SOLVER__ACCUM_STEPS=2)[0]
    assert "backbone starts at random" in of()[1]
    weights = of(MODEL__WEIGHTS="R-50.pkl")[1]
    assert weights.endswith("those of the weights R-50.pkl") and "PIXEL_MEAN" in weights
    assert "--config-file out/config.yaml --dataset shapes_train" in of()[2]
