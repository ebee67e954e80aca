#!/usr/bin/env python
"""Train and compare a suite of configs over seeds: a table, a report and pictures.

    python tools/compare.py --suite configs/suites/demo.yaml --output output/demo --seeds 1 2 3

A suite is a YAML file::

    title: what is compared
    dataset: shapes_val                # a data set of DATASETS.TEST
    task: bbox                         # or segm, keypoints, sem_seg: what the table shows
    baseline: student                  # the row that gains and costs are counted from
    show: [teacher, student, ...]      # columns of the picture of detections or label maps
    score: 0.3                         # detections below are not drawn; not for sem_seg
    opts: [KEY, value, ...]            # overrides for every run
    rows:
      - {name: teacher, config: ..., role: teacher}
      - {name: student, config: ...}
      - {name: student+CWD, config: ..., opts: [KEY, value, ...]}

Rows with role teacher are trained once, with their config's own seed; all others once a seed,
distilled ones with KD.TEACHER.WEIGHTS pointing to the teacher (of several, the one whose config
they name). Any row may start from the weights of one above it that is trained once: ``init: name``.
A row with role start is trained once to be such a start, and not reported. Each run is
``train_net.py`` in a process of its own, with its OUTPUT_DIR under ``--output``. A finished run is
kept while its settings stay the same, an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from concurrent import futures

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402

from projects.kd import load_config  # noqa: E402
from projects.kd.arguments import Parser, output_folder, whole  # noqa: E402
from projects.kd.data.register import register_configured  # noqa: E402
from projects.kd.errors import exit_on_user_error  # noqa: E402
from projects.kd.pictures import (  # noqa: E402
    MIN_SCORE,
    ap_bars,
    ap_curves,
    cost_scatter,
    detections_side_by_side,
    label_maps_side_by_side,
)
from projects.kd.report import (  # noqa: E402
    TASK_METRICS,
    further_tasks,
    last_metrics,
    markdown_table,
    read_jsonl,
    relative_costs,
    seconds_per_iteration,
    summarise,
    write_atomically,
)
from projects.kd.suites import (  # noqa: E402
    Run,
    is_trained_once,
    make_runs,
    read_suite,
    select_rows,
)


def execute_all(suite: dict, runs: list[Run], output: str, command: str, jobs: int) -> dict:
    """Execute what is trained once, then ``jobs`` other runs at a time; report after each."""
    total = len(runs)
    first = sum(is_trained_once(run.row) for run in runs)
    for i, run in enumerate(runs[:first], 1):
        run.execute(f"{i}/{total}")
    report = write_report(suite, runs, output, command)
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else 0
    with futures.ThreadPoolExecutor(jobs) as pool:
        waiting = {
            pool.submit(run.execute, f"{i}/{total}", threads)
            for i, run in enumerate(runs[first:], first + 1)
        }
        for done in futures.as_completed(waiting):
            if done.exception() is not None:
                pool.shutdown(cancel_futures=True)
            done.result()
            report = write_report(suite, runs, output, command)
    return report


def write_report(suite: dict, runs: list[Run], output: str, command: str) -> dict:
    """Write report.json, report.md and the pictures from the runs finished so far."""
    task = suite.get("task", "bbox")
    metrics = TASK_METRICS[task]
    first = f"{task}/{metrics[0]}"
    predictions = "sem_seg_predictions" if task == "sem_seg" else "coco_instances_results"
    rows, curves, detections = [], {}, {}
    for row in suite["rows"]:
        own = [run for run in runs if run.row is row and run.seconds() is not None]
        if not own or row.get("role") == "start":
            continue
        name = row["name"]
        seconds = [run.seconds() for run in own]
        rows.append(
            summarise(
                name,
                [last_metrics(run.dir, task) for run in own],
                metrics,
                config=row["config"],
                seconds_per_iteration=seconds_per_iteration([run.dir for run in own]),
                seconds_per_run=round(sum(seconds) / len(seconds), 1),
                **(further_tasks([run.dir for run in own]) if task == "bbox" else {}),
            )
        )
        points = [
            (line["iteration"] + 1, line[first])
            for line in read_jsonl(os.path.join(own[0].dir, "metrics.json"))
            if math.isfinite(line.get(first, math.nan))
        ]
        curves[name] = points
        inference = os.path.join(own[0].dir, "inference")
        for folder in (os.path.join(inference, suite["dataset"]), inference):
            file = os.path.join(folder, f"{predictions}.json")
            if os.path.isfile(file):
                detections[name] = file
                break
    report = {
        "title": suite.get("title", ""),
        "dataset": suite["dataset"],
        "task": task,
        "command": command,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "rows": rows,
    }
    write_atomically(os.path.join(output, "report.json"), json.dumps(report, indent=2) + "\n")
    baseline = suite.get("baseline")
    teachers = {row["name"] for row in suite["rows"] if row.get("role") == "teacher"}
    text = (
        f"# {report['title'] or 'Comparison'}\n\n{metrics[0]} on {report['dataset']}, mean over "
        f"seeds with the sample deviation; cost is the time of an iteration beside the baseline's."
        f"\n\n{markdown_table(rows, baseline, metrics)}\n"
        f"`{command}`\n\n{report['machine']}; {report['versions']}\n"
    )
    write_atomically(os.path.join(output, "report.md"), text)
    if rows:
        ap_bars(rows, os.path.join(output, "ap.png"), report["title"], metrics[0])
        costs = relative_costs([row for row in rows if row["name"] not in teachers], baseline)
        points = {row["name"]: (costs[row["name"]], row[metrics[0]]) for row in rows
                  if row["name"] in costs and row[metrics[0]] is not None}  # fmt: skip
        if len(points) > 1:
            cost_scatter(points, os.path.join(output, "cost.png"), metrics[0])
    if any(len(points) > 1 for points in curves.values()):
        ap_curves(curves, os.path.join(output, "curves.png"), metrics[0])
    shown = [name for name in suite.get("show", detections) if name in detections]
    if shown:
        found = {name: detections[name] for name in shown}
        if task == "sem_seg":
            picture = os.path.join(output, "label_maps.png")
            label_maps_side_by_side(suite["dataset"], found, picture)
        else:
            picture = os.path.join(output, "detections.png")
            threshold = suite.get("score", MIN_SCORE)
            detections_side_by_side(suite["dataset"], found, picture, threshold=threshold)
    return report


def main() -> None:
    """Parse arguments, run what is missing, report."""
    parser = Parser(
        __doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--suite", required=True, help="suite YAML file")
    parser.add_argument(
        "--output", type=output_folder, required=True, help="folder for runs and reports"
    )
    parser.add_argument("--seeds", type=whole(), nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", help="names of rows to run (with their teacher)")
    parser.add_argument(
        "--jobs", type=whole(1), default=1, help="runs at a time (they share the CPU)"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="-- KEY value ... for every run")
    with exit_on_user_error():
        args = parser.parse_args()
        opts = [item for item in args.opts if item != "--"]
        suite = read_suite(args.suite)
        if args.only:
            suite["rows"] = select_rows(suite["rows"], args.only)
        runs = make_runs(suite, args.seeds, args.output, opts)
        first = runs[0]
        register_configured(load_config(first.row["config"], [str(x) for x in first.opts]))
        start = time.time()
        command = shlex.join(["python", "tools/compare.py", *sys.argv[1:]])
        report = execute_all(suite, runs, args.output, command, args.jobs)
        metrics = TASK_METRICS[report["task"]]
        print(f"\n{markdown_table(report['rows'], suite.get('baseline'), metrics)}")
        print(f"{time.time() - start:.0f} s; report and pictures in {args.output}")


if __name__ == "__main__":
    main()
