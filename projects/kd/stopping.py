"""Stopping a run on SIGINT, SIGTERM or SIGUSR1 without losing what it has done.

Before and after training a signal ends the process at once (:func:`stop_at_once`). While training
it is only noted (:func:`stop_after_step`): the loop finishes its step, all processes agree on it
there, and the trainer writes a checkpoint and raises :class:`Stopped`. An evaluation in between is
given up. A second signal, unless right after the first, ends the process at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from .errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A terminal and a launcher both send one to the same process; a repetition this close is no second.
SAME_SECONDS = 3.0
NOT_TRAINING = "it was not training, so nothing is lost; the same command starts it again"
WORKER_SECONDS = 60  # a loader's worker goes on so long after a SIGTERM of its own


class _Request:
    """The signal that this process got while it trains, 0 = none, and when the first one came."""

    signum = 0
    time = -SAME_SECONDS


_request = _Request()


def requested() -> int:
    """The signal that asks this process to stop, 0 if there is none."""
    return _request.signum


@contextlib.contextmanager
def _handling(handler: Callable) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python allows it there only
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """Inside, a signal raises :class:`Stopped` where the program is."""

    def handler(signum, frame):
        if time.monotonic() - _request.time > SAME_SECONDS:
            raise Stopped(signum, NOT_TRAINING)

    with _handling(handler):
        yield


@contextlib.contextmanager
def stop_after_step() -> Iterator[None]:
    """Inside, a signal is noted for :func:`requested`."""

    def handler(signum, frame):
        now = time.monotonic()
        if not _request.signum:
            _request.signum, _request.time = signum, now
            _say(f"{_name(signum)}: this step is finished, then a checkpoint is written")
        elif now - _request.time > SAME_SECONDS:
            _say(f"{_name(signum)} again: stopped at once, without a checkpoint")
            _end_now(signum)

    with _handling(handler):
        try:
            yield
        finally:
            _request.signum = 0


@contextlib.contextmanager
def passed_on() -> Iterator[Callable[[], int]]:
    """Inside, a signal to this process goes to the processes that it has started.

    Yields a function that tells the first signal, 0 if none came.
    """
    first = 0

    def handler(signum, frame):
        nonlocal first
        first = first or signum
        for process in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signum)

    with _handling(handler):
        yield lambda: first


def serve_on(worker_id: int) -> None:
    """``worker_init_fn`` of a loader: a signal to the whole group does not end its workers.

    The main process needs their batches to finish its step, and ends them itself: a second SIGTERM
    does it, or the time.
    """

    def end(signum, frame):
        os._exit(0)

    def last_call(signum, frame):
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGALRM, end)
        signal.alarm(WORKER_SECONDS)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, last_call)


def _end_now(signum: int) -> None:
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(128 + signum)


def _say(line: str) -> None:
    if comm.is_main_process():
        os.write(2, f"{line}\n".encode())  # a handler may interrupt a print


def _name(signum: int) -> str:
    return signal.Signals(signum).name


class EvaluationStopped(Exception):
    """All processes have given up this evaluation, because one of them was asked to stop."""


class UntilStopped:
    """A loader that ends early when this process is asked to stop.

    Args:
        batches: a loader with a length.
    """

    def __init__(self, batches):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        stream = iter(self.batches)
        while not requested():
            try:
                batch = next(stream)
            except StopIteration:
                return
            except RuntimeError:  # the signal has ended a worker as well
                if requested():
                    return
                raise
            yield batch


class AgreeingEvaluator(DatasetEvaluator):
    """An evaluator that raises :class:`EvaluationStopped` on all processes or on none.

    Args:
        evaluator: does the work.
    """

    def __init__(self, evaluator: DatasetEvaluator):
        self.evaluator = evaluator

    def reset(self):
        """See detectron2."""
        self.evaluator.reset()

    def process(self, inputs, outputs):
        """See detectron2."""
        self.evaluator.process(inputs, outputs)

    def evaluate(self):
        """The results, of complete predictions only."""
        received = comm.all_gather(requested())
        if any(received):
            _request.signum = _request.signum or max(received)
            raise EvaluationStopped
        return self.evaluator.evaluate()


def command_to_resume() -> str:
    """The command line that continues this run, with --resume."""
    script, *arguments = sys.argv
    if "--resume" not in arguments:
        arguments.insert(0, "--resume")
    installed = not script.endswith(".py")  # kd-train
    program = [os.path.basename(script)] if installed else [script]
    if os.path.basename(script) == "train.py":  # the module behind it
        program = ["-m", "projects.kd.commands.train"]
    start = [] if installed else ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            start += ["--nnodes", os.environ["GROUP_WORLD_SIZE"]]
        start += ["--no-python"] if installed else []
    return shlex.join([*start, *program, *arguments])
