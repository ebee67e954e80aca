"""Suites: which trainings a comparison is made of, and each of them in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time

import yaml

from .config import load_config
from .errors import ConfigError
from .report import TASK_METRICS, write_atomically
from .run_folders import last_line, move_aside, read_or_none, run_quietly

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def read_suite(path: str) -> dict:
    """Read and check a suite file."""
    try:
        with open(path) as file:
            suite = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--suite: cannot read '{path}': {error}") from error
    if not isinstance(suite, dict) or not suite.get("rows") or not suite.get("dataset"):
        raise ConfigError(f"--suite: '{path}' needs the entries dataset and rows")
    if suite.get("task", "bbox") not in TASK_METRICS:
        raise ConfigError(f"--suite: '{path}': task is none of {', '.join(TASK_METRICS)}")
    for row in suite["rows"]:
        if not {"name", "config"} <= set(row):
            raise ConfigError(f"--suite: '{path}': a row needs name and config: {row}")
    return suite


class Run:
    """One training of one row with one seed.

    Args:
        row, seed, suite: what is trained; a seed of None leaves the config's own.
        output: folder of the comparison.
        opts: config overrides, after those of suite and row.
        needs: the run whose weights this one reads, of its teacher or of the teacher it starts
            from.
    """

    def __init__(
        self,
        row: dict,
        seed: int | None,
        suite: dict,
        output: str,
        opts: list,
        needs: Run | None = None,
    ):
        self.row = row
        self.seed = seed
        self.needs = needs
        folder = row["name"] if seed is None else os.path.join(row["name"], f"seed{seed}")
        self.dir = os.path.join(output, "runs", folder)
        self.opts = [*suite.get("opts", []), *row.get("opts", []), *opts]
        if seed is not None:
            self.opts += ["SEED", seed]

    @property
    def label(self) -> str:
        """Name and seed for messages."""
        return self.row["name"] + ("" if self.seed is None else f", seed {self.seed}")

    def stamp(self) -> str:
        """Hash of all settings, of the needed run too: another teacher makes another run."""
        cfg = load_config(self.row["config"], [str(x) for x in self.opts])
        for key in ("OUTPUT_DIR", "VERSION"):
            cfg.pop(key)
        text = cfg.dump() + (self.needs.stamp() if self.needs else "")
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
    """Teachers first, then every row for the first seed, for the second, ...

    Of several teachers a distilled row gets the one whose config it names in
    KD.TEACHER.CONFIG_FILE; a plain row gets none.
    """
    rows = suite["rows"]
    teachers: list[Run] = []
    for row in rows:
        if row.get("role") == "teacher":
            teachers.append(_teacher_run(row, teachers, suite, output, opts))
    by_config = {os.path.normpath(run.row["config"]): run for run in teachers}
    if len(by_config) < len(teachers):
        raise ConfigError("--suite: two rows with role teacher have the same config")
    runs = list(teachers)
    for seed in seeds:
        for row in rows:
            if row.get("role") == "teacher":
                continue
            teacher = _teacher_of(row, by_config)
            extra = list(opts)
            if teacher is not None:
                weights = os.path.join(teacher.dir, "model_final.pth")
                extra = ["KD.TEACHER.WEIGHTS", weights, *extra]
            runs.append(Run(row, seed, suite, output, extra, teacher))
    return runs


def _teacher_run(row: dict, above: list[Run], suite: dict, output: str, opts: list) -> Run:
    """A row with role teacher; with ``init`` it depends on the run that it starts from."""
    if "init" not in row:
        return Run(row, None, suite, output, opts)
    origin = next((run for run in above if run.row["name"] == row["init"]), None)
    if origin is None:
        raise ConfigError(
            f"--suite: row '{row['name']}' starts from '{row['init']}', which is no row with role "
            "teacher above it"
        )
    weights = os.path.join(origin.dir, "model_final.pth")
    return Run(row, None, suite, output, ["MODEL.WEIGHTS", weights, *opts], origin)


def select_rows(rows: list[dict], names: list[str]) -> list[dict]:
    """The rows of these names, the teachers that they learn from (a single one always), and the
    teachers that those start from.
    """
    unknown = set(names) - {row["name"] for row in rows}
    if unknown:
        known = ", ".join(row["name"] for row in rows)
        raise ConfigError(f"--only: no row '{min(unknown)}' in the suite, whose rows are {known}")
    teachers = {os.path.normpath(x["config"]): x for x in rows if x.get("role") == "teacher"}
    learning = [x for x in rows if x["name"] in names and x.get("role") != "teacher"]
    needed = [_teacher_of(row, teachers) for row in learning]
    kept = {*names, *(row["name"] for row in needed if row)}
    if len(teachers) == 1:
        kept |= {row["name"] for row in teachers.values()}
    for row in reversed(rows):  # a teacher starts from one above it
        if row["name"] in kept and "init" in row:
            kept.add(row["init"])
    return [row for row in rows if row["name"] in kept]


def _teacher_of(row: dict, by_config: dict):
    cfg = load_config(row["config"], [str(x) for x in row.get("opts", [])])
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
