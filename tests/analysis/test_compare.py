"""kd-compare and its suites: which runs, what is kept and written; trainings are faked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import pytest
import yaml
from kd_suites import execute, fake_training, make_suite, registered_toy_data

from projects.kd.analysis import report_files, suites
from projects.kd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def suite():
    return make_suite()


@pytest.fixture
def toy_data(tmp_path):
    with registered_toy_data(tmp_path):
        yield


def test_teacher_first_then_seed_by_seed_with_its_weights(suite, tmp_path):
    runs = suites.make_runs(suite, [1, 2], str(tmp_path), ["SOLVER.BASE_LR", 0.1])
    assert [run.label for run in runs] == [
        "teacher", "student, seed 1", "student+X, seed 1", "student, seed 2", "student+X, seed 2"
    ]  # fmt: skip
    weights = os.path.join(runs[0].dir, "model_final.pth")
    assert all(run.opts[:2] != ["KD.TEACHER.WEIGHTS", weights] for run in runs[:1])
    for run in runs[1:]:
        if run.row["name"] == "student":
            assert not run.needs and "KD.TEACHER.WEIGHTS" not in run.opts
        else:
            assert run.opts[run.opts.index("KD.TEACHER.WEIGHTS") + 1] == weights
        assert run.opts[-2:] == ["SEED", run.seed]
    assert "SOLVER.MAX_ITER" in runs[2].opts and "SOLVER.MAX_ITER" not in runs[1].opts
    assert len({run.dir for run in runs}) == 5


def test_of_several_teachers_each_row_gets_the_one_it_names(tmp_path):
    suite = suites.read_suite("configs/suites/shapes_detectors.yaml")
    runs = suites.make_runs(suite, [1], str(tmp_path), [])
    teachers = [run for run in runs if run.row.get("role") == "teacher"]
    assert len(teachers) == 9 and runs[:9] == teachers
    for run in runs[9:]:
        family = run.row["config"].split("_student")[0]
        if "method" not in run.row:
            assert not run.needs and "KD.TEACHER.WEIGHTS" not in run.opts
        else:
            (teacher,) = run.needs
            flags = ["--config-file", f"{family}_student.yaml", "--teacher", teacher.row["config"]]
            assert run.flags == [*flags, "--method", run.row["method"]]
            assert teacher.row["config"] == f"{family}_teacher.yaml"
            weights = run.opts[run.opts.index("KD.TEACHER.WEIGHTS") + 1]
            assert weights == os.path.join(teacher.dir, "model_final.pth")
    suite["rows"] = [row for row in suite["rows"] if row["name"] != "FCOS teacher"]
    with pytest.raises(
        ConfigError, match="'FCOS student.CWD' learns from 'FCOS teacher', which is no"
    ):
        suites.make_runs(suite, [1], str(tmp_path), [])


def test_a_teacher_may_be_found_by_the_config_that_a_row_names(suite, tmp_path):
    rows = suite["rows"]
    rows += [dict(rows[1], name="other", config="configs/shapes/fcos_teacher.yaml")]
    runs = suites.make_runs(suite, [1], str(tmp_path), [])
    assert [need.label for run in runs[3:] for need in run.needs] == ["teacher"]
    rows += [dict(rows[1], name="again")]
    with pytest.raises(ConfigError, match="same config"):
        suites.make_runs(suite, [1], str(tmp_path), [])


def test_only_keeps_the_named_rows_and_the_teachers_they_learn_from(suite):
    def names(rows, *only):
        return [row["name"] for row in suites.select_rows(rows, list(only))]

    assert names(suite["rows"], "student") == ["student", "teacher"]
    rows = suites.read_suite("configs/suites/shapes_detectors.yaml")["rows"]
    assert names(rows, "FCOS student") == ["FCOS student"]
    assert names(rows, "FCOS student+CWD") == ["FCOS teacher", "FCOS student+CWD"]
    rows = suites.read_suite("configs/suites/shapes_methods.yaml")["rows"]
    both = ["teacher", "teacher 2x", "student+SDF 2x"]  # the second starts from the first
    assert names(rows, "student+SDF 2x") == both
    assert names(rows, "teacher 2x") == both[:2]
    with pytest.raises(ConfigError, match="no row 'studnet'"):
        names(rows, "studnet")


def test_a_teacher_starts_from_the_weights_of_another(tmp_path):
    suite = suites.read_suite("configs/suites/shapes_methods.yaml")
    first, second, student, *_ = suites.make_runs(suite, [1], str(tmp_path), [])
    weights = os.path.join(first.dir, "model_final.pth")
    assert second.opts[second.opts.index("MODEL.WEIGHTS") + 1] == weights
    assert "MODEL.WEIGHTS" not in first.opts + student.opts
    stamp = second.stamp()
    first.opts += ["SOLVER.MAX_ITER", 3]
    assert second.stamp() != stamp  # another first teacher makes another second
    suite["rows"] = [row for row in suite["rows"] if row["name"] in ("teacher 2x", "student")]
    with pytest.raises(ConfigError, match="'teacher 2x' starts from 'teacher', which is no row"):
        suites.make_runs(suite, [1], str(tmp_path), [])


def test_every_row_may_start_from_one_that_is_trained_once(suite, tmp_path):
    start = {"name": "origin", "config": suite["rows"][0]["config"], "role": "start"}
    teacher, distilled = suite["rows"][1], suite["rows"][2]
    suite["rows"] = [start, teacher, distilled | {"init": "origin"}]
    origin, teacher, *students = suites.make_runs(suite, [1, 2], str(tmp_path), [])
    assert (origin.label, teacher.label) == ("origin", "teacher") and len(students) == 2
    for run in students:
        assert run.needs == [teacher, origin]
        assert run.opts[run.opts.index("MODEL.WEIGHTS") + 1] == origin.weights
        assert run.opts[run.opts.index("KD.TEACHER.WEIGHTS") + 1] == teacher.weights
    stamps = [run.stamp() for run in (origin, teacher, students[0])]
    origin.opts += ["SOLVER.MAX_ITER", 3]  # another start makes another student, not teacher
    now = [run.stamp() for run in (origin, teacher, students[0])]
    assert [a == b for a, b in zip(stamps, now, strict=True)] == [False, True, False]
    kept = suites.select_rows(suite["rows"], ["student+X"])
    assert [row["name"] for row in kept] == ["origin", "teacher", "student+X"]


def test_a_start_is_trained_and_not_reported(suite, tmp_path, toy_data, monkeypatch):
    suite["rows"][0] |= {"role": "start", "name": "origin"}
    suite["rows"][2]["init"] = "origin"
    suite["baseline"] = "student+X"
    commands = fake_training(monkeypatch, [50.0, 30.0, 4.0, 6.0])
    report = execute(suite, tmp_path)
    assert len(commands) == 4
    assert [row["name"] for row in report["rows"]] == ["teacher", "student+X"]


def test_an_unknown_role_is_refused(tmp_path):
    path = tmp_path / "suite.yaml"
    rows = [{"name": "a", "config": "b", "role": "guide"}]
    path.write_text(yaml.safe_dump({"dataset": "x", "rows": rows}))
    with pytest.raises(ConfigError, match="role of row 'a': 'guide' is not one of teacher, start"):
        suites.read_suite(str(path))


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"score": 1.5}, "score is 1.5, use 0 to 1"),
        ({"score": "low"}, "score is 'low', write a number from 0 to 1"),
        ({"score": 0.1, "task": "sem_seg"}, "label maps have no score"),
    ],
)
def test_a_score_that_cannot_be_meant_is_refused(tmp_path, entries, message):
    path = tmp_path / "suite.yaml"
    rows = [{"name": "a", "config": "b"}]
    path.write_text(yaml.safe_dump({"dataset": "x", "rows": rows, **entries}))
    with pytest.raises(ConfigError, match=message):
        suites.read_suite(str(path))


def test_detections_above_the_suites_score_are_drawn(suite, tmp_path, toy_data, monkeypatch):
    drawn = []

    def draw(dataset, found, path, threshold):
        drawn.append(threshold)
        Path(path).write_bytes(b"")

    monkeypatch.setattr(report_files, "detections_side_by_side", draw)
    for entries in ({}, {"score": 0.1}):
        fake_training(monkeypatch, [30.0, 1.0, 4.0, 3.0, 8.0])
        execute(suite | entries, tmp_path / "out")
    assert drawn == [0.3, 0.1]


def test_report_and_pictures(suite, tmp_path, toy_data, monkeypatch):
    commands = fake_training(monkeypatch, [30.0, 1.0, 4.0, 3.0, 8.0])
    report = execute(suite, tmp_path / "out")
    assert len(commands) == 5
    on_disk = json.loads((tmp_path / "out" / "report.json").read_text())
    assert on_disk == report and on_disk["dataset"] == "compare_toy"
    by_name = {row["name"]: row for row in on_disk["rows"]}
    assert (by_name["teacher"]["AP"], by_name["teacher"]["seeds"]) == (30.0, 1)
    assert (by_name["student"]["AP"], by_name["student+X"]["AP"]) == (2.0, 6.0)
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# test\n\nstudent 2.0, distilled (X) 6.0: +4.0 AP, mean of 2 seeds; ")
    assert "| +4.0 |" in text and "| 14 % |" in text  # 4 of 28; 6 +- 2.8 is no clear gain
    row = by_name["student+X"]
    assert (row["peak_memory_mb"], row["gpu_peak_mb"], row["iterations"]) == (2.0, 104.9, 7)
    assert row["distilled"] and (row["baseline"], row["teacher"]) == ("student", "teacher")
    assert not by_name["teacher"]["distilled"] and by_name["teacher"]["role"] == "teacher"
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2  # bars and detections: no time was logged
    picture = cv2.imread(str(tmp_path / "out" / "detections.png"))
    assert picture.std() > 10 and (tmp_path / "out" / "ap.png").stat().st_size > 5000


def test_finished_runs_are_kept_and_changed_ones_moved_aside(
    suite, tmp_path, toy_data, monkeypatch
):
    commands = fake_training(monkeypatch, [float(i) for i in range(20)])
    execute(suite, tmp_path, seeds=[1])
    assert len(commands) == 3
    execute(suite, tmp_path, seeds=[1])
    assert len(commands) == 3
    suite["rows"][2]["opts"] = ["SOLVER.MAX_ITER", 8]
    execute(suite, tmp_path, seeds=[1])
    assert len(commands) == 4
    assert (tmp_path / "runs" / "student+X" / "seed1.old1" / "metrics.json").is_file()
    suite["rows"][1]["opts"] = ["SOLVER.MAX_ITER", 9]  # the teacher, and who learns
    execute(suite, tmp_path, seeds=[1])
    assert len(commands) == 6


def test_an_interrupted_run_is_resumed(suite, tmp_path, toy_data, monkeypatch):
    run = suites.make_runs(suite, [1], str(tmp_path), [])[1]
    fake_training(monkeypatch, [], status=1)
    with pytest.raises(ConfigError, match="student, seed 1 failed .*something is wrong"):
        run.execute("1/1")
    (Path(run.dir) / "last_checkpoint").write_text("model_0000004.pth")
    commands = fake_training(monkeypatch, [1.0])
    run.execute("1/1")
    assert "--resume" in commands[0]


def test_a_suite_without_rows_is_refused(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"dataset": "x"}))
    with pytest.raises(ConfigError, match="dataset and rows"):
        suites.read_suite(str(path))
    path.write_text("rows: [")
    with pytest.raises(ConfigError, match="cannot read"):
        suites.read_suite(str(path))


def test_an_unknown_task_is_refused(tmp_path):
    path = tmp_path / "suite.yaml"
    rows = [{"name": "a", "config": "b"}]
    path.write_text(yaml.safe_dump({"dataset": "x", "rows": rows, "task": "boxes"}))
    with pytest.raises(
        ConfigError, match="task: .boxes. is not one of bbox, segm, keypoints, sem_seg"
    ):
        suites.read_suite(str(path))


def test_the_shipped_suites_are_read_and_name_existing_configs():
    root = Path(__file__).resolve().parents[2]
    for path in (root / "configs" / "suites").glob("*.yaml"):
        suite = suites.read_suite(str(path))
        names = [row["name"] for row in suite["rows"]]
        assert suite.get("baseline", names[0]) in names, path
        assert set(suite.get("show", names)) <= set(names), path
        assert all((root / row["config"]).is_file() for row in suite["rows"]), path
