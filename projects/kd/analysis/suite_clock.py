"""How long the rest of a suite takes, from the iterations that its runs have done."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..engine.progress import read_period_line
from .report import seconds_per_iteration
from .suites import Run, is_trained_once

WAITING, RUNNING, FINISHED = range(3)


@dataclass
class Work:
    """One run, as far as its time goes.

    Args:
        label: for messages.
        row: name of its row; all seeds of a row take the same time.
        kind: rows of one kind are alike, where nothing better is known.
        iterations: in total.
        done: so far.
        rate: measured seconds of an iteration, None where there is none yet.
        rest: measured seconds of a run beside its iterations: start, last evaluation.
        end: those behind its last line, the last evaluation.
        first: it is done before the others begin.
        state, started: set when the run begins and ends.
    """

    label: str
    row: str
    kind: str
    iterations: int
    done: int = 0
    rate: float | None = None
    rest: float | None = None
    end: float | None = None
    first: bool = False
    state: int = WAITING
    started: float = 0.0
    _seen: tuple[int, float] | None = field(default=None, repr=False)
    _last: float = 0.0

    def read(self, line: str, now: float) -> None:
        """Take progress and rate from a line of the run's log."""
        found = read_period_line(line)
        if found is None:
            return
        (self.done, rate), self._last = found, now
        if self._seen is None:
            self._seen = (self.done, now)
            self.rate = self.rate if rate is None else rate
        elif self.done > self._seen[0]:  # evaluations in between included
            self.rate = (now - self._seen[1]) / (self.done - self._seen[0])

    def left(self, now: float, rate: float, rest: float, end: float) -> float:
        """Seconds to go, with what is known of others where nothing is known of this one."""
        if self.state == FINISHED:
            return 0.0
        seconds = rate * (self.iterations - self.done)
        if self.state == WAITING:
            return seconds + rest
        if self._seen is None:
            return max(rest - (now - self.started), end) + seconds
        waited = now - self._last if self.done >= self.iterations else 0.0
        return seconds + max(end - waited, 0.0)

    def finish(self, now: float) -> None:
        """The run has ended."""
        if self._seen is not None:
            self.end = now - self._last
        self.state, self.done = FINISHED, self.iterations


class Clock:
    """The time left of a suite; its runs tell what they have done. Safe between threads.

    Args:
        runs: all of the suite.
        jobs: runs at a time.
        beside: whether other runs begin before those that are trained once have finished.
        now: the clock.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        jobs: int,
        beside: bool = False,
        now: Callable[[], float] = time.monotonic,
    ):
        self.jobs = jobs
        self.beside = beside
        self.now = now
        self.works = {id(run): _work_of(run) for run in runs}
        self._lock = threading.Lock()

    def start(self, run: Run) -> None:
        """The run begins, perhaps where it was interrupted."""
        with self._lock:
            work = self.works[id(run)]
            work.state, work.started = RUNNING, self.now()

    def read(self, run: Run, line: str) -> None:
        """A line of the run's output."""
        with self._lock:
            self.works[id(run)].read(line, self.now())

    def finish(self, run: Run) -> None:
        """The run has ended."""
        with self._lock:
            work = self.works[id(run)]
            work.finish(self.now())
            measured = _finished_rate(run)
            if measured is not None:
                work.rate, work.rest = measured

    def seconds_left(self) -> float | None:
        """Until all is done; None while no iteration was measured anywhere."""
        with self._lock:
            works = list(self.works.values())
            if all(work.state == FINISHED for work in works):
                return 0.0
            if all(work.rate is None for work in works):
                return None
            rest = _mean(work.rest for work in works) or 0.0
            end = _mean(work.end for work in works) or 0.0
            now = self.now()
            left = {id(w): w.left(now, _rate_of(w, works), rest, end) for w in works}
            phases = [works] if self.beside else [[w for w in works if w.first],
                                                  [w for w in works if not w.first]]  # fmt: skip
            total = 0.0
            for phase in phases:
                slots = [left[id(w)] for w in phase if w.state == RUNNING][: self.jobs]
                slots += [0.0] * (self.jobs - len(slots))
                for work in phase:
                    if work.state == WAITING:
                        slots[slots.index(min(slots))] += left[id(work)]
                total += max(slots)
            return total

    def line(self) -> str:
        """For the console: time left, what has finished, and where the running ones are."""
        left = self.seconds_left()
        with self._lock:
            works = list(self.works.values())
        finished = sum(work.state == FINISHED for work in works)
        running = [f"{w.label} {w.done}/{w.iterations}" for w in works if w.state == RUNNING]
        eta = "not known yet" if left is None else duration(left)
        return "; ".join([f"ETA {eta}", f"{finished} of {len(works)} runs done", *running])


def _rate_of(work: Work, works: Sequence[Work]) -> float:
    """Seconds of an iteration: its own, else those of its row, of its kind, of all."""
    if work.rate is not None:
        return work.rate
    same_row = [w.rate for w in works if w.row == work.row]
    same_kind = [w.rate for w in works if w.kind == work.kind]
    return _mean(same_row) or _mean(same_kind) or _mean(w.rate for w in works) or 0.0


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _work_of(run: Run) -> Work:
    once = is_trained_once(run.row)
    kind = run.row["role"] if once else ("distilled" if run.is_distilled else "plain")
    iterations, done = run.cfg.SOLVER.MAX_ITER, run.iterations_done()
    rate, rest = _finished_rate(run) or (seconds_per_iteration([run.dir]), None)
    work = Work(run.label, run.row["name"], kind, iterations, done, rate, rest, first=once)
    if run.finished() is not None and done == iterations:
        work.state = FINISHED
    return work


def _finished_rate(run: Run) -> tuple[float, float] | None:
    """Seconds of an iteration, and of all beside the iterations, of a finished run."""
    finished = run.finished()
    if finished is None:
        return None
    iterations = run.cfg.SOLVER.MAX_ITER
    rate = seconds_per_iteration([run.dir]) or finished["seconds"] / iterations
    return rate, max(finished["seconds"] - rate * iterations, 0.0)


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
