"""Which teacher each row of a suite learns from, and what of its settings the row has to repeat."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..config import load_config
from ..config.config_files import look_up
from ..config.teachers import GROUP, config_of, teacher_names
from ..errors import ConfigError
from ..files import find_shipped
from ..foreign import foreign_scheme
from ..recipes.one_flag import recipe_config
from .suite_file import ONCE

# keys of MODEL that say where and from what it is built, not what it is
_NOT_OF_THE_MODEL = ("MODEL.WEIGHTS", "MODEL.DEVICE")


def is_trained_once(row: dict) -> bool:
    """Teachers, and detectors that others start from: one training, whatever the seeds."""
    return row.get("role") in ONCE


def is_distilled(row: dict) -> bool:
    """Whether the row's config trains with imitation heads."""
    return "method" in row or bool(config_of_row(row, row.get("opts", [])).KD.META_ARCHITECTURE)


def config_of_row(row: dict, opts: Sequence, start: str = "--suite"):
    """The config of a row with options, by a recipe where the row names a method."""
    source, words = f"{start}: opts of row '{row['name']}'", [str(x) for x in opts]
    if "method" not in row:
        return load_config(row["config"], words, source)
    try:
        return recipe_config(row["config"], row["teacher_config"], row["method"], words)[0]
    except ConfigError as error:
        raise ConfigError(f"--suite: row '{row['name']}': {error}") from error


def teachers_of(suite: dict) -> dict[str, str]:
    """Distilled row to the (first) row that it learns from, by name; plain rows are left out."""
    return {name: next(iter(found.values())) for name, found in lessons_of(suite).items()}


def lessons_of(suite: dict) -> dict[str, dict[str, str]]:
    """Distilled row to the rows that it learns from, each by the config node of the teacher."""
    rows = suite["rows"]
    teachers = [row for row in rows if row.get("role") == "teacher"]
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if is_trained_once(row) or not is_distilled(row) or not teachers:
            continue
        cfg = None if "method" in row else config_of_row(row, row.get("opts", []))
        if cfg is not None and cfg.KD.TEACHERS:
            for name in teacher_names(cfg):
                named = config_of(cfg, name).KD.TEACHER.CONFIG_FILE
                if own := _with_config(row, teachers, named):
                    found.setdefault(row["name"], {})[f"{GROUP}.{name}"] = own["name"]
        elif cfg and "teacher" not in row and foreign_scheme(cfg.KD.TEACHER.CONFIG_FILE):
            continue  # no row trains a model of another library
        elif teacher := _teacher_of(row, teachers):
            found[row["name"]] = {"KD.TEACHER": teacher["name"]}
    return found


def teacher_opts(teacher: dict, suite: dict) -> list:
    """What a distilled row has to say in KD.TEACHER.OPTS: the model that its teacher's row trains.

    Options of the suite and of the teacher's row that change the model which the row's config
    file describes (MODEL.*, and INPUT.FORMAT for the order of channels); where the weights
    come from is left out, as the trained ones are read.
    """
    opts = [*suite.get("opts", []), *teacher.get("opts", [])]
    if teacher["config"].endswith(".py"):
        return []
    pairs = zip(opts[::2], opts[1::2], strict=True)
    own = load_config(teacher["config"])
    changed = []
    for key, value in pairs:
        if not key.startswith("MODEL.") and key != "INPUT.FORMAT" or key in _NOT_OF_THE_MODEL:
            continue
        if str(look_up(own, key)) != str(value):
            changed += [key, value]
    return changed


def _teacher_of(row: dict, teachers: Sequence[dict]) -> dict | None:
    """The row that a distilled row with one teacher learns from, if there is one."""
    if "teacher" in row:
        found = next((x for x in teachers if x["name"] == row["teacher"]), None)
        if found is None:
            raise ConfigError(
                f"--suite: row '{row['name']}' learns from '{row['teacher']}', which is no row "
                "with role teacher"
            )
        return found
    if "method" in row:  # its teacher is a config, trained elsewhere
        return None
    if len(teachers) == 1:
        return teachers[0]
    named = config_of_row(row, row.get("opts", [])).KD.TEACHER.CONFIG_FILE
    found = _with_config(row, teachers, named)
    if found is None:
        raise ConfigError(
            f"--suite: row '{row['name']}' learns from {named}, and no row with role teacher has "
            "that config"
        )
    return found


def _with_config(row: dict, teachers: Sequence[dict], named: str) -> dict | None:
    """The teacher's row that has a config; ConfigError where there are two."""
    wanted = os.path.abspath(find_shipped(named))
    found = [x for x in teachers if os.path.abspath(find_shipped(x["config"])) == wanted]
    if len(found) > 1:
        same = " and ".join(f"'{x['name']}'" for x in found)
        raise ConfigError(
            f"--suite: the teachers {same} have the same config: say in row '{row['name']}' which "
            "one it learns from, teacher: NAME"
        )
    return found[0] if found else None
