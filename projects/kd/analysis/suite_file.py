"""Suite files of kd-compare: what may stand in them, checked before anything runs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import yaml

from ..config.yaml_files import read_yaml_text
from ..errors import ConfigError, did_you_mean, require_one_of
from ..files import find_shipped
from .report import TASK_METRICS

ONCE = ("teacher", "start")  # roles of rows that are trained once

# entry -> (its type, what to write)
_SUITE = {
    "title": (str, "text"),
    "dataset": (str, "the name of a data set"),
    "task": (str, "a task"),
    "baseline": (str, "the name of a row"),
    "show": (list, "a list of names of rows"),
    "score": (float, "a number from 0 to 1"),
    "opts": (list, "a list KEY, value, KEY, value, ..."),
    "rows": (list, "a list of rows"),
}
_ROW = {
    "name": (str, "text"),
    "config": (str, "a config file"),
    "student": (str, "a config file, or the name of a row above"),
    "method": (str, "a method of configs/methods or an imitation head"),
    "role": (str, "teacher or start"),
    "baseline": (str, "the name of a row"),
    "teacher": (str, "the name of a row with role teacher"),
    "init": (str, "the name of a row"),
    "opts": (list, "a list KEY, value, KEY, value, ..."),
}


def read_suite(path: str) -> dict:
    """Read and check a suite file.

    Returns:
        What it holds. A row with ``student`` and ``method`` has a ``config`` as well, the
        student's, with its row's options and start, and ``teacher_config``.

    Raises:
        ConfigError: the first thing found wrong, with the file and the row.
    """
    where = f"--suite: '{path}'"
    try:
        suite = yaml.safe_load(read_yaml_text(find_shipped(path)))
    except (yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"--suite: cannot read {error}") from error
    if not isinstance(suite, dict) or not suite.get("rows") or not suite.get("dataset"):
        raise ConfigError(f"{where} needs the entries dataset and rows")
    _check_entries(suite, _SUITE, where)
    require_one_of(f"{where}: task", suite.get("task", "bbox"), TASK_METRICS)
    if "score" in suite:
        if suite.get("task") == "sem_seg":
            raise ConfigError(f"{where}: label maps have no score, remove the entry score")
        if not 0 <= suite["score"] <= 1:
            raise ConfigError(f"{where}: score is {suite['score']}, use 0 to 1")
    names: list[str] = []
    for row in suite["rows"]:
        _check_row(row, names, where)
    for entry, value in (("baseline", suite.get("baseline")), *_each("show", suite)):
        if value is not None:
            require_one_of(f"{where}: {entry}", value, names)
    reported = [row["name"] for row in suite["rows"] if row.get("role") != "start"]
    teachers = [row["name"] for row in suite["rows"] if row.get("role") == "teacher"]
    for row in suite["rows"]:
        here = f"{where}: {{}} of row '{row['name']}'"
        if "baseline" in row:
            require_one_of(here.format("baseline"), row["baseline"], reported)
        if "teacher" in row and not ("student" in row and _is_config(row["teacher"])):
            require_one_of(here.format("teacher"), row["teacher"], teachers)
    above: dict[str, dict] = {}
    for node in (suite, *suite["rows"]):
        if "opts" in node:
            node["opts"] = flat_opts(node["opts"])
    for row in suite["rows"]:
        above[row["name"]] = _spelled_out(row, above, suite["rows"], where)
    return {**suite, "rows": list(above.values())}


def _is_config(name: str) -> bool:
    return name.endswith((".yaml", ".yml", ".py"))


def _spelled_out(row: dict, above: Mapping[str, dict], rows: list[dict], where: str) -> dict:
    """A row with student, teacher and method as one with the configs of both."""
    if "student" not in row:
        return row
    here, student = f"{where}: row '{row['name']}'", row["student"]
    if not _is_config(student):
        require_one_of(f"{where}: student of row '{row['name']}'", student, above)
    origin = above.get(student, {"config": student})
    if "method" in origin:
        raise ConfigError(f"{here}: its student '{student}' is distilled, name a plain one")
    full = {**origin, **row, "opts": [*origin.get("opts", []), *row.get("opts", [])]}
    full.pop("role", None)
    teacher = row.get("teacher", "")
    if not teacher:
        teachers = [x["name"] for x in rows if x.get("role") == "teacher"]
        if len(teachers) != 1:
            raise ConfigError(
                f"{here}: the suite has {len(teachers)} rows with role teacher; say which one it "
                "learns from, teacher: NAME"
            )
        teacher = teachers[0]
    if _is_config(teacher):
        full.pop("teacher")
        return {**full, "teacher_config": teacher}
    config = next(x for x in rows if x["name"] == teacher).get("config")
    return {**full, "teacher": teacher, "teacher_config": config}


def _each(entry: str, suite: Mapping) -> list[tuple[str, object]]:
    return [(entry, value) for value in suite.get(entry, ())]


def _check_row(row, names: list[str], where: str) -> None:
    """Check a row and add its name to those before it."""
    if not isinstance(row, dict) or "name" not in row or ("config" in row) == ("student" in row):
        raise ConfigError(f"{where}: a row needs name and config (or student and method): {row}")
    here = f"{where}: row '{row['name']}'"
    _check_entries(row, _ROW, here)
    name = row["name"]
    if not name.strip() or name != os.path.basename(name) or name in (".", ".."):
        raise ConfigError(f"{here}: a name becomes a folder, it must be text without '{os.sep}'")
    if name in names:
        raise ConfigError(f"{here} stands twice; give one of them another name")
    if ("student" in row) != ("method" in row):
        raise ConfigError(f"{here}: student and method go together, it has one of them")
    if "role" in row and "student" in row:
        raise ConfigError(f"{here} is distilled: it takes no role, teachers have a config")
    if "role" in row:
        require_one_of(f"{where}: role of row '{name}'", row["role"], ONCE)
    names.append(name)


def _check_entries(node: Mapping, known: Mapping, where: str) -> None:
    for entry, value in node.items():
        if entry not in known:
            raise ConfigError(f"{where}: unknown entry '{entry}'{did_you_mean(entry, known)}")
        kind, what = known[entry]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        right = number and math.isfinite(value) if kind is float else isinstance(value, kind)
        if not right:
            raise ConfigError(f"{where}: {entry} is {value!r}, write {what}")
    opts = flat_opts(node.get("opts", []))
    rest = list(opts)
    while rest:
        count = _words_of(rest[0])
        if len(rest) < count or not isinstance(rest[0], str):
            raise ConfigError(f"{where}: opts come in pairs KEY, value: {opts}")
        rest = rest[count:]


def _words_of(key) -> int:
    """How many entries an override takes: KEY, value; of a LazyConfig also KEY=VALUE."""
    return 1 if isinstance(key, str) and "=" in key else 2


def flat_opts(opts: list) -> list:
    """Options where a list in the place of a key, as ``*anchor`` gives it, stands for its own."""
    flat, rest = [], list(opts)
    while rest:
        if isinstance(rest[0], list):
            rest[:1] = flat_opts(rest[0])
            continue
        count = _words_of(rest[0])
        flat += rest[:count]
        rest = rest[count:]
    return flat
