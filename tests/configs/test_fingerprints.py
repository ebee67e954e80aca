"""Merged configs and rows of suites keep their values: a hash of each, in fingerprints.json.

Where a change is meant, ``python -m tests.configs.test_fingerprints`` writes the file anew; its
diff names the configs that changed.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from projects.kd import add_kd_config, load_config
from projects.kd.analysis import suites
from projects.kd.config.key_checks import flat

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("fingerprints.json")
LEFT_OUT = ("MODEL.DEVICE", "OUTPUT_DIR", "VERSION")  # of the machine, and of the file's place


def configs() -> list[str]:
    """Configs that run, as paths from the root."""
    paths = (ROOT / "configs").rglob("*.yaml")
    paths = (path for path in paths if path.parent.name not in ("methods", "suites"))
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def names_of_suites() -> list[str]:
    """Suite files, as paths from the root."""
    return sorted(
        path.relative_to(ROOT).as_posix() for path in (ROOT / "configs/suites").glob("*.yaml")
    )


@functools.cache
def defaults() -> dict:
    cfg = get_cfg()
    add_kd_config(cfg)
    return {key: _plain(value) for key, value in flat(cfg)}


def fingerprint(cfg) -> str:
    """Hash of the values that are no defaults; paths of this checkout count from its root."""
    plain = defaults()
    found = {key: _plain(value) for key, value in flat(cfg) if key not in LEFT_OUT}
    # keys of KD.TEACHERS have no defaults
    values = {key: value for key, value in found.items() if value != plain.get(key)}
    text = json.dumps(values, sort_keys=True).replace(f"{ROOT}/", "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value):
    """1 and 1.0 are the same, and so are lists and tuples."""
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number else value


def rows_of(suite: str) -> dict[str, str]:
    """Fingerprint of each row that trains by a recipe."""
    content = suites.read_suite(str(ROOT / suite))
    found = {}
    for row in content["rows"]:
        if "method" in row:
            run = suites.Run(row, None, content, "nowhere", [])
            cfg = run.cfg.clone()
            cfg.KD.TEACHER.WEIGHTS = ""  # of its own run, where there is one here
            found[f"{suite}: {row['name']}"] = fingerprint(cfg)
    return found


def known() -> dict[str, str]:
    return json.loads(FILE.read_text())


def test_every_config_and_row_has_a_fingerprint():
    wanted = set(configs())
    for suite in names_of_suites():
        rows = suites.read_suite(str(ROOT / suite))["rows"]
        wanted |= {f"{suite}: {row['name']}" for row in rows if "method" in row}
    assert set(known()) == wanted


@pytest.mark.parametrize("folder", sorted({name.rpartition("/")[0] for name in configs()}))
def test_configs_keep_their_values(folder):
    names = [name for name in configs() if name.rpartition("/")[0] == folder]
    found = {name: fingerprint(load_config(str(ROOT / name))) for name in names}
    assert found == {name: known()[name] for name in names}


@pytest.mark.parametrize("suite", names_of_suites())
def test_rows_keep_their_values(suite, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = rows_of(suite)
    assert found == {name: value for name, value in known().items() if name.startswith(f"{suite}:")}


def test_a_method_adds_its_values_and_no_more_files():
    """What a method's file and a suite say is not written again: elsewhere files stay as few."""
    paths = list((ROOT / "configs").rglob("*.yaml"))
    assert len([path for path in paths if path.parent.name != "methods"]) <= 169


if __name__ == "__main__":
    all_of_them = {name: fingerprint(load_config(str(ROOT / name))) for name in configs()}
    for name in names_of_suites():
        all_of_them |= rows_of(name)
    FILE.write_text(json.dumps(all_of_them, indent=0, sort_keys=True) + "\n")
