"""Suite files and YAML text: what is refused, with the file, the row and the line."""

import random

import pytest
import yaml

from projects.kd.analysis.suite_file import read_suite
from projects.kd.config.yaml_files import MAX_ENTRIES, check_yaml
from projects.kd.errors import ConfigError

ROWS = [{"name": "a", "config": "a.yaml"}, {"name": "b", "config": "b.yaml"}]


def refused(tmp_path, entries, message):
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"dataset": "d", "rows": ROWS} | entries))
    with pytest.raises(ConfigError, match=message) as error:
        read_suite(str(path))
    assert "\n" not in str(error.value) and "suite.yaml" in str(error.value)


def row(**entries):
    return {"rows": [ROWS[1], {"name": "a", "config": "a.yaml"} | entries]}


def distilled(**entries):
    return {"rows": [ROWS[0], {"name": "c", "student": "a", "method": "CWD"} | entries]}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"title": ["x"]}, r"title is \['x'\], write text"),
        ({"tytle": "x"}, "unknown entry 'tytle'; did you mean title"),
        ({"task": "bobx"}, "task: 'bobx' is not one of .*; did you mean bbox"),
        ({"opts": ["SEED"]}, r"opts come in pairs KEY, value: \['SEED'\]"),
        ({"opts": [1, 2]}, "opts come in pairs"),
        ({"show": ["a", "c"]}, "show: 'c' is not one of a, b"),
        ({"show": "a"}, "show is 'a', write a list"),
        ({"baseline": "stduent"}, "baseline: 'stduent' is not one of a, b"),
        ({"score": float("nan")}, "score is nan"),
        ({"rows": ["a"]}, "a row needs name and config .*: a"),
        ({"rows": [ROWS[0], ROWS[0]]}, "row 'a' stands twice"),
        (row(config=3), "row 'a': config is 3, write a config file"),
        (row(name=5), "row '5': name is 5, write text"),
        (row(name=" "), "a name becomes a folder"),
        (row(name="../up"), "a name becomes a folder"),
        (row(roll="teacher"), "row 'a': unknown entry 'roll'; did you mean role"),
        (row(role="taecher"), "'taecher' is not one of teacher, start; did you mean teacher"),
        (row(opts=["SOLVER.MAX_ITER"]), "row 'a': opts come in pairs"),
        (row(opts=[["SEED"]]), "row 'a': opts come in pairs"),
        (row(student="b"), "a row needs name and config .or student and method."),
        ({"rows": [ROWS[0], {"name": "c", "student": "a"}]}, "student and method go together"),
        (distilled(student="z"), "student of row 'c': 'z' is not one of a"),
        (distilled(student="c"), "student of row 'c': 'c' is not one of a"),
        (distilled(role="teacher"), "row 'c' is distilled: it takes no role"),
        (distilled(), "row 'c': the suite has 0 rows with role teacher; say which one"),
        (distilled(teacher="a"), "teacher of row 'c': 'a' is not one of"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, entries, message):
    refused(tmp_path, entries, message)


def test_any_value_at_any_entry_is_read_or_refused_in_one_line(tmp_path):
    draw = random.Random(7)
    values = [None, True, 3, -1.5, float("inf"), "", "a", [], [1], ["a", 2], {}, {"a": 1}, "é/ü"]
    entries = ["title", "dataset", "task", "baseline", "show", "score", "opts", "rows"]
    path = tmp_path / "suite.yaml"
    read = 0
    for _ in range(150):
        suite = {"dataset": "d", "rows": [dict(ROWS[0]), dict(ROWS[1])]}
        suite[draw.choice(entries)] = draw.choice(values)
        if draw.random() < 0.5 and isinstance(suite["rows"], list) and len(suite["rows"]) > 1:
            suite["rows"][1][draw.choice(["name", "config", "role", "init", "opts"])] = draw.choice(
                values
            )
        path.write_text(yaml.safe_dump(suite))
        try:
            assert read_suite(str(path))["dataset"] == suite["dataset"]
            read += 1
        except ConfigError as error:
            assert "\n" not in str(error)
    assert 3 < read < 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key a stands twice, first in line 1"),
        ("x:\n  a: 1\n  'a': 3", "line 3: the key a stands twice, first in line 2"),
        ("x: [{a: 1, a: 2}]", "line 1: the key a stands twice"),
        ("x:\n  1: 2", "line 2: the key 1 is no text"),
        ("on: 2", "line 1: the key on is no text"),
        ("? [a]\n: 2", "the key a list is no text"),
        ("a: &x\n  b: *x", r"line \d: a value refers to itself"),
        ("a: [", "cannot be read as YAML"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_yaml_faults_are_named_with_their_line(text, message):
    with pytest.raises(ConfigError, match=message):
        check_yaml(text, "f.yaml")


def test_references_that_explode_are_refused_before_they_are_followed():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(ConfigError, match=f"more than {MAX_ENTRIES} entries"):
        check_yaml("\n".join(lines), "f.yaml")
    check_yaml("base: &b {a: 1}\nx: {<<: *b, a: 2}\ny: *b", "f.yaml")  # a merge and reuse are fine


def test_a_row_of_student_teacher_and_method_is_spelled_out(tmp_path):
    rows = [
        {"name": "T", "config": "t.yaml", "role": "teacher"},
        {"name": "origin", "config": "o.yaml", "role": "start"},
        {"name": "S", "config": "s.yaml", "init": "origin", "opts": ["A", 1]},
        {"name": "by name", "student": "S", "method": "CWD", "opts": [["B", [2]], "C", 3]},
        {"name": "by file", "student": "x.yaml", "teacher": "y.yaml", "method": "FGFI,CWD"},
    ]
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"dataset": "d", "opts": [["D", 4]], "rows": rows}))
    suite = read_suite(str(path))
    assert suite["opts"] == ["D", 4]
    by_name, by_file = suite["rows"][3:]
    assert by_name == rows[3] | {
        "config": "s.yaml",
        "init": "origin",
        "opts": ["A", 1, "B", [2], "C", 3],
        "teacher": "T",
        "teacher_config": "t.yaml",
    }
    assert by_file["config"] == "x.yaml" and by_file["teacher_config"] == "y.yaml"
    assert "teacher" not in by_file and "init" not in by_file
    rows[4] |= {"student": "by name"}
    path.write_text(yaml.safe_dump({"dataset": "d", "rows": rows}))
    with pytest.raises(ConfigError, match="its student 'by name' is distilled, name a plain one"):
        read_suite(str(path))
