"""The best weights are kept, whatever is killed, and a run ends where nothing gets better."""

import json
import math
import multiprocessing
import os
import random
import signal

import kd_models
import pytest
import torch
import toy_data
from kd_runs import interrupt, run_settings, start
from safetensors import safe_open
from torch import nn

from projects.kd import evaluation
from projects.kd.engine import student_files
from projects.kd.engine.best import BestResult
from projects.kd.engine.checkpoint import DistillCheckpointer
from projects.kd.engine.student_files import write_best, write_safetensors
from projects.kd.errors import ConfigError
from projects.kd.evaluation.evaluators import check_best_metric

NAME = "noise_best"


def brute_force(values, lower, patience):
    """(place of the best, whether the last ``patience`` brought none) of values in order."""
    best = None
    for place, value in enumerate(values):
        if not math.isnan(value) and (
            best is None or (value < values[best] if lower else value > values[best])
        ):
            best = place
    enough = best is not None and 0 < patience <= len(values) - 1 - best
    return best, enough


def test_best_and_patience_equal_a_plain_search_also_after_a_resume(tmp_path):
    draw = random.Random(5)
    for case in range(12):
        lower, patience = draw.random() < 0.5, draw.randrange(0, 4)
        folder = tmp_path / str(case)
        folder.mkdir()
        values = [draw.choice([1.0, 2.0, 2.5, 3.0, math.nan]) for _ in range(8)]
        result = BestResult(str(folder), "bbox/AP", lower=lower, patience=patience)
        for place, value in enumerate(values):
            is_best = result.take({"bbox": {"AP": value}}, 10 * (place + 1))
            result.write()
            best, enough = brute_force(values[: place + 1], lower, patience)
            assert result.exhausted == enough
            assert is_best == (best == place)
            assert (result.best and result.best[0]) == (None if best is None else 10 * (best + 1))
        done = draw.randrange(1, 90)
        resumed = BestResult(str(folder), "bbox/AP", lower=lower, patience=patience)
        resumed.load(done)
        best, enough = brute_force(values[: done // 10], lower, patience)
        assert (
            resumed.exhausted == enough
            and list(resumed.values) == list(result.values)[: done // 10]
        )
        other = BestResult(str(folder), "bbox/AP50", lower=lower, patience=patience)
        other.load(done)
        assert not other.values


def test_a_missing_metric_and_a_damaged_file_are_one_line(tmp_path):
    result = BestResult(str(tmp_path), "bbox/AP49")
    with pytest.raises(ConfigError, match=r"no 'bbox/AP49', it gives bbox/AP, bbox/AP50$"):
        result.take({"bbox": {"AP": 1.0, "AP50": 2.0}}, 5)
    (tmp_path / "best.json").write_text('{"metric": "bbox/AP"')
    with pytest.raises(ConfigError, match=r"--resume: .*best\.json is damaged .*remove it"):
        result.load(5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"TEST__BEST_METRIC": "segm/AP"}, "'segm/AP', it must be a metric of bbox/..."),
        ({"TEST__BEST_METRIC": "AP"}, "'AP', it must be a metric of bbox/..."),
        ({"TEST__PATIENCE": 2}, "TEST.PATIENCE needs TEST.BEST_METRIC and a TEST.EVAL_PERIOD"),
        ({"TEST__PATIENCE": 2, "TEST__BEST_METRIC": "bbox/AP"}, "TEST.EVAL_PERIOD above 0"),
        ({"TEST__BEST_METRIC": "bbox/AP", "DATASETS__TEST": ()}, "needs a data set in DATASETS"),
    ],
)
def test_what_no_evaluation_can_give_is_refused(values, message):
    with pytest.raises(ConfigError) as caught:
        check_best_metric(kd_models.tiny_cfg(**values))
    assert message in str(caught.value)
    check_best_metric(kd_models.tiny_cfg(TEST__BEST_METRIC="bbox/AP-square"))


AP = {1: 5.0, 2: 3.0, 3: 9.0, 4: 8.0, 5: 9.0, 6: 20.0}  # by finished iterations


