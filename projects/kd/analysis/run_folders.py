"""Folders and processes of training runs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import tarfile
from collections.abc import Callable

from ..errors import ConfigError

REPORTS = (".json", ".md", ".html", ".png")
LOGS = (
    *("attempts.jsonl", "config.yaml", "console.txt", "finished.json", "log.txt", "metrics.json"),
    "settings",
)  # fmt: skip


def move_aside(folder: str) -> str:
    """Rename a folder to the first free ``<folder>.old<n>``; returns that."""
    count = 1
    while os.path.exists(f"{folder}.old{count}"):
        count += 1
    os.rename(folder, f"{folder}.old{count}")
    return f"{folder}.old{count}"


def read_or_none(path: str) -> str | None:
    """Text of a file, None where there is none."""
    if not os.path.isfile(path):
        return None
    with open(path) as file:
        return file.read()


def last_line(path: str) -> str:
    """Last line of a file that is not empty."""
    with open(path, errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1] if lines else "no output"


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, and the most resident memory in bytes.

    The memory is that of the process alone, without workers of its loader; None where the system
    has no ``/proc``.
    """

    status: int
    peak_bytes: int | None


def run_logged(
    command: list[str],
    log: str,
    threads: int,
    on_line: Callable[[str], None] = lambda line: None,
    on_start: Callable[[subprocess.Popen], None] = lambda process: None,
) -> Ended:
    """Run a command with all of its output appended to a file.

    Args:
        command: program and arguments.
        log: the file.
        threads: its CPU threads, 0 = as many as torch takes.
        on_line: gets each line of output.
        on_start: gets the process, to stop it from another thread.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    peak = None
    with open(log, "a") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=environment,
        )  # fmt: skip
        try:
            on_start(process)
            for line in process.stdout:
                file.write(line)
                peak = _peak_memory(process.pid) or peak
                on_line(line)
            return Ended(process.wait(), peak)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def bundle(output: str, file: str) -> int:
    """Pack the reports and logs of a comparison, without weights and predictions.

    Args:
        output: the comparison's folder.
        file: a ``.tar.gz`` to write; an old one is replaced when the new one is complete.

    Returns:
        The number of files in it.

    Raises:
        ConfigError: it cannot be written.
    """
    root = os.path.normpath(output)
    wanted = [os.path.join(root, name) for name in sorted(os.listdir(root))]
    wanted = [path for path in wanted if path.endswith(REPORTS)]
    for folder, _, names in sorted(os.walk(os.path.join(root, "runs"))):
        wanted += [os.path.join(folder, name) for name in LOGS if name in names]
    unfinished = f"{file}.tmp{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
        with tarfile.open(unfinished, "w:gz") as archive:
            for path in wanted:
                archive.add(path, os.path.join(os.path.basename(root), os.path.relpath(path, root)))
        os.replace(unfinished, file)
    except OSError as error:
        raise ConfigError(f"--bundle: {file} cannot be written: {error}") from error
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)
    return len(wanted)


def _peak_memory(pid: int) -> int | None:
    """Most resident bytes so far of a running process; rusage would count its parent's as well."""
    try:
        with open(f"/proc/{pid}/status") as file:
            found = [line.split()[1] for line in file if line.startswith("VmHWM:")]
    except OSError:
        return None
    return 1024 * int(found[0]) if found else None  # kibibytes; a zombie has no such line
