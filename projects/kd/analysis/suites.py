"""Suites: which trainings a comparison is made of, and each of them in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode

from ..errors import ConfigError
from ..files import shipped_configs, write_atomically
from .report import read_jsonl
from .run_folders import last_line, move_aside, read_or_none, run_logged
from .suite_file import ONCE, read_suite
from .suite_lessons import config_of_row, is_distilled, is_trained_once, lessons_of, teacher_opts

__all__ = ["Run", "is_distilled", "is_trained_once", "make_runs", "read_suite", "select_rows"]


def training_command() -> list[str]:
    """``train_net.py`` of this checkout; elsewhere the installed module behind it."""
    script = os.path.join(os.path.dirname(shipped_configs()), "train_net.py")
    module = ["-m", "projects.kd.commands.train"]
    return [sys.executable, *([script] if os.path.isfile(script) else module)]


class Stopped(Exception):
    """A run was ended before it was finished, on purpose."""


class Run:
    """One training of one row with one seed.

    Args:
        row, seed, suite: what is trained; a seed of None leaves the config's own.
        output: folder of the comparison.
        opts: config overrides, after those of suite and row.
        needs: the runs whose weights this one reads: its teacher's, and those it starts from.
    """

    def __init__(
        self,
        row: dict,
        seed: int | None,
        suite: dict,
        output: str,
        opts: list,
        needs: Sequence[Run] = (),
    ):
        self.row = row
        self.seed = seed
        self.needs = list(needs)
        folder = row["name"] if seed is None else os.path.join(row["name"], f"seed{seed}")
        self.dir = os.path.join(output, "runs", folder)
        self.opts = [*suite.get("opts", []), *row.get("opts", []), *opts]
        if seed is not None:
            self.opts += ["SEED", seed]
        self.gpu_peak_mb: float | None = (self.finished() or {}).get("gpu_peak_mb")
        self._process: subprocess.Popen | None = None
        self._read: tuple[list[str], CfgNode] | None = None
        self._stopped = False

    @property
    def label(self) -> str:
        """Name and seed for messages."""
        return self.row["name"] + ("" if self.seed is None else f", seed {self.seed}")

    @property
    def weights(self) -> str:
        """Where the trained weights will be."""
        return os.path.join(self.dir, "model_final.pth")

    @property
    def cfg(self):
        """The config with all overrides, read once as long as these stay the same."""
        words = [str(x) for x in self.opts]
        if self._read is None or self._read[0] != words:
            self._read = words, config_of_row(self.row, words, "--suite (or after --)")
        return self._read[1]

    @property
    def flags(self) -> list[str]:
        """Those of train_net.py that name the config, or student, teacher and method."""
        row = self.row
        flags = ["--config-file", row["config"]]
        if "method" in row:
            flags += ["--teacher", row["teacher_config"], "--method", row["method"]]
        return flags

    @property
    def is_distilled(self) -> bool:
        """Whether the run trains with imitation heads."""
        return bool(self.cfg.KD.META_ARCHITECTURE)

    def stamp(self) -> str:
        """Hash of all settings, of the needed runs too: another teacher makes another run."""
        cfg = self.cfg.clone()
        for key in ("OUTPUT_DIR", "VERSION"):
            cfg.pop(key)
        text = cfg.dump() + "".join(run.stamp() for run in self.needs)
        return hashlib.sha256(text.encode()).hexdigest()

    def finished(self) -> dict | None:
        """What a finished run took: "seconds", "peak_mb", "gpu_peak_mb"; None for another."""
        text = read_or_none(os.path.join(self.dir, "finished.json"))
        return None if text is None else json.loads(text)

    def iterations_done(self) -> int:
        """Iterations that are not done again when the run is executed."""
        if read_or_none(os.path.join(self.dir, "settings")) != self.stamp():
            return 0
        if self.finished() is not None:
            return self.cfg.SOLVER.MAX_ITER
        name = read_or_none(os.path.join(self.dir, "last_checkpoint")) or ""
        found = re.search(r"model_(\d+)\.pth", name)
        return int(found[1]) + 1 if found else 0

    def execute(
        self,
        progress: str,
        threads: int = 0,
        on_line: Callable[[str], None] = lambda line: None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Train, unless a finished run of the same settings is there.

        Args:
            progress: prefix of the lines on the console.
            threads: CPU threads of the run, 0 = as many as torch takes.
            on_line: gets each line of the training's output.
            say: prints a line on the console.

        Raises:
            ConfigError: the training failed.
            Stopped: :meth:`stop` ended it.
        """
        stamp, marker = self.stamp(), os.path.join(self.dir, "finished.json")
        settings = os.path.join(self.dir, "settings")
        known = read_or_none(settings)
        if known is not None and known != stamp:
            old = move_aside(self.dir)
            say(f"[{progress}] {self.label}: settings changed, the old run is at {old}")
        elif os.path.isfile(marker):
            say(f"[{progress}] {self.label}: kept, finished before")
            return
        os.makedirs(self.dir, exist_ok=True)
        write_atomically(settings, stamp)
        resume = ["--resume"] if os.path.isfile(os.path.join(self.dir, "last_checkpoint")) else []
        command = [*training_command(), *resume]
        command += [*self.flags, "OUTPUT_DIR", self.dir]
        command += [str(x) for x in self.opts]
        say(f"[{progress}] {self.label}: {shlex.join(command)}")
        self._train(command, threads, on_line)
        attempts = read_jsonl(os.path.join(self.dir, "attempts.jsonl"))
        spent = {
            "seconds": round(sum(attempt["seconds"] for attempt in attempts), 1),
            "peak_mb": max((x["peak_mb"] or 0.0 for x in attempts), default=0.0) or None,
            "gpu_peak_mb": max((x["gpu_peak_mb"] or 0.0 for x in attempts), default=0.0) or None,
        }
        write_atomically(marker, json.dumps(spent))

    def stop(self, kill: bool = False) -> None:
        """End the training, from another thread; a later run resumes it.

        Args:
            kill: at once, where it would else finish its step and write a checkpoint.
        """
        self._stopped = True
        if self._process is not None:
            self._process.kill() if kill else self._process.terminate()

    def _train(self, command: list[str], threads: int, on_line: Callable[[str], None]) -> None:
        """Run the command; its time and memory go into attempts.jsonl, however it ends."""
        log = os.path.join(self.dir, "console.txt")
        start = time.time()
        status, peak = None, None

        def read(line: str) -> None:
            found = re.search(r" max_mem: (\d+)M", line)  # of the GPU, by detectron2
            if found:
                peak_mb = round(1.048576 * int(found[1]), 1)
                self.gpu_peak_mb = max(self.gpu_peak_mb or 0.0, peak_mb)
            on_line(line)

        try:
            ended = run_logged(command, log, threads, read, self._started)
            status, peak = ended.status, ended.peak_bytes
        finally:
            spent = {
                "seconds": round(time.time() - start, 1),
                "peak_mb": None if peak is None else round(peak / 1e6, 1),
                "gpu_peak_mb": self.gpu_peak_mb,
                "status": status,
            }
            with open(os.path.join(self.dir, "attempts.jsonl"), "a") as file:
                file.write(json.dumps(spent) + "\n")
        if status != 0:
            if self._stopped:
                raise Stopped(self.label)
            raise ConfigError(f"{self.label} failed (status {status}): {last_line(log)}; see {log}")

    def _started(self, process: subprocess.Popen) -> None:
        self._process = process
        if self._stopped:  # while the process was made
            process.terminate()


