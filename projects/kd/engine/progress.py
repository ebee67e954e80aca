"""One line a period that a person can read, and a progress bar where there is a terminal."""

from __future__ import annotations

import contextlib
import datetime
import logging
import re
import sys
from collections.abc import Sequence
from typing import TextIO

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .best import BestResult

logger = logging.getLogger(__name__)

_LOGGERS = ("fvcore", "detectron2", "projects")  # those that engine/writers.py sends to log.txt
_TASKS = ("AP", "mIoU", "PQ")  # the metric of a task that is shown
_WINDOW = 20  # iterations of which a loss is the median
_DONE = re.compile(r"(?:^|\s)(\d+)/\d+ \(\d+ %\)")
_STEP = re.compile(r" ([\d.e+-]+) s a step")


class Progress(HookBase):
    """Logs a line a period; on a terminal a bar takes its place, and the line goes to log.txt.

    Args:
        heads: names of the imitation heads.
        period: iterations between two lines.
        best: the evaluations so far, or None.
        stream: for the bar; default: standard error, if it and the standard output are terminals.
            ``TQDM_DISABLE=1`` in the environment leaves the bar out.
    """

    def __init__(
        self,
        heads: Sequence[str] = (),
        period: int = 20,
        best: BestResult | None = None,
        stream: TextIO | None = None,
    ):
        self.heads, self.period, self.best = tuple(heads), period, best
        self.stream = stream
        self._bar: tqdm | None = None
        self._open = contextlib.ExitStack()

    def before_train(self) -> None:
        """Start the bar."""
        stream = self.stream or sys.stderr
        if not stream.isatty() or (self.stream is None and not sys.stdout.isatty()):
            return
        start, total = self.trainer.start_iter, self.trainer.max_iter
        bar = tqdm(total=total, initial=start, file=stream, dynamic_ncols=True, unit="step")
        if bar.disable:
            return
        self._bar = self._open.enter_context(contextlib.closing(bar))
        logs = [logging.getLogger(name) for name in _LOGGERS]
        self._open.enter_context(logging_redirect_tqdm(logs))  # lines go above the bar

    def after_step(self) -> None:
        """Move the bar, and say where the run is."""
        if self._bar is not None:
            self._bar.update()
        done, total = self.trainer.iter + 1, self.trainer.max_iter
        if done % self.period == 0 or done == total:
            seconds = time_left(self.trainer.storage, total - done)
            if seconds is not None:
                self.trainer.storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
            self._tell(period_line(self.trainer.storage, done, total, self.heads, self.best))

    def after_train(self) -> None:
        """Take the bar away."""
        self._open.close()
        self._bar = None

    def _tell(self, line: str) -> None:
        if self._bar is None:
            logger.info(line)
            return
        self._bar.set_postfix_str(line.partition(" | ")[2])
        record = logger.makeRecord(logger.name, logging.INFO, "", 0, line, (), None)
        for handler in logging.getLogger("projects").handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)


def time_left(storage: EventStorage, steps: int) -> float | None:
    """Seconds for so many steps, without evaluations; None before the first are timed."""
    if "time" not in storage.histories():
        return None
    return storage.history("time").median(1000) * steps


def period_line(
    storage: EventStorage,
    done: int,
    total: int,
    heads: Sequence[str] = (),
    best: BestResult | None = None,
) -> str:
    """Where a run is: iterations, time left, losses, the heads' shares, AP, speed, learning rate.

    Losses are medians of the last 20 iterations. A head's share is that of its ``loss_kd_*`` in
    the sum of all losses; with KD.BALANCE that of its gradient (:mod:`~projects.kd.balance`) is
    said as well.

    Args:
        storage: of the run.
        done, total: finished iterations, and all.
        heads: names of the imitation heads.
        best: the evaluations so far, or None.
    """
    seconds = time_left(storage, total - done)
    left = "" if seconds is None else f", {datetime.timedelta(seconds=round(seconds))} left"
    parts = [f"{done}/{total} ({100 * done / total:.0f} %){left}", _losses(storage, heads)]
    parts += [_metrics(storage, best), _speed(storage)]
    return " | ".join(part for part in parts if part)


def read_period_line(line: str) -> tuple[int, float | None] | None:
    """Finished iterations and seconds of one, out of a line of the log with :func:`period_line`.

    Returns:
        None for other lines; the seconds are None where the line does not say them.
    """
    done, step = _DONE.search(line), _STEP.search(line)
    if done is None:
        return None
    return int(done[1]), float(step[1]) if step else None


def _losses(storage: EventStorage, heads: Sequence[str]) -> str:
    """Sum and parts; a head's losses are added up under its name."""
    parts: dict[str, float] = {}
    for name, history in storage.histories().items():
        if name.startswith("loss"):
            value = history.median(storage.count_samples(name, _WINDOW))
            title = _title(name, heads)
            parts[title] = parts.get(title, 0.0) + value
    total = sum(parts.values())
    shown = []
    for title, value in parts.items():
        shares = [f"{100 * value / total:.0f} %"] if title in heads and total else []
        measured = f"kd/share_{title}"
        if measured in storage.latest():
            shares.append(f"{storage.latest()[measured][0]:.2f} of the gradient")
        shown.append(f"{title} {value:.3g}" + (f" ({', '.join(shares)})" if shares else ""))
    return f"loss {total:.4g}: {', '.join(shown)}" if parts else ""


def _title(loss: str, heads: Sequence[str]) -> str:
    if loss.startswith("loss_kd_"):
        words = loss.removeprefix("loss_kd_") + "_"
        fitting = [head for head in heads if words.startswith(f"{head.lower().replace('-', '_')}_")]
        return max(fitting, key=len, default=loss.removeprefix("loss_"))
    return loss.removeprefix("loss_")


def main_metrics(storage: EventStorage) -> dict[str, tuple[float, int]]:
    """The latest AP, mIoU and PQ of each task: name to (value, iteration it was put at)."""
    return {
        name: entry for name, entry in storage.latest().items() if name.rpartition("/")[2] in _TASKS
    }


def _metrics(storage: EventStorage, best: BestResult | None) -> str:
    parts = [f"{name} {value:.1f}" for name, (value, _) in main_metrics(storage).items()]
    if best is not None and best.best is not None:
        parts.append(f"best {best}")
    return ", ".join(parts)


def _speed(storage: EventStorage) -> str:
    parts = []
    known = storage.histories()
    if "time" in known:
        step = known["time"].median(storage.count_samples("time", _WINDOW))
        parts.append(f"{step:.3g} s a step")
    if "data_time" in known:
        data = known["data_time"].avg(storage.count_samples("data_time", _WINDOW))
        parts.append(f"{data:.2g} s of it waiting for data")
    if "lr" in known:
        parts.append(f"lr {known['lr'].latest():.3g}")
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MB")
    return ", ".join(parts)
