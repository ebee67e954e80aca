"""The runs of a suite, several at a time, in the order in which they need each other."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent import futures

import torch

from ..arguments import whole
from ..errors import UserError
from .suite_clock import Clock, duration
from .suites import Run, Stopped, is_trained_once

CORES_A_RUN = 2  # of --jobs auto
CONTEXT_BYTES = 2**30  # what a process takes of a GPU beside its tensors; ours, rounded up
STOP_SECONDS = 60.0  # that a run has to write its checkpoint before it is killed
SHOW_SECONDS = 15.0  # between two lines of progress where the output is no terminal


def number_of_jobs(text: str) -> int | str:
    """Type of the flag ``--jobs``: a whole number from 1 on, or "auto"."""
    return text if text == "auto" else whole(1)(text)


class Console:
    """A line of progress: rewritten in place on a terminal, else a new one now and then."""

    def __init__(self, stream=None):
        self.stream = sys.stdout if stream is None else stream
        self._shown = -SHOW_SECONDS
        self._open = False

    def show(self, text: str) -> None:
        """The progress now."""
        now = time.monotonic()
        if self.stream.isatty():
            columns = os.get_terminal_size(self.stream.fileno()).columns
            line = text if len(text) < columns else text[: max(columns - 2, 0)] + "…"
            self.stream.write(f"\r\033[K{line}")
            self._open = True
        elif now - self._shown >= SHOW_SECONDS:
            self._shown = now
            self.stream.write(text + "\n")
        self.stream.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        start = "\r\033[K" if self._open else ""
        self._open = False
        self.stream.write(f"{start}{text}\n")
        self.stream.flush()


class SuiteRunner:
    """Executes runs, each when those that it needs are finished and there is room for it.

    What is trained once comes first. Runs that do not need it begin beside it (``beside``), or else
    wait, and it has every core where it is alone.

    Args:
        runs: of :func:`~.suites.make_runs`, in the order in which they should begin.
        jobs: runs at a time.
        console: for progress.
        beside: see above.
        fitting: how many runs have room at once, asked before each begins.
        deadline: a time of ``time.monotonic()`` at which runs are stopped; None = never.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        jobs: int,
        console: Console,
        *,
        beside: bool = False,
        fitting: Callable[[], int] | None = None,
        deadline: float | None = None,
    ):
        self.runs = list(runs)
        self.jobs = jobs
        self.console = console
        self.beside = beside
        self.fitting = fitting
        self.deadline = deadline
        self.clock = Clock(runs, jobs, beside)
        self._done: set[int] = set()
        self._running: dict[futures.Future, Run] = {}
        self._waiting = list(self.runs)
        self._stopped_at: float | None = None

    def execute(self, after_some: Callable[[], None]) -> bool:
        """Run all; ``after_some`` is called when a run has finished and others have not.

        Returns:
            False when the deadline came before the end.

        Raises:
            ConfigError: a run failed; those beside it were finished first, no other was begun.
        """
        failed: UserError | None = None
        stopped = False
        with futures.ThreadPoolExecutor(len(self.runs) or 1) as pool:
            try:
                while self._waiting or self._running:
                    self._begin(pool)
                    ended = futures.wait(self._running, 1.0, futures.FIRST_COMPLETED).done
                    for future in ended:
                        run = self._running.pop(future)
                        try:
                            future.result()
                            self._done.add(id(run))
                            self.clock.finish(run)
                        except Stopped:
                            stopped = True
                        except UserError as error:
                            failed = failed or error
                            self._waiting.clear()
                    if ended and (self._waiting or self._running) and not stopped:
                        self._begin(pool)  # the report takes seconds
                        after_some()
                    if self.deadline is not None and time.monotonic() >= self.deadline:
                        stopped = stopped or bool(self._waiting)
                        self._stop()
                    elif self._running:
                        self.console.show(self.clock.line())
            except BaseException:
                self._stop()
                raise
        if failed is not None:
            raise failed
        return not stopped

    def _begin(self, pool: futures.Executor) -> None:
        """Start every run that may start now."""
        room = self.jobs if self.fitting is None else min(self.jobs, max(self.fitting(), 1))
        first_left = any(is_trained_once(r.row) and id(r) not in self._done for r in self.runs)
        for run in list(self._waiting):
            if len(self._running) >= room:
                return
            if not all(id(needed) in self._done for needed in run.needs):
                continue
            once = is_trained_once(run.row)
            if first_left and not once and not self.beside:
                continue
            self._waiting.remove(run)
            place = f"{self.runs.index(run) + 1}/{len(self.runs)}"
            self.clock.start(run)
            future = pool.submit(
                run.execute, place, self._threads(once),
                lambda line, run=run: self.clock.read(run, line), self.console.say,
            )  # fmt: skip
            self._running[future] = run

    def _threads(self, once: bool) -> int:
        """CPU threads of a run; it does not depend on what runs beside it, as rounding would."""
        independent = sum(is_trained_once(run.row) and not run.needs for run in self.runs)
        if self.jobs == 1 or (once and independent == 1 and not self.beside):
            return 0
        return max(1, (os.cpu_count() or 1) // self.jobs)

    def _stop(self) -> None:
        """End the running ones, after a minute by force; none begins any more."""
        self._waiting.clear()
        now = time.monotonic()
        first = self._stopped_at is None
        self._stopped_at = now if first else self._stopped_at
        for run in self._running.values():
            if first or now - self._stopped_at > STOP_SECONDS:
                run.stop(kill=not first)


def fitting_on_gpu(runs: Sequence[Run], free: int) -> Callable[[], int]:
    """How many runs fit on the GPU, by the most memory that one of them has taken so far.

    Args:
        runs: of the suite.
        free: bytes of the GPU's memory that are free while none of them runs.
    """

    def fitting() -> int:
        peak = max((run.gpu_peak_mb or 0.0 for run in runs), default=0.0) * 1e6
        # torch keeps freed blocks: half as much again, where it was seen
        return len(runs) if peak == 0 else int(free // (1.5 * peak + CONTEXT_BYTES))

    return fitting


def execute_suite(
    runs: Sequence[Run],
    jobs: int | str,
    after_some: Callable[[], None],
    minutes: float | None = None,
    console: Console | None = None,
) -> bool:
    """Execute the runs of a suite; see :class:`SuiteRunner`.

    Args:
        runs: all of them.
        jobs: a number, or "auto": a run for every two cores, fewer if the GPU's memory is smaller.
        after_some: writes a report in between.
        minutes: after so many, what runs is stopped; None = never.
        console: where progress is shown.

    Returns:
        Whether all has finished.
    """
    console = console or Console()
    number = max(1, (os.cpu_count() or 1) // CORES_A_RUN) if jobs == "auto" else jobs
    on_gpu = any(run.cfg.MODEL.DEVICE.startswith("cuda") for run in runs)
    on_gpu = on_gpu and torch.cuda.is_available()
    fitting = None
    if on_gpu and jobs == "auto":
        fitting = fitting_on_gpu(runs, torch.cuda.mem_get_info()[0])
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    runner = SuiteRunner(
        runs, number, console, beside=number > 1, fitting=fitting, deadline=deadline
    )  # fmt: skip
    start = time.monotonic()
    complete = runner.execute(after_some)
    spent = duration(time.monotonic() - start)
    if complete:
        console.say(f"{len(runs)} of {len(runs)} runs done in {spent}")
    else:
        left = sum(run.finished() is None for run in runs)
        console.say(f"stopped after {spent}: {left} of {len(runs)} runs are left; the same command "
                    "goes on where they were")  # fmt: skip
    return complete
