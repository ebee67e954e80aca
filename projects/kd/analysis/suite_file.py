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
    "role": (str, "teacher or start"),
    "baseline": (str, "the name of a row"),
    "teacher": (str, "the name of a row with role teacher"),
    "init": (str, "the name of a row"),
    "opts": (list, "a list KEY, value, KEY, value, ..."),
}


def read_suite(path: str) -> dict:
    """Read and check a suite file.

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
        for entry, known in (("baseline", reported), ("teacher", teachers)):
            if entry in row:
                require_one_of(f"{where}: {entry} of row '{row['name']}'", row[entry], known)
    return suite


def _each(entry: str, suite: Mapping) -> list[tuple[str, object]]:
    return [(entry, value) for value in suite.get(entry, ())]


def _check_row(row, names: list[str], where: str) -> None:
    """Check a row and add its name to those before it."""
    if not isinstance(row, dict) or not {"name", "config"} <= set(row):
        raise ConfigError(f"{where}: a row needs name and config: {row}")
    here = f"{where}: row '{row['name']}'"
    _check_entries(row, _ROW, here)
    name = row["name"]
    if not name.strip() or name != os.path.basename(name) or name in (".", ".."):
        raise ConfigError(f"{here}: a name becomes a folder, it must be text without '{os.sep}'")
    if name in names:
        raise ConfigError(f"{here} stands twice; give one of them another name")
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
    opts = node.get("opts", [])
    if len(opts) % 2 or any(not isinstance(key, str) for key in opts[::2]):
        raise ConfigError(f"{where}: opts come in pairs KEY, value: {opts}")
