"""Suites with several baselines and teachers, and a teacher that is worse."""

from __future__ import annotations

import pytest
import yaml
from kd_suites import execute, fake_training, make_suite, registered_toy_data

from projects.kd.analysis import suites
from projects.kd.errors import ConfigError


@pytest.fixture
def suite(tmp_path):
    with registered_toy_data(tmp_path):
        yield make_suite()


def test_a_teacher_that_is_worse_is_the_first_line(suite, tmp_path, monkeypatch):
    fake_training(monkeypatch, [1.0, 2.0, 4.0])
    execute(suite, tmp_path, seeds=[1])
    first, _, second, *_ = (tmp_path / "report.md").read_text().splitlines()
    assert first.startswith("**The teacher 'teacher' (AP 1.0) is not better than the baseline")
    assert second == "# test"


def test_rows_name_their_own_baseline_and_teacher(suite, tmp_path, monkeypatch):
    student, teacher, distilled = suite["rows"]
    long = {"opts": ["SOLVER.MAX_ITER", 9], "baseline": "long"}
    suite["rows"] += [
        {**teacher, "name": "big", "opts": long["opts"]},
        {**student, "name": "long", **long},
        {**distilled, "name": "long+X", **long, "teacher": "big"},
    ]
    with pytest.raises(ConfigError, match="'teacher' and 'big' have the same config.*'student.X'"):
        suites.make_runs(suite, [1], str(tmp_path), [])
    distilled["teacher"] = "teacher"
    runs = {run.label: run for run in suites.make_runs(suite, [1], str(tmp_path), [])}
    assert runs["student+X, seed 1"].needs == [runs["teacher"]]
    assert runs["long+X, seed 1"].needs == [runs["big"]]
    kept = suites.select_rows(suite["rows"], ["long+X"])
    assert [row["name"] for row in kept] == ["big", "long+X"]
    # in this order: teacher, big, student, student+X, long, long+X
    fake_training(monkeypatch, [30.0, 60.0, 10.0, 15.0, 20.0, 30.0])
    report = execute(suite, tmp_path, seeds=[1])
    found = {row["name"]: (row.get("gain"), row.get("gap_closed")) for row in report["rows"]}
    assert found == {
        "student": (None, None),
        "teacher": (20.0, None),
        "student+X": (5.0, 25.0),
        "big": (50.0, None),
        "long": (None, None),
        "long+X": (10.0, 25.0),
    }
    assert len(report["conclusions"]) == 2


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"baseline": "b"}, "baseline of row 'a': 'b' is not one of a"),
        ({"teacher": "a"}, "teacher of row 'a': 'a' is not one of"),
    ],
)
def test_a_row_cannot_name_what_is_not_there(tmp_path, entry, message):
    path = tmp_path / "suite.yaml"
    path.write_text(
        yaml.safe_dump({"dataset": "x", "rows": [{"name": "a", "config": "b"} | entry]})
    )
    with pytest.raises(ConfigError, match=message):
        suites.read_suite(str(path))