@pytest.fixture
def evaluations(tmp_path, monkeypatch):
    """Evaluation gives AP by how often the student was trained; the list of those made."""
    toy_data.register_noise(tmp_path, NAME)
    made = []

    def evaluate(cfg, model):
        done = min(evaluations.trainer.iter + 1, evaluations.trainer.max_iter)
        made.append(done)
        return {"bbox": {"AP": AP[done], "AP50": 2 * AP[done]}}

    class Made(list):
        trainer = None

    evaluations = Made()
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    evaluations.made = made
    return evaluations


def settings(tmp_path, folder, **more):
    return kd_models.tiny_cfg(
        **run_settings(tmp_path, folder, NAME)
        | {"SOLVER__CHECKPOINT_PERIOD": 1, "TEST__EVAL_PERIOD": 1, "TEST__BEST_METRIC": "bbox/AP"}
        | more
    )


def begin(evaluations, cfg, resume=False):
    evaluations.trainer = start(cfg, resume=resume)
    return evaluations.trainer


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_patience_ends_a_run_with_all_that_an_end_has(tmp_path, evaluations):
    run = tmp_path / "run"
    cfg = settings(
        tmp_path, "run", TEST__PATIENCE=2, SOLVER__KEEP_CHECKPOINTS=2, SOLVER__SAFETENSORS=True
    )
    results = begin(evaluations, cfg).train()
    assert evaluations.made == [1, 2, 3, 4, 5]  # the last one is not made twice
    assert results == {"bbox": {"AP": 9.0, "AP50": 18.0}}
    assert json.loads((run / "best.json").read_text())["best"] == [3, 9.0]
    numbered = sorted(path.name for path in run.glob("model_0*.pth"))
    assert numbered == ["model_0000003.pth", "model_0000004.pth"]
    final = torch.load(run / "model_final.pth", weights_only=True)
    assert final["iteration"] == 4 and same(final["model"], weights(run / "model_0000004.pth"))
    best = torch.load(run / "model_best.pth", weights_only=True)
    assert set(best) == {"model", "ema", "iteration", "bbox/AP"}
    assert best["iteration"] == 2 and best["bbox/AP"] == 9.0
    for name in ("model_best", "model_final"):
        with safe_open(run / f"{name}.safetensors", "pt") as file:
            state = weights(run / f"{name}.pth")
            assert all(torch.equal(file.get_tensor(k), v) for k, v in state.items())
    card = (run / "model_card.md").read_text()
    assert "| `model_final.pth` | 5 | 9.00 | 18.00 |" in card
    assert "| `model_best.safetensors` | 3 | 9.00 | 18.00 |" in card
    assert f"| trained on | {NAME}: SOLVER.MAX_ITER 6, 2 images a step, SGD" in card

    begin(evaluations, cfg, resume=True).train()  # nothing is left to train
    assert evaluations.made == [1, 2, 3, 4, 5, 5]
    assert same(weights(run / "model_final.pth"), final["model"])
    longer = settings(tmp_path, "run", TEST__PATIENCE=3)
    begin(evaluations, longer, resume=True).train()
    assert evaluations.made[6:] == [6]
    assert json.loads((run / "best.json").read_text())["best"] == [6, 20.0]
    assert same(weights(run / "model_best.pth"), weights(run / "model_final.pth"))


def test_a_run_that_was_killed_in_an_evaluation_ends_as_the_other(tmp_path, evaluations):
    begin(evaluations, settings(tmp_path, "straight")).train()
    broken = begin(evaluations, settings(tmp_path, "broken"))
    test = broken.outcome.evaluate
    broken.outcome.evaluate = lambda *words: 1 / 0 if broken.iter == 2 else test(*words)
    with pytest.raises(ZeroDivisionError):
        broken.train()
    evaluations.made.clear()
    trainer = begin(evaluations, settings(tmp_path, "broken"), resume=True)
    evaluate, evaluation.evaluate = evaluation.evaluate, None
    evaluation.evaluate = lambda cfg, model: (
        evaluate(cfg, model) if trainer.iter > 3 or evaluations.made else first(evaluations.made)
    )
    trainer.train()
    assert evaluations.made == [3, 4, 5, 6]
    found = [tmp_path / folder / "best.json" for folder in ("straight", "broken")]
    assert found[0].read_text() == found[1].read_text()
    best = [weights(tmp_path / folder / "model_best.pth") for folder in ("straight", "broken")]
    assert same(*best)


