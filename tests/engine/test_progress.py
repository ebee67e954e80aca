"""The line of a period, and the bar that takes its place on a terminal."""

import functools
import io
import logging
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

from projects.kd.engine import progress
from projects.kd.engine.best import BestResult
from projects.kd.engine.progress import Progress, period_line, read_period_line, time_left


def fill(storage, steps=40):
    for i in range(steps):
        storage.iter = i
        storage.put_scalars(loss_cls=1.5, loss_box_reg=0.5, total_loss=3.0)
        storage.put_scalars(loss_kd_fgd_cells=0.5, loss_kd_fgd_global=0.25)
        storage.put_scalars(loss_kd_other=0.25, time=0.5, data_time=0.1)
        storage.put_scalar("lr", 0.01, smoothing_hint=False)


def test_a_line_has_time_left_losses_shares_metrics_and_speed(tmp_path):
    best = BestResult(str(tmp_path), "bbox/AP")
    best.take({"bbox": {"AP": 14.0}}, 20)
    with EventStorage(0) as storage:
        assert period_line(storage, 1, 100) == "1/100 (1 %)"
        assert read_period_line("1/100 (1 %)") == (1, None)
        fill(storage)
        line = period_line(storage, 40, 100, ("FGD", "FG"))
        losses = "loss 3: cls 1.5, box_reg 0.5, FGD 0.75 (25 %), kd_other 0.25"
        speed = "0.5 s a step, 0.1 s of it waiting for data, lr 0.01"
        assert line.startswith(f"40/100 (40 %), 0:00:30 left | {losses} | {speed}")
        scalars = {"bbox/AP": 12.34, "bbox/AP50": 30.0, "sem_seg/mIoU": 5.0, "kd/share_FGD": 0.2}
        storage.put_scalars(**scalars, smoothing_hint=False)
        line = period_line(storage, 40, 100, ("FGD",), best)
        assert "FGD 0.75 (25 %, 0.20 of the gradient)" in line
        assert "| bbox/AP 12.3, sem_seg/mIoU 5.0, best bbox/AP 14 after 20 iterations |" in line
        assert read_period_line(f"[07/27 12:00:00 name]: {line}\n") == (40, 0.5)
        assert read_period_line("[07/27 12:00:00 name]: Inference done 40/100. 0.5 s") is None
        assert time_left(storage, 60) == 30.0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(hook, total=40):
    with EventStorage(0) as storage:
        hook.trainer = SimpleNamespace(storage=storage, iter=0, start_iter=0, max_iter=total)
        hook.before_train()
        for i in range(total):
            storage.iter = hook.trainer.iter = i
            storage.put_scalars(loss_cls=1.0, time=0.5)
            hook.after_step()
            if i == 10:
                logging.getLogger("projects.somewhere").warning("in between")
        hook.after_train()
        assert storage.latest()["eta_seconds"] == (0.0, total - 1)


@pytest.fixture
def logs(tmp_path):
    """The loggers as a run has them: a console and a file."""
    log, console = logging.getLogger("projects"), io.StringIO()
    handlers = [logging.StreamHandler(console), logging.FileHandler(tmp_path / "log.txt")]
    before, level, passes = log.handlers, log.level, log.propagate
    log.handlers, log.propagate = handlers, False
    log.setLevel(logging.INFO)
    yield console, tmp_path / "log.txt"
    log.handlers, log.propagate = before, passes
    log.setLevel(level)
    handlers[1].close()


def test_without_a_terminal_there_is_a_line_a_period_and_no_bar(logs):
    console, file = logs
    stream = io.StringIO()
    run(Progress(stream=stream))
    lines = console.getvalue().splitlines()
    assert len(lines) == 3 and lines[0] == "in between"
    assert lines[1].startswith("20/40 (50 %), 0:00:10 left | loss 1: cls 1 | 0.5 s a step")
    assert file.read_text() == console.getvalue() and stream.getvalue() == ""


def test_on_a_terminal_the_bar_takes_the_place_of_the_lines(logs, monkeypatch):
    console, file = logs
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    run(Progress(stream=stream))
    text = stream.getvalue()
    assert "40/40" in text and "loss 1: cls 1 | 0.5 s a step" in text
    assert console.getvalue() == "in between\n"
    lines = file.read_text().splitlines()
    assert len(lines) == 3 and lines[2].startswith("40/40 (100 %)") and "\r" not in file.read_text()
    own = (logging.StreamHandler, logging.FileHandler)  # pytest may have added its own
    assert sum(type(x) in own for x in logging.getLogger("projects").handlers) == 2
    stream.truncate(0)
    # what TQDM_DISABLE=1 sets when tqdm is imported
    monkeypatch.setattr(progress, "tqdm", functools.partial(progress.tqdm, disable=True))
    run(Progress(stream=stream))
    assert len(console.getvalue().splitlines()) == 4
