"""A signal finishes the step, writes a checkpoint and ends all processes; nothing is lost."""

import logging
import multiprocessing
import os
import signal
import sys
import time

import kd_models
import pytest
import torch
import toy_data
from detectron2.evaluation import DatasetEvaluator
from torch.utils.data import DataLoader

from projects.kd import evaluation, stopping
from projects.kd.engine.trainer import DistillTrainer
from projects.kd.errors import Stopped, exit_on_user_error

NAME = "noise_stopping"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda cfg, model: {"bbox": {"AP": 1.0}})
    monkeypatch.setattr(stopping._request, "time", -10.0)
    return toy_data.register_noise(tmp_path, NAME)


def start(tmp_path, folder, resume=False, **changes):
    settings = {
        "MODEL__BACKBONE__NAME": "build_toy_fpn_backbone",
        "DATASETS__TRAIN": (NAME,),
        "DATASETS__TEST": (),
        "INPUT__MIN_SIZE_TRAIN": (32, 48),
        "SOLVER__MAX_ITER": 5,
        "SOLVER__STEPS": (),
        "SEED": 11,
        "OUTPUT_DIR": str(tmp_path / folder),
    }
    torch.manual_seed(0)
    trainer = DistillTrainer(kd_models.tiny_cfg(**(settings | changes)))
    trainer.resume_or_load(resume)
    return trainer


def kill_in_step(trainer, signum, at):
    step = trainer._trainer._step

    def killed(losses):
        if trainer.iter == at:
            os.kill(os.getpid(), signum)
        step(losses)

    trainer._trainer._step = killed


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_finishes_the_step_and_the_resumed_run_is_the_straight_one(
    tmp_path, signum, monkeypatch, caplog
):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", "a b.yaml", "SEED", "11"])
    straight = start(tmp_path, "straight")
    straight.train()
    stopped = start(tmp_path, "stopped")
    kill_in_step(stopped, signum, at=2)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with caplog.at_level(logging.WARNING), pytest.raises(Stopped) as caught:
        stopped.train()
    assert caught.value.code == 128 + signum
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    file = tmp_path / "stopped/model_0000002.pth"
    assert torch.load(file, weights_only=True)["iteration"] == 2
    line = f"stopped by {signum.name}: 3 iterations are in {file}; to go on: python train_net.py "
    line += "--resume --config-file 'a b.yaml' SEED 11"
    assert [r.getMessage() for r in caplog.records if "stopped by" in r.getMessage()] == [line]
    assert not any(record.exc_info for record in caplog.records)
    resumed = start(tmp_path, "stopped", resume=True)
    assert resumed.start_iter == 3
    resumed.train()
    ours, theirs = resumed.student.state_dict(), straight.student.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_checkpoint_of_the_same_step_is_not_written_twice(tmp_path, monkeypatch):
    trainer = start(tmp_path, "run", SOLVER__CHECKPOINT_PERIOD=2)
    saved = []
    save = trainer.checkpointer.save
    monkeypatch.setattr(
        trainer.checkpointer, "save", lambda *a, **k: saved.append(a) or save(*a, **k)
    )
    kill_in_step(trainer, signal.SIGTERM, at=3)
    with pytest.raises(Stopped):
        trainer.train()
    assert saved == [("model_0000001",), ("model_0000003",)]