def make_runs(suite: dict, seeds: list[int], output: str, opts: list) -> list[Run]:
    """What is trained once first, then every row for the first seed, for the second, ...

    Of several teachers a distilled row gets the one that its entry ``teacher`` names, else the one
    whose config it names in KD.TEACHER.CONFIG_FILE (with KD.TEACHERS: each of them the row that has
    its config); a plain row gets none. Options of that row, or of the suite, that change the
    teacher's model go along in KD.TEACHER.OPTS, unless the row sets it. A row with ``init``
    starts from the weights of that row, which stands above it and is trained once.
    """
    rows = suite["rows"]
    lessons = lessons_of(suite)
    once: dict[str, Run] = {}
    for row in rows:
        if is_trained_once(row):
            once[row["name"]] = Run(row, None, suite, output, *_start(row, once, opts))
    runs = list(once.values())
    taught_by = {name for own in lessons.values() for name in own.values()}
    changed = {name: teacher_opts(once[name].row, suite) for name in taught_by}
    for seed in seeds:
        for row in rows:
            if is_trained_once(row):
                continue
            extra, needs = _start(row, once, opts)
            said = [*suite.get("opts", []), *row.get("opts", [])]
            for node, name in lessons.get(row["name"], {}).items():
                extra = [f"{node}.WEIGHTS", once[name].weights, *extra]
                if changed[name] and f"{node}.OPTS" not in said:
                    extra = [f"{node}.OPTS", changed[name], *extra]
                needs = [once[name], *needs]
            runs.append(Run(row, seed, suite, output, extra, needs))
    return runs


def _start(row: dict, once: dict[str, Run], opts: list) -> tuple[list, list[Run]]:
    """Options and needed runs of a row, as its ``init`` says."""
    if "init" not in row:
        return list(opts), []
    if row["init"] not in once:
        raise ConfigError(
            f"--suite: row '{row['name']}' starts from '{row['init']}', which is no row with role "
            f"{' or '.join(ONCE)} above it"
        )
    origin = once[row["init"]]
    return ["MODEL.WEIGHTS", origin.weights, *opts], [origin]


def select_rows(rows: list[dict], names: list[str]) -> list[dict]:
    """The rows of these names, the teachers that they learn from (a single one always), and the
    rows that all of these start from.
    """
    unknown = set(names) - {row["name"] for row in rows}
    if unknown:
        known = ", ".join(row["name"] for row in rows)
        raise ConfigError(f"--only: no row '{min(unknown)}' in the suite, whose rows are {known}")
    teachers = [row for row in rows if row.get("role") == "teacher"]
    chosen = [row for row in rows if row["name"] in names or row in teachers]
    needed = lessons_of({"rows": chosen})
    kept = {*names, *(teacher for own in needed.values() for teacher in own.values())}
    if len(teachers) == 1:
        kept.add(teachers[0]["name"])
    for row in reversed(rows):  # a row starts from one above it
        if row["name"] in kept and "init" in row:
            kept.add(row["init"])
    return [row for row in rows if row["name"] in kept]
