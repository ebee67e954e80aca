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
      - {name: long+CWD, config: ..., baseline: long, teacher: ...}   # names of other rows

Rows with role teacher are trained once, with their config's own seed; all others once a seed,
distilled ones with KD.TEACHER.WEIGHTS pointing to the teacher (of several, the one that their
entry ``teacher`` names, else the one whose config they name). A row may have a ``baseline`` of its
own: a suite can hold two detectors or two lengths of training. Any row may start from the weights
of one above it that is trained once: ``init: name``. A row with role start is trained once to be
such a start, and not reported. Each run is
``train_net.py`` in a process of its own, with its OUTPUT_DIR under ``--output``. A finished run is
kept while its settings stay the same, an interrupted one is resumed. ``--minutes`` stops in time,
with status 3, and the same command goes on later; ``--jobs auto --bundle FILE`` uses a GPU that is
there for a few minutes only, and packs what to bring back.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from projects.kd import load_config  # noqa: E402
from projects.kd.analysis.report import TASK_METRICS  # noqa: E402
from projects.kd.analysis.report_files import write_report  # noqa: E402
from projects.kd.analysis.report_tables import result_table  # noqa: E402
from projects.kd.analysis.run_folders import bundle  # noqa: E402
from projects.kd.analysis.suite_runner import execute_suite, number_of_jobs  # noqa: E402
from projects.kd.analysis.suites import make_runs, read_suite, select_rows  # noqa: E402
from projects.kd.arguments import (  # noqa: E402
    Parser,
    number,
    output_file,
    output_folder,
    whole,
)
from projects.kd.data.register import register_configured  # noqa: E402
from projects.kd.errors import exit_on_user_error  # noqa: E402

NOT_FINISHED = 3  # exit status when --minutes were over first


def compare(args) -> int:
    """Run what is missing, report; the exit status."""
    opts = [item for item in args.opts if item != "--"]
    suite = read_suite(args.suite)
    if args.only:
        suite["rows"] = select_rows(suite["rows"], args.only)
    runs = make_runs(suite, args.seeds, args.output, opts)
    first = runs[0]
    register_configured(load_config(first.row["config"], [str(x) for x in first.opts]))
    start = time.time()
    command = shlex.join(["python", "tools/compare.py", *sys.argv[1:]])
    try:
        complete = execute_suite(
            runs, args.jobs, lambda: write_report(suite, runs, args.output, command), args.minutes
        )
        report = write_report(suite, runs, args.output, command, measure=complete)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on where the runs were")
        return 128 + signal.SIGINT
    finally:
        if args.bundle:
            count = bundle(args.output, args.bundle)
            print(f"{args.bundle}: {count} reports and logs", flush=True)
    print(f"\n{result_table(report['rows'], TASK_METRICS[report['task']]).markdown()}")
    for line in [*report["warnings"], *report["conclusions"]]:
        print(line)
    page = os.path.join(args.output, "report.html")
    print(f"{time.time() - start:.0f} s; report: {page}, and report.md and pictures beside it")
    return 0 if complete else NOT_FINISHED


def main() -> None:
    """Parse arguments and compare."""
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
        "--jobs",
        type=number_of_jobs,
        default=1,
        help="runs at a time (they share the CPU), or auto: one for every two cores, as far as the "
        "GPU's memory allows",
    )
    parser.add_argument("--minutes", type=number(0.01), help="stop what runs after so many")
    parser.add_argument(
        "--bundle", type=output_file, help="pack reports and logs, no weights, into this .tar.gz"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="-- KEY value ... for every run")
    with exit_on_user_error():
        status = compare(parser.parse_args())
    sys.exit(status)


if __name__ == "__main__":
    main()
