"""Numbers of several runs: what they wrote, and their means over seeds."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# What a table shows of each task; the first is the one that gains are counted in.
TASK_METRICS = {
    "bbox": METRICS,
    "segm": METRICS,
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
    "sem_seg": ("mIoU", "fwIoU", "mACC", "pACC"),
}
# further columns of the task bbox: name of the column, task and metric in metrics.json
FURTHER = {
    "mask AP": ("segm", "AP"),
    "keypoint AP": ("keypoints", "AP"),
    "mIoU": ("sem_seg", "mIoU"),
}


def last_metrics(run_dir: str, task: str = "bbox") -> dict[str, float]:
    """The last evaluation in a run's metrics.json, ``{}`` when there is none.

    Args:
        run_dir: an OUTPUT_DIR of train_net.py.
        task: "bbox", "segm", "keypoints", ...
    """
    found: dict[str, float] = {}
    for line in read_jsonl(os.path.join(run_dir, "metrics.json")):
        own = {k.split("/", 1)[1]: v for k, v in line.items() if k.startswith(task + "/")}
        if own:
            found = {**own, "iteration": line["iteration"]}
    return found


def read_jsonl(path: str) -> list[dict]:
    """Lines of a JSON-lines file; a torn last line (a killed run) is left out."""
    lines = []
    if os.path.isfile(path):
        with open(path) as file:
            for text in file:
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    continue
    return lines


def seconds_per_iteration(run_dirs: Sequence[str]) -> float | None:
    """Mean over runs of the median logged time of an iteration, None where none was logged."""
    medians = []
    for folder in run_dirs:
        lines = read_jsonl(os.path.join(folder, "metrics.json"))
        times = [line["time"] for line in lines if _is_number(line.get("time"))]
        medians += [statistics.median(times)] if times else []
    return round(statistics.fmean(medians), 4) if medians else None


def summarise(
    name: str, runs: Sequence[Mapping[str, float]], metrics: Sequence[str] = METRICS, **facts
) -> dict:
    """One row of the report: means over seeds, and their spread.

    Args:
        name: the row's name.
        runs: metrics of each seed.
        metrics: those to take; the first is spread over seeds.
        **facts: more entries of the row (config, seconds, ...).

    Returns:
        ``{"name", "AP", ..., "seeds", "AP_std", "AP_seeds"}``; a metric that is undefined in every
        run (no object of that size) is None. ``AP_std`` is the sample deviation, None for one run;
        for other ``metrics`` these names start with the first of them.
    """
    row: dict = {"name": name}
    for metric in metrics:
        values = [run[metric] for run in runs if _is_number(run.get(metric))]
        row[metric] = round(statistics.fmean(values), 3) if values else None
    row["seeds"] = len(runs)
    first = metrics[0]
    found = [run[first] for run in runs if _is_number(run.get(first))]
    row[f"{first}_std"] = round(statistics.stdev(found), 3) if len(found) > 1 else None
    row[f"{first}_seeds"] = [round(value, 3) for value in found]
    return {**row, **facts}


def further_tasks(run_dirs: Sequence[str]) -> dict[str, float]:
    """Means over runs of what models predict beside boxes; only what there is."""
    found = {}
    for column, (task, metric) in FURTHER.items():
        values = [last_metrics(folder, task).get(metric) for folder in run_dirs]
        values = [value for value in values if _is_number(value)]
        if values:
            found[column] = round(statistics.fmean(values), 3)
    return found


def mean_curve(run_dirs: Sequence[str], key: str, iterations: int) -> list[list[float]]:
    """[iterations done, mean over runs] of a metric, "bbox/AP" for example.

    Only evaluations that every run has; the last one where a resumed run evaluated twice.
    detectron2 notes the one after training one iteration late: it counts as at ``iterations``.
    """
    curves = []
    for folder in run_dirs:
        lines = read_jsonl(os.path.join(folder, "metrics.json"))
        known = [x for x in lines if _is_number(x.get(key))]
        curves.append({min(x["iteration"] + 1, iterations): x[key] for x in known})
    common = set(curves[0]).intersection(*curves[1:]) if curves else ()
    return [[n, statistics.fmean(curve[n] for curve in curves)] for n in sorted(common)]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
