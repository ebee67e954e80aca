"""Suites: which trainings a comparison is made of, and each of them in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence

from .config import load_config
from .errors import ConfigError
from .report import write_atomically
from .run_folders import last_line, move_aside, read_or_none, run_quietly
from .suite_file import ONCE, read_suite

__all__ = ["Run", "is_trained_once", "make_runs", "read_suite", "select_rows"]

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


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

    @property
    def label(self) -> str:
        """Name and seed for messages."""
        return self.row["name"] + ("" if self.seed is None else f", seed {self.seed}")

    @property
    def weights(self) -> str:
        """Where the trained weights will be."""
        return os.path.join(self.dir, "model_final.pth")

    def stamp(self) -> str:
        """Hash of all settings, of the needed runs too: another teacher makes another run."""
        source = f"--suite (or after --): opts of row '{self.row['name']}'"
        cfg = load_config(self.row["config"], [str(x) for x in self.opts], source)
        for key in ("OUTPUT_DIR", "VERSION"):
            cfg.pop(key)
        text = cfg.dump() + "".join(run.stamp() for run in self.needs)
        return hashlib.sha256(text.encode()).hexdigest()

    def seconds(self) -> float | None:
        """Training time of a finished run."""
        path = os.path.join(self.dir, "finished.json")
        if not os.path.isfile(path):
            return None
        with open(path) as file:
            return json.load(file)["seconds"]

    def execute(self, progress: str, threads: int = 0) -> None:
        """Train, unless a finished run of the same settings is there.

        Args:
            progress: prefix of the lines on the console.
            threads: CPU threads of the run, 0 = as many as torch takes.
        """
        stamp, marker = self.stamp(), os.path.join(self.dir, "finished.json")
        settings = os.path.join(self.dir, "settings")
        known = read_or_none(settings)
        if known is not None and known != stamp:
            old = move_aside(self.dir)
            print(
                f"[{progress}] {self.label}: settings changed, the old run is at {old}", flush=True
            )
        elif os.path.isfile(marker):
            print(f"[{progress}] {self.label}: kept, finished before", flush=True)
            return
        os.makedirs(self.dir, exist_ok=True)
        write_atomically(settings, stamp)
        resume = ["--resume"] if os.path.isfile(os.path.join(self.dir, "last_checkpoint")) else []
        command = [sys.executable, os.path.join(ROOT, "train_net.py"), *resume]
        command += ["--config-file", self.row["config"], "OUTPUT_DIR", self.dir]
        command += [str(x) for x in self.opts]
        print(f"[{progress}] {self.label}: {shlex.join(command)}", flush=True)
        start = time.time()
        status = run_quietly(command, os.path.join(self.dir, "console.txt"), progress, threads)
        if status != 0:
            log = os.path.join(self.dir, "console.txt")
            reason = f"(status {status}): {last_line(log)}; see {log}"
            raise ConfigError(f"{self.label} failed {reason}")
        seconds = time.time() - start
        write_atomically(marker, json.dumps({"seconds": round(seconds, 1)}))


def make_runs(suite: dict, seeds: list[int], output: str, opts: list) -> list[Run]:
    """What is trained once first, then every row for the first seed, for the second, ...

    Of several teachers a distilled row gets the one whose config it names in
    KD.TEACHER.CONFIG_FILE; a plain row gets none. A row with ``init`` starts from the weights of
    that row, which stands above it and is trained once.
    """
    rows = suite["rows"]
    teachers = {}
    once: dict[str, Run] = {}
    for row in rows:
        if is_trained_once(row):
            once[row["name"]] = run = Run(row, None, suite, output, *_start(row, once, opts))
            if row["role"] == "teacher" and teachers.setdefault(_config_of(row), run) is not run:
                raise ConfigError("--suite: two rows with role teacher have the same config")
    runs = list(once.values())
    for seed in seeds:
        for row in rows:
            if is_trained_once(row):
                continue
            teacher = _teacher_of(row, teachers)
            extra, needs = _start(row, once, opts)
            if teacher is not None:
                extra = ["KD.TEACHER.WEIGHTS", teacher.weights, *extra]
                needs = [teacher, *needs]
            runs.append(Run(row, seed, suite, output, extra, needs))
    return runs


def is_trained_once(row: dict) -> bool:
    """Teachers, and detectors that others start from: one training, whatever the seeds."""
    return row.get("role") in ONCE


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
    teachers = {_config_of(x): x for x in rows if x.get("role") == "teacher"}
    learning = [x for x in rows if x["name"] in names and not is_trained_once(x)]
    needed = [_teacher_of(row, teachers) for row in learning]
    kept = {*names, *(row["name"] for row in needed if row)}
    if len(teachers) == 1:
        kept |= {row["name"] for row in teachers.values()}
    for row in reversed(rows):  # a row starts from one above it
        if row["name"] in kept and "init" in row:
            kept.add(row["init"])
    return [row for row in rows if row["name"] in kept]


def _config_of(row: dict) -> str:
    return os.path.normpath(row["config"])


def _teacher_of(row: dict, by_config: dict):
    source = f"--suite: opts of row '{row['name']}'"
    cfg = load_config(row["config"], [str(x) for x in row.get("opts", [])], source)
    if not by_config or not cfg.KD.META_ARCHITECTURE:
        return None
    if len(by_config) == 1:
        return next(iter(by_config.values()))
    named = os.path.normpath(cfg.KD.TEACHER.CONFIG_FILE)
    if named not in by_config:
        raise ConfigError(
            f"--suite: row '{row['name']}' learns from {named}, and no row with role teacher has "
            "that config"
        )
    return by_config[named]
