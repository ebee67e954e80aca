"""Train and compare a suite of configs over seeds: a table, a report and pictures.

    kd-compare --suite configs/suites/demo.yaml --output output/demo --seeds 1 2 3

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

Rows with role teacher are trained once, with their config's own seed, all others once for each
seed. KD.TEACHER.WEIGHTS of a distilled row is the teacher's file; of several teachers it is the one
that the row's ``teacher`` names, else the one whose config the row names. A row may have its own
``baseline``, so a suite can hold two detectors or two lengths of training. A row may start from the
weights of a row above it that is trained once: ``init: name``. A row with role start is trained
once to be such a start, and is not reported.

Each run is a training in its own process, with its OUTPUT_DIR under ``--output``. A finished run is
kept while its settings stay the same, and an interrupted one is resumed. ``--minutes`` stops in
time, with status 3, and the same command continues later. ``--jobs auto --bundle FILE`` is for a
GPU that is there for a few minutes only; it packs what to bring back.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time

from .. import load_config
from ..analysis.report import TASK_METRICS
from ..analysis.report_files import write_report
from ..analysis.report_tables import result_table
from ..analysis.run_folders import bundle
from ..analysis.suite_runner import execute_suite, number_of_jobs
from ..analysis.suites import make_runs, read_suite, select_rows
from ..arguments import (
    Parser,
    number,
    output_file,
    output_folder,
    whole,
)
from ..data.register import register_configured
from ..errors import exit_on_user_error

NOT_FINISHED = 3  # exit status when --minutes were over first


def main(args) -> int:
    """Run what is missing, report; the exit status."""
    opts = [item for item in args.opts if item != "--"]
    suite = read_suite(args.suite)
    if args.only:
        suite["rows"] = select_rows(suite["rows"], args.only)
    runs = make_runs(suite, args.seeds, args.output, opts)
    first = runs[0]
    register_configured(load_config(first.row["config"], [str(x) for x in first.opts]))
    start = time.time()
    command = shlex.join(["kd-compare", *sys.argv[1:]])
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


def parse_arguments(argv=None):
    """The flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--suite", required=True, help="suite YAML file")
    add("--output", type=output_folder, required=True, help="folder for runs and reports")
    add("--seeds", type=whole(), nargs="+", default=[1], help="default: 1")
    add("--only", nargs="+", help="names of rows to run (with their teacher)")
    add(
        "--jobs",
        type=number_of_jobs,
        default=1,
        help="runs at a time (they share the CPU), default 1; or auto: one for every two cores, as "
        "far as the GPU's memory allows",
    )
    add("--minutes", type=number(0.01), help="stop what runs after so many")
    add("--bundle", type=output_file, help="pack reports and logs, no weights, into this .tar.gz")
    add(
        "opts",
        nargs=argparse.REMAINDER,
        help="KEY VALUE ... for every run; after --seeds or --only with -- before it",
    )
    return parser.parse_args(argv)


def run() -> None:
    """The command."""
    with exit_on_user_error():
        args = parse_arguments()
        status = main(args)
    sys.exit(status)