def first(made):
    made.append(3)
    return {"bbox": {"AP": AP[3], "AP50": 0.0}}


def test_a_metric_that_comes_to_nothing_costs_no_iteration(tmp_path, evaluations):
    cfg = settings(tmp_path, "run", TEST__BEST_METRIC="bbox/AP-dog", SOLVER__CHECKPOINT_PERIOD=1000)
    with pytest.raises(ConfigError, match="gives no 'bbox/AP-dog', it gives bbox/AP, bbox/AP50"):
        begin(evaluations, cfg).train()
    assert torch.load(tmp_path / "run/model_0000000.pth", weights_only=True)["iteration"] == 0
    trainer = begin(evaluations, settings(tmp_path, "run"), resume=True)
    assert trainer.start_iter == 1


def test_averaged_weights_are_kept_where_they_are_evaluated(tmp_path, evaluations):
    cfg = settings(
        tmp_path,
        "run",
        SOLVER__MAX_ITER=2,
        SOLVER__STEPS=(1,),
        SOLVER__EMA__ENABLED=True,
        SOLVER__EMA__EVAL_ONLY=True,
        SOLVER__EMA__DECAY=0.5,
        TEST__EVAL_PERIOD=2,
    )
    trainer = begin(evaluations, cfg)
    trainer.train()
    assert same(weights(tmp_path / "run/model_best.pth"), trainer.ema.average)
    assert not same(weights(tmp_path / "run/model_best.pth"), trainer.student.state_dict())
    other = start(cfg.clone())
    loader = DistillCheckpointer(other.student, use_ema=True, complete=True)
    loader.resume_or_load(str(tmp_path / "run/model_best.pth"), resume=False)
    assert same(other.student.state_dict(), trainer.ema.average)


def _die_in_torch_save(data, file):
    file.write(b"PK half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_write(folder):
    student_files.torch.save = _die_in_torch_save
    write_best(folder, nn.Linear(2, 3), 20, "bbox/AP", 2.0)


def test_a_kill_while_the_best_is_written_leaves_the_old_one(tmp_path):
    model = nn.Linear(2, 3)
    write_best(str(tmp_path), model, 10, "bbox/AP", 1.0)
    process = multiprocessing.get_context("fork").Process(
        target=_killed_write, args=(str(tmp_path),)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert same(weights(tmp_path / "model_best.pth"), model.state_dict())
    DistillCheckpointer(model, str(tmp_path)).save("model_final", iteration=3)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_tied_weights_are_written_under_both_names(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    path = write_safetensors(str(tmp_path / "m.safetensors"), model, {"iterations": "7"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "iterations": "7"}
    back = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    DistillCheckpointer(back, complete=True).resume_or_load(path, resume=False)
    assert same(back.state_dict(), model.state_dict())


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(data, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(student_files.torch, "save", full)
    with pytest.raises(ConfigError, match=r"^OUTPUT_DIR: cannot write .*model_best\.pth: No space"):
        write_best(str(tmp_path), nn.Linear(1, 1), 1, "bbox/AP", 1.0)
    assert not list(tmp_path.iterdir())


def test_old_checkpoints_go_but_never_the_one_to_resume_from(tmp_path):
    model = nn.Linear(2, 2)
    (tmp_path / "model_mine.pth").touch()
    saver = DistillCheckpointer(model, str(tmp_path), keep=1)
    for number in (30, 10, 20):  # a resume from an earlier one comes by here again
        saver.save(f"model_{number:07d}", iteration=number)
        os.utime(tmp_path / f"model_{number:07d}.pth", (number, number))
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000020.pth"
    saver.save("model_final", iteration=20)
    names = sorted(path.name for path in tmp_path.glob("model_*"))
    assert "model_mine.pth" in names and "model_final.pth" in names and len(names) == 3


def test_interrupted_before_any_evaluation_nothing_is_made_up(tmp_path, evaluations):
    cfg = settings(tmp_path, "run", TEST__EVAL_PERIOD=4)
    interrupt(begin(evaluations, cfg), at=3)
    begin(evaluations, cfg, resume=True).train()
    assert evaluations.made == [4, 6]
