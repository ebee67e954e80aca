"""Tables of results: what they average, what they leave out, and how they are written."""

from __future__ import annotations

import json

import pytest

from projects.kd.analysis.comparison import compare_rows
from projects.kd.analysis.report import (
    TASK_METRICS,
    further_tasks,
    last_metrics,
    mean_curve,
    read_jsonl,
    seconds_per_iteration,
    summarise,
)
from projects.kd.analysis.report_tables import planning_table, result_table
from projects.kd.files import write_atomically


def write_lines(path, lines):
    path.write_text("\n".join(lines) + "\n")


def test_last_metrics_takes_the_last_evaluation_of_the_task(tmp_path):
    lines = [
        json.dumps({"iteration": 9, "bbox/AP": 1.0, "bbox/APs": 0.5, "segm/AP": 9.0}),
        json.dumps({"iteration": 10, "total_loss": 3.0}),
        '{"iteration": 19, "bbox/AP": 2.5, "bbox/APs": NaN}',
        '{"iteration": 29, "bbox/AP": 7',  # torn by a kill
    ]
    write_lines(tmp_path / "metrics.json", lines)
    found = last_metrics(str(tmp_path))
    assert found["AP"] == 2.5 and found["iteration"] == 19
    assert found["APs"] != found["APs"]
    assert len(read_jsonl(str(tmp_path / "metrics.json"))) == 3
    assert last_metrics(str(tmp_path / "nowhere")) == {}


def test_summarise_averages_and_spreads_over_seeds():
    nan = float("nan")
    row = summarise("a", [{"AP": 1.0, "APl": nan}, {"AP": 2.0, "APl": nan}, {"AP": 6.0}], x=1)
    assert row["AP"] == 3.0
    assert row["AP_std"] == pytest.approx(2.646)  # sample deviation: sqrt((4 + 1 + 9) / 2)
    assert row["AP_seeds"] == [1.0, 2.0, 6.0]
    assert row["APl"] is None and row["AP50"] is None
    assert row["seeds"] == 3 and row["x"] == 1
    assert summarise("b", [{"AP": 1.0}])["AP_std"] is None
    json.dumps(row, allow_nan=False)


def test_table_shows_gains_over_the_baseline():
    plain = {"baseline": "student"}
    rows = [
        summarise("teacher", [{"AP": 34.0}], **plain),
        summarise("student", [{"AP": 1.0}, {"AP": 2.0}], **plain),
        summarise("student+X", [{"AP": 4.0}, {"AP": 6.0}], **plain),
    ]
    table = result_table(compare_rows(rows, "AP"))
    lines = table.markdown().splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "34.0" in lines[2] and "+32.5" in lines[2]
    assert "1.5 ± 0.7" in lines[3] and "+" not in lines[3]
    assert "+3.5" in lines[4]
    gain = table.header.index("gain")
    assert [line[gain].value for line in table.lines] == [32.5, None, 3.5]
    others = [{**row, "baseline": None} for row in rows]
    assert "gain" not in result_table(compare_rows(others, "AP")).header
    others = [{**row, "baseline": "no such row"} for row in rows]
    assert "gain" not in result_table(compare_rows(others, "AP")).header


def test_columns_of_further_tasks_appear_where_there_are_any(tmp_path):
    for seed, ap in enumerate((10.0, 20.0)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        line = {"iteration": 9, "bbox/AP": 1.0, "segm/AP": ap, "keypoints/AP": float("nan")}
        (folder / "metrics.json").write_text(json.dumps(line) + "\n")
    found = further_tasks([str(tmp_path / "0"), str(tmp_path / "1")])
    assert found == {"mask AP": 15.0}
    rows = [summarise("a", [{"AP": 1.0}], **found), summarise("b", [{"AP": 2.0}])]
    lines = result_table(rows).markdown().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "mask AP" in lines[0] and "keypoint AP" not in lines[0]
    assert "| 15.0 | 1 |" in lines[2] and "| - | 1 |" in lines[3]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_atomically(str(path), "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError):
        write_atomically(str(path), "new")
    assert path.read_text() == "old"


def test_segmentation_is_counted_in_miou():
    metrics = TASK_METRICS["sem_seg"]
    rows = [
        summarise("plain", [{"mIoU": 40.0}, {"mIoU": 42.0}], metrics, seconds_per_iteration=0.2,
                  baseline="plain"),
        summarise("AT", [{"mIoU": 44.0, "pACC": 90.0}], metrics, seconds_per_iteration=0.25,
                  baseline="plain"),
    ]  # fmt: skip
    assert rows[0]["mIoU_std"] == pytest.approx(1.414) and rows[0]["mIoU_seeds"] == [40.0, 42.0]
    text = result_table(compare_rows(rows, "mIoU"), metrics).markdown()
    assert "| name | mIoU | fwIoU | mACC | pACC | seeds | gain | cost |" in text
    assert "| plain | 41.0 ± 1.4 | - | - | - | 2 |  | 1.00x |" in text
    assert "| AT | 44.0 | - | - | 90.0 | 1 | +3.0 | 1.25x |" in text


def test_seconds_per_iteration_is_the_mean_of_medians(tmp_path):
    folders = []
    for name, times in (("a", (9.0, 0.2, 0.3)), ("b", (0.5,)), ("c", ())):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "metrics.json", [json.dumps({"time": t}) for t in times])
        folders.append(str(tmp_path / name))
    assert seconds_per_iteration(folders) == pytest.approx(0.4)
    assert seconds_per_iteration(folders[2:]) is None


def test_a_curve_is_the_mean_over_the_runs_that_all_evaluated(tmp_path):
    folders = []
    for name, points in (("a", {9: 1.0, 19: 5.0}), ("b", {9: 2.0, 19: float("nan"), 29: 7.0})):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"iteration": n, "bbox/AP": v}) for n, v in points.items()]
        write_lines(tmp_path / name / "metrics.json", [*lines, json.dumps({"iteration": 30})])
        folders.append(str(tmp_path / name))
    assert mean_curve(folders, "bbox/AP", 30) == [[10, 1.5]]
    assert mean_curve(folders[:1], "bbox/AP", 19) == [[10, 1.0], [19, 5.0]]  # noted one late
    assert mean_curve(folders[:1], "segm/AP", 30) == [] and mean_curve([], "bbox/AP", 30) == []


def test_the_planning_table_has_the_columns_that_are_known():
    rows = [
        {"name": "origin", "seeds": 1, "iterations": 600, "seconds_per_run": 90.0},
        {"name": "student", "seeds": 3, "iterations": 400, "seconds_per_run": 60.0,
         "peak_memory_mb": 1234.0, "gpu_peak_mb": None},
    ]  # fmt: skip
    table = planning_table(rows)
    assert table.header == ["name", "iterations", "runs", "minutes a run", "memory, GB"]
    text = table.markdown()
    assert "| origin | 600 | 1 | 1.5 | - |" in text and "| student | 400 | 3 | 1.0 | 1.2 |" in text
    assert "All runs together: 4.5 minutes" in text  # 1.5 + 3 x 1.0
