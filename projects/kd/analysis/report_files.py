"""The files of a comparison: report.json, report.md, report.html, and the pictures beside them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence

import torch

from ..files import write_atomically
from . import comparison
from .deployed import measure_deployed, measured_on
from .pictures import (
    MIN_SCORE,
    ap_bars,
    ap_curves,
    cost_scatter,
    detections_side_by_side,
    label_maps_side_by_side,
)
from .report import (
    TASK_METRICS,
    further_tasks,
    last_metrics,
    mean_curve,
    seconds_per_iteration,
    summarise,
)
from .report_page import curves_of, report_page
from .report_tables import planning_table, result_table
from .suite_lessons import teachers_of
from .suites import Run


def collect(suite: dict, runs: Sequence[Run], command: str, measure: bool = False) -> dict:
    """What report.json holds, from the runs that have finished so far.

    Args:
        suite: of :func:`~projects.kd.analysis.suites.read_suite`.
        runs: of :func:`~projects.kd.analysis.suites.make_runs`.
        command: that made the comparison.
        measure: also measure size and speed of the detectors that the closing sentences name.
    """
    task = suite.get("task", "bbox")
    metrics = TASK_METRICS[task]
    learns_from = teachers_of(suite)
    single = [row["name"] for row in suite["rows"] if row.get("role") == "teacher"]
    rows, starts = [], []
    finished: dict[str, list[Run]] = {}
    for row in suite["rows"]:
        own = [run for run in runs if run.row is row and run.finished() is not None]
        if not own:
            continue
        name, folders = row["name"], [run.dir for run in own]
        finished[name] = own
        config = " ".join(own[0].flags[1:])
        facts = {"config": config, "iterations": own[0].cfg.SOLVER.MAX_ITER, **_costs(own)}
        if row.get("role") == "start":
            starts.append({"name": name, "seeds": 1, **facts})
            continue
        teacher = row.get("teacher", learns_from.get(name))
        if teacher is None and len(single) == 1 and row.get("role") != "teacher":
            teacher = single[0]
        rows.append(
            summarise(
                name,
                [last_metrics(folder, task) for folder in folders],
                metrics,
                **facts,
                distilled=name in learns_from or own[0].is_distilled,
                baseline=row.get("baseline", suite.get("baseline")),
                teacher=teacher,
                curve=mean_curve(folders, f"{task}/{metrics[0]}", facts["iterations"]),
                **({"role": row["role"]} if "role" in row else {}),
                **(further_tasks(folders) if task == "bbox" else {}),
            )
        )
    rows = comparison.compare_rows(rows, metrics[0])
    on = ""
    if measure:
        named = _named_in_sentences(rows, metrics[0])
        shown = {name: finished[name][0] for name in named}
        for name, values in measure_deployed(shown, suite["dataset"]).items():
            next(row for row in rows if row["name"] == name).update(values)
        on = measured_on(next(iter(shown.values()))) if shown else ""
    return {
        "title": suite.get("title", ""),
        "dataset": suite["dataset"],
        "task": task,
        "command": command,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "warnings": comparison.warnings(rows, metrics[0]),
        "conclusions": comparison.sentences(rows, metrics[0], on),
        "rows": rows,
        "starts": starts,
    }


def _named_in_sentences(rows: Sequence[dict], metric: str) -> list[str]:
    named = []
    for base, teacher, distilled in comparison.groups(rows):
        best = max(distilled, key=lambda row: row[metric])
        named += [row["name"] for row in (teacher, base, best) if row is not None]
    return list(dict.fromkeys(named))


def _costs(runs: Sequence[Run]) -> dict:
    """Time and memory of the runs of a row: mean time, most memory."""
    spent = [run.finished() for run in runs]
    peaks = {}
    for name, key in (("peak_memory_mb", "peak_mb"), ("gpu_peak_mb", "gpu_peak_mb")):
        known = [x[key] for x in spent if x.get(key) is not None]
        peaks[name] = max(known, default=None)
    return {
        "seconds_per_iteration": seconds_per_iteration([run.dir for run in runs]),
        "seconds_per_run": round(sum(x["seconds"] for x in spent) / len(spent), 1),
        **peaks,
    }


def write_report(
    suite: dict, runs: Sequence[Run], output: str, command: str, measure: bool = False
) -> dict:
    """Write all files from the runs finished so far; returns what report.json holds."""
    report = collect(suite, runs, command, measure)
    metric = TASK_METRICS[report["task"]][0]
    write_atomically(os.path.join(output, "report.json"), json.dumps(report, indent=2) + "\n")
    write_atomically(os.path.join(output, "report.md"), report_text(report))
    pictures = _draw(report, suite, runs, output, metric) if report["rows"] else {}
    write_atomically(os.path.join(output, "report.html"), report_page(report, pictures))
    return report


def report_text(report: dict) -> str:
    """report.md: a teacher that has nothing to teach comes first, then what was found."""
    metrics = TASK_METRICS[report["task"]]
    parts = [
        *(f"**{line}**" for line in report["warnings"]),
        f"# {report['title'] or 'Comparison'}",
        *report["conclusions"],
        f"{metrics[0]} on {report['dataset']}, mean over seeds with the sample deviation.",
        result_table(report["rows"], metrics).markdown(),
        "## Time and memory",
        planning_table([*report["starts"], *report["rows"]]).markdown(),
        f"`{report['command']}`",
        f"{report['machine']}; {report['versions']}",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _draw(report: dict, suite: dict, runs: Sequence[Run], output: str, metric: str) -> dict:
    """Draw what can be drawn of the rows; returns title to file."""
    rows, drawn = report["rows"], {}

    def place(name: str, title: str) -> str:
        drawn[title] = os.path.join(output, name)
        return drawn[title]

    ap_bars(rows, place("ap.png", f"{metric} of each seed"), report["title"], metric)
    points = {
        row["name"]: (row["cost"], row[metric])
        for row in rows
        if "cost" in row and row[metric] is not None and row.get("role") != "teacher"
    }
    if len(points) > 1:
        cost_scatter(points, place("cost.png", f"{metric} against the cost of training"), metric)
    if curves := curves_of(report):
        ap_curves(curves, os.path.join(output, "curves.png"), metric)
    found = _predictions(report, suite, runs)
    if found and report["task"] == "sem_seg":
        path = place("label_maps.png", "Label maps side by side")
        label_maps_side_by_side(suite["dataset"], found, path)
    elif found:
        path = place("detections.png", "Detections side by side")
        threshold = suite.get("score", MIN_SCORE)
        detections_side_by_side(suite["dataset"], found, path, threshold=threshold)
    return drawn


def _predictions(report: dict, suite: dict, runs: Sequence[Run]) -> dict[str, str]:
    """Row to the file of predictions of its first seed, of the rows that the suite shows."""
    kind = "sem_seg_predictions" if report["task"] == "sem_seg" else "coco_instances_results"
    found = {}
    for name in suite.get("show", [row["name"] for row in report["rows"]]):
        own = [run for run in runs if run.row["name"] == name and run.finished() is not None]
        for run in own[:1]:
            inference = os.path.join(run.dir, "inference")
            for folder in (inference, os.path.join(inference, suite["dataset"])):
                if os.path.isfile(file := os.path.join(folder, f"{kind}.json")):
                    found[name] = file
    return found