def test_a_signal_gives_up_the_evaluation(tmp_path, monkeypatch):
    class Evaluator(DatasetEvaluator):
        seen = 0

        def process(self, inputs, outputs):
            self.seen += 1
            os.kill(os.getpid(), signal.SIGTERM)

        def evaluate(self):
            pytest.fail("scores of a part of the data")

    def evaluate(cfg, model):
        inner = Evaluator()
        evaluator = stopping.AgreeingEvaluator(inner)
        batches = stopping.UntilStopped([1, 2, 3])
        assert len(batches) == 3
        for batch in batches:
            evaluator.process(batch, None)
        assert inner.seen == 1
        return evaluator.evaluate()

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    for period, at, file in ((2, 2, "model_0000001.pth"), (0, 5, "model_final.pth")):
        trainer = start(tmp_path, f"run{period}", TEST__EVAL_PERIOD=period)
        with pytest.raises(Stopped) as caught:
            trainer.train()
        assert f"{at} iterations are in" in caught.value.line and file in caught.value.line
        assert trainer.student.training
    resumed = start(tmp_path, "run0", resume=True)
    monkeypatch.setattr(evaluation, "evaluate", lambda cfg, model: {"bbox": {"AP": 7.0}})
    assert resumed.train() == {"bbox": {"AP": 7.0}}


def test_the_loader_ends_early_where_the_signal_has_killed_its_worker(monkeypatch):
    def dying():
        yield 1
        raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")

    class Batches:
        __len__, __iter__ = (lambda self: 2), (lambda self: dying())

    with pytest.raises(RuntimeError):
        list(stopping.UntilStopped(Batches()))
    stream = iter(stopping.UntilStopped(Batches()))
    assert next(stream) == 1
    asked = iter((0, 15))
    monkeypatch.setattr(stopping, "requested", lambda: next(asked))
    assert list(stream) == []


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        time.sleep(0.02)
        return index, os.getpid()


@pytest.mark.parametrize("signum", SIGNALS)
def test_loader_workers_serve_on_after_a_signal_to_the_group(signum):
    loader = DataLoader(Slow(), num_workers=1, collate_fn=list, worker_init_fn=stopping.serve_on)
    seen = []
    stream = iter(loader)
    for batch in stream:
        seen.append(batch[0][0])
        if len(seen) == 1:
            os.kill(batch[0][1], signum)
    assert seen == list(range(6))
    workers = stream._workers
    del stream
    assert not any(worker.is_alive() for worker in workers)


def _until_stopped(ready):
    with stopping.stop_after_step():
        ready.set()
        while not stopping.requested():
            time.sleep(0.01)
        os._exit(stopping.requested())


def test_a_launcher_passes_signals_on():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_until_stopped, args=(ready,))
    with stopping.passed_on() as received:
        process.start()
        assert ready.wait(20) and received() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        process.join(20)
        assert received() == signal.SIGUSR1
    assert process.exitcode == signal.SIGUSR1


def _asked_twice(gap):
    stopping.SAME_SECONDS = 0.2
    with stopping.stop_after_step():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(gap)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    os._exit(0)


@pytest.mark.parametrize(("gap", "status"), [(0.0, 0), (0.4, 128 + signal.SIGTERM)])
def test_a_second_signal_ends_at_once_but_not_a_copy_of_the_first(gap, status):
    process = multiprocessing.get_context("fork").Process(target=_asked_twice, args=(gap,))
    process.start()
    process.join(20)
    assert process.exitcode == status


def test_outside_of_training_a_signal_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: signal.SIG_DFL)
    for signum in SIGNALS:
        with pytest.raises(SystemExit) as caught, exit_on_user_error():
            raise Stopped(signum, stopping.NOT_TRAINING)
        assert caught.value.code == 128 + signum
        line = capsys.readouterr().err
        assert line.startswith(f"stopped by {signum.name}: ") and line.count("\n") == 1
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise KeyboardInterrupt
    assert caught.value.code == 130 and capsys.readouterr().err == "stopped by SIGINT\n"


def test_setting_up_ends_at_once():
    for signum in SIGNALS:
        with pytest.raises(Stopped), stopping.stop_at_once():
            os.kill(os.getpid(), signum)
            time.sleep(1)


def test_the_command_of_torchrun_is_one_of_torchrun(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--resume", "--config-file", "c.yaml"])
    assert stopping.command_to_resume() == "python train_net.py --resume --config-file c.yaml"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert stopping.command_to_resume().startswith("torchrun --nproc-per-node 8 train_net.py --r")
