"""What a run writes beside its checkpoints. A log that cannot be written never stops training."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence

from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from detectron2.utils.logger import setup_logger

from ..errors import disk_fault, one_line
from ..files import replacing

logger = logging.getLogger(__name__)

METRICS = "metrics.json"
_numbers = itertools.count()


def build_writers(
    folder: str, start_iter: int, more: Sequence[EventWriter] = ()
) -> list[EventWriter]:
    """detectron2's writers of files: metrics.json and TensorBoard's event file.

    Args:
        folder: OUTPUT_DIR, which exists.
        start_iter: the first iteration of this process. What metrics.json has of it and of later
            ones is of steps that were lost and are taken again, and goes.
        more: writers before TensorBoard's, which takes the pictures out of the event storage.
    """
    path = os.path.join(folder, METRICS)
    return [
        Tolerant(METRICS, lambda: MetricsFile(path, start_iter)),
        *more,
        Tolerant("the event file of TensorBoard", lambda: EventFiles(folder, start_iter)),
    ]


class Tolerant(EventWriter):
    """A writer whose failure is said once.

    Args:
        what: for that message.
        make: builds the writer, at the first write.
        errors: what counts as a failure.
    """

    def __init__(
        self, what: str, make: Callable[[], EventWriter], errors: type[Exception] = OSError
    ):
        self.what, self.make, self.errors = what, make, errors
        self.writer: EventWriter | None = None
        self.failed = False

    def write(self) -> None:
        """See detectron2."""
        self._try(lambda: self.writer.write())

    def close(self) -> None:
        """See detectron2."""
        if self.writer is not None:
            self._try(lambda: self.writer.close())

    def _try(self, action: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            if self.writer is None:
                self.writer = self.make()
            action()
        except self.errors as error:
            self.failed = True
            reason = disk_fault(error) or one_line(error)
            logger.warning(f"{self.what} cannot be written: {reason}; training goes on without it")


class MetricsFile(JSONWriter):
    """metrics.json with every iteration once, whatever was killed and resumed.

    Args:
        path: of the file; new lines are appended.
        start_iter: lines of this and later iterations are taken out first. A file of which no line
            would be left is another run's and is moved to ``metrics.json.1`` (2, ...).
    """

    def __init__(self, path: str, start_iter: int):
        keep_before(path, start_iter)
        super().__init__(path)
        self._last_write = start_iter - 1


def keep_before(path: str, iteration: int) -> None:
    """Take the lines from ``iteration`` on, and torn ones, out of a file of metrics, atomically."""
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    kept = [line for line in lines if _iteration(line) < iteration]
    if len(kept) == len(lines):
        return
    if not kept:
        number = 1
        while os.path.exists(f"{path}.{number}"):
            number += 1
        os.replace(path, f"{path}.{number}")
        logger.info(f"{path} is of another run, it is now {path}.{number}")
        return
    with replacing(path) as file:
        file.writelines(kept)


def _iteration(line: bytes) -> float:
    try:
        return float(json.loads(line)["iteration"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, TypeError, KeyError):
        return float("inf")


class EventFiles(TensorboardXWriter):
    """TensorBoard's event files, written by this thread, so that a full disk is an exception here.

    Args:
        folder: OUTPUT_DIR.
        start_iter: TensorBoard drops what older files have of this and later iterations.
    """

    def __init__(self, folder: str, start_iter: int):
        super().__init__(folder)
        self.folder, self.start_iter = folder, start_iter

    @functools.cached_property
    def _writer(self):
        from torch.utils.tensorboard import SummaryWriter  # seconds, and not every run writes

        event_file = _EventFile(self.folder, self.start_iter)

        class Writer(SummaryWriter):
            def _get_file_writer(self):
                self.file_writer = event_file
                self.all_writers = {event_file.folder: event_file}
                return event_file

        return Writer(self.folder)

    def write(self) -> None:
        """See detectron2."""
        super().write()
        self._writer.flush()


class _EventFile:
    """What torch's SummaryWriter asks of its FileWriter, which writes in a thread of its own."""

    def __init__(self, folder: str, start_iter: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"{int(time.time()):010d}.{os.uname().nodename}.{os.getpid()}.{next(_numbers):06d}"
        path = os.path.join(folder, f"events.out.tfevents.{name}")
        self.folder = folder
        self.records = RecordWriter(open(path, "wb"))
        self.make_event = Event
        self.add_event(Event(file_version="brain.Event:2"), start_iter)
        if start_iter:
            self.add_event(Event(session_log=SessionLog(status=SessionLog.START)), start_iter)

    def add_event(self, event, step=None, walltime=None) -> None:
        event.wall_time = time.time() if walltime is None else walltime
        if step is not None:
            event.step = int(step)
        self.records.write(event.SerializeToString())

    def add_summary(self, summary, global_step=None, walltime=None) -> None:
        self.add_event(self.make_event(summary=summary), global_step, walltime)

    def get_logdir(self) -> str:
        return self.folder

    def flush(self) -> None:
        self.records.flush()

    def close(self) -> None:
        self.records.close()


class LogFile(logging.FileHandler):
    """log.txt; when it cannot be written that is said once, on the console.

    Args:
        path: appended to.
    """

    failed = False

    def __init__(self, path: str):
        super().__init__(path, delay=True, encoding="utf-8")
        line = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
        self.setFormatter(logging.Formatter(line, datefmt="%m/%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """See logging."""
        if self.failed:
            return
        try:
            if self.stream is None:
                self.stream = self._open()
            self.stream.write(self.format(record) + self.terminator)
            self.stream.flush()
        except OSError as error:
            self.failed = True
            self.close()
            reason = disk_fault(error) or error
            print(
                f"WARNING {self.baseFilename} cannot be written: {reason}; the log goes to the "
                "console alone",
                file=sys.stderr,
            )

    def close(self) -> None:
        """See logging; what a full disk did not take stays unwritten."""
        with contextlib.suppress(OSError):
            super().close()


@functools.cache  # one handler for a file, however often a process comes here
def _log_file(path: str) -> LogFile:
    return LogFile(path)


def start_logs(folder: str, rank: int) -> None:
    """The logs of detectron2, fvcore and this project go to the console and to ``folder``.

    As detectron2's ``setup_logger``: log.txt, and log.txt.rank1 and so on of further processes,
    of which none but the first writes to the console.
    """
    path = os.path.join(folder, "log.txt" + (f".rank{rank}" if rank else ""))
    for name in ("fvcore", "detectron2", "projects"):
        log = setup_logger(None, distributed_rank=rank, name=name)
        if _log_file(path) not in log.handlers:
            log.addHandler(_log_file(path))
