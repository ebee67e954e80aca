"""Result tables of several runs: report.json, report.md, and the pictures beside them."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# further columns: task and metric in metrics.json, name of the column
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


def summarise(name: str, runs: Sequence[Mapping[str, float]], **facts) -> dict:
    """One row of the report: means over seeds, and their spread.

    Args:
        name: the row's name.
        runs: metrics of each seed.
        **facts: more entries of the row (config, seconds, ...).

    Returns:
        ``{"name", "AP", ..., "seeds", "AP_std", "AP_seeds"}``; a metric that is undefined in every
        run (no object of that size) is None. ``AP_std`` is the sample deviation, None for one run.
    """
    row: dict = {"name": name}
    for metric in METRICS:
        values = [run[metric] for run in runs if _is_number(run.get(metric))]
        row[metric] = round(statistics.fmean(values), 3) if values else None
    row["seeds"] = len(runs)
    aps = [run["AP"] for run in runs if _is_number(run.get("AP"))]
    row["AP_std"] = round(statistics.stdev(aps), 3) if len(aps) > 1 else None
    row["AP_seeds"] = [round(ap, 3) for ap in aps]
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


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def markdown_table(rows: Sequence[Mapping], baseline: str | None = None) -> str:
    """The rows as a markdown table; with ``baseline``, the gain in AP over that row."""
    base = next((row["AP"] for row in rows if row["name"] == baseline), None)
    further = [column for column in FURTHER if any(column in row for row in rows)]
    header = ["name", *METRICS, *further, "seeds"] + (["gain"] if base is not None else [])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [row["name"], *(_cell(row, metric) for metric in METRICS)]
        cells += [f"{row[column]:.1f}" if column in row else "-" for column in further]
        cells.append(str(row["seeds"]))
        if base is not None:
            known = row["AP"] is not None and row["name"] != baseline
            cells.append(f"{row['AP'] - base:+.1f}" if known else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping, metric: str) -> str:
    if row[metric] is None:
        return "-"
    spread = row.get("AP_std") if metric == "AP" else None
    return f"{row[metric]:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def write_atomically(path: str, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half."""
    temporary = f"{path}.tmp{os.getpid()}"
    with open(temporary, "w") as file:
        file.write(text)
    os.replace(temporary, path)
