"""Errors that a user can fix: one line that names the config key or the file to change."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import signal
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """Base of the errors that scripts print as one line instead of a traceback.

    torch raises an error of a data loader's worker again in the parent, with the same class and the
    worker's traceback as its message. The line is extracted from that.
    """

    def __init__(self, message: str):
        text = str(message)
        super().__init__(" ".join((_line_of_worker_error(text) or text).split()))


class ConfigError(UserError):
    """A config key, a command line flag, or a file that a key names, has to change."""


class DataError(UserError):
    """A data set's annotation file or image has to change."""


class TrainingError(UserError, FloatingPointError):
    """Training cannot go on (a loss became NaN or infinite)."""


class Stopped(SystemExit):
    """A signal has ended the run: status 128 + signal, as a shell has it.

    Args:
        signum: the signal.
        what: what was saved, and how to continue.
        told: whether the line is on the console already.
    """

    def __init__(self, signum: int, what: str, told: bool = False):
        super().__init__(128 + signum)
        self.signum = signum
        self.told = told
        self.line = f"stopped by {signal.Signals(signum).name}: {what}"

    def __str__(self) -> str:
        return self.line


# What the disk, not the program, can be blamed for.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.EPERM)


def disk_line(error: BaseException) -> str | None:
    """The line for a fault of the disk that nobody has put into words; None if it is none."""
    reason = disk_fault(error)
    if reason is None:
        return None
    return f"{reason}; OUTPUT_DIR, or --output of a tool, names the folder that is written to"


def disk_fault(error: BaseException | None) -> str | None:
    """What is wrong with the disk, in words, if an error or a cause of it says so.

    "" is never returned: None means that the disk is not to blame.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            where = f" ({error.filename})" if error.filename else ""
            return f"{os.strerror(error.errno)}{where}"
        error = error.__cause__ or error.__context__
    return None


def one_line(error: BaseException, most: int = 240) -> str:
    """What an exception of a library says, on one line and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]}..."


def require_one_of(key: str, value, allowed) -> None:
    """ConfigError unless ``value``, of the config key ``key``, is among the allowed ones."""
    if value not in allowed:
        raise ConfigError(
            f"{key}: '{value}' is not one of {', '.join(map(str, allowed))}"
            f"{did_you_mean(value, allowed)}"
        )


def did_you_mean(name, known: Iterable, cutoff: float = 0.6, prefix: str = "") -> str:
    """ "; did you mean X or Y?" with the known names that are nearest, "" if none is near.

    Args:
        name: what was written; case does not count.
        known: the names that there are.
        cutoff: see ``difflib.get_close_matches``.
        prefix: put before each of the names that are shown.
    """
    by_case = {str(x).lower(): str(x) for x in known}
    word = str(name).lower()
    near = difflib.get_close_matches(word, list(by_case), n=3, cutoff=cutoff)
    closeness = [difflib.SequenceMatcher(None, word, x).ratio() for x in near]
    best = [by_case[x] for x, y in zip(near, closeness, strict=True) if y > closeness[0] - 0.05]
    return f"; did you mean {' or '.join(prefix + x for x in best)}?" if best else ""


@contextlib.contextmanager
def exit_on_user_error():
    """Scripts run their main function inside: a :class:`UserError` ends in one line and status 2.

    A :class:`UserError` raised in a spawned process reaches the parent inside the text of another
    exception; its last line is shown then. A full or read-only disk is one line as well, and so is
    Ctrl-C, with status 130.
    """
    try:
        yield
    except UserError as error:
        _exit(str(error))
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Stopped as stop:
        if not stop.told:
            print(stop.line, file=sys.stderr)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # on the way out, with this status
        raise
    except Exception as error:  # also a worker's traceback, re-raised by torch as text
        line = disk_line(error) or _line_of_worker_error(str(error))
        if line is None:
            raise
        _exit(line)


def _exit(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def _line_of_worker_error(text: str) -> str | None:
    classes = (UserError, ConfigError, DataError, TrainingError)
    names = tuple(f"{__name__}.{c.__name__}: " for c in classes)
    for line in reversed(text.splitlines()):
        for name in names:
            if line.startswith(name):
                return line[len(name) :]
    return None
