"""Whole training steps with other settings, in turns: what a setting gives.

    kd-benchmark turns --config-file configs/shapes/retinanet_student_cwd.yaml \\
        --variant KD.TEACHER.FUSE False --variant KD.TEACHER.FUSE True
    kd-benchmark turns --config-file CONFIG --size 800x1333 --images 1 --teacher --variant ...

Each --variant is overrides of the config, and has a trainer of its own, with its loader, optimizers
and heads. In every round each takes one step, in every second round in reverse order, so that a
drift of the machine meets all alike. The ratio is the median of the rounds' ratios to the first
variant, with its quartiles; on a CPU it is of CPU seconds of the process (all its threads, not its
worker processes), which other programs on the machine disturb less than the clock. With --teacher
only the teacher's part of the step is timed: its input and its forward pass. Weights are random.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time

import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from ...analysis.measure import PAIRS, WARM_UP, Progress, Spread, ratio, require_device, synchronize
from ...arguments import Parser, image_size, output_file, whole
from ...errors import ConfigError
from .profile import Run, read_config
from .step import machine


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE")
    add("--variant", nargs="+", action="append", required=True, metavar="KEY VALUE")
    add("--teacher", action="store_true", help="time the teacher alone")
    add("--rounds", type=whole(1), default=PAIRS, help="timed ones")
    add("--warm-up", type=whole(), default=WARM_UP, help="rounds before them")
    add("--size", type=image_size(), default=None, metavar="HxW", help="images of noise")
    add("--boxes", type=whole(), default=20, help="on an image of noise")
    add("--images", type=whole(1), default=0, help="in a batch; default: SOLVER.IMS_PER_BATCH")
    add("--threads", type=whole(), default=0, help="CPU threads; 0 = torch's choice")
    add("--device", default="cpu", help="cpu or cuda")
    add("--output", type=output_file, default="", help="JSON file")
    args = parser.parse_args(argv)
    args.opts, args.weights, args.eval_images = [], False, 0
    return args


class Variant:
    """A trainer with some overrides.

    Args:
        args: of the command.
        opts: the overrides.
        folder: for what it writes.
    """

    def __init__(self, args, opts, folder: str):
        self.name = " ".join(opts)
        args.opts = list(opts)
        self.run = Run(args, read_config(args, folder)[0])
        self.storage = EventStorage(1)
        self.run.loop.storage, self.run.loop.iter = self.storage, 1
        self.teacher = args.teacher
        if self.teacher and not self.run.teachers:
            raise ConfigError(f"--teacher: KD.META_ARCHITECTURE is empty with {self.name}")
        self.batch = next(self.run.batches) if self.teacher else None
        self.cpu: list[float] = []
        self.clock: list[float] = []

    def step(self, counts: bool) -> None:
        """One step; its times are kept if it counts."""
        synchronize(self.run.device)
        start = time.perf_counter(), time.process_time()
        if self.teacher:
            with torch.autocast(
                self.run.device.type, self.run.loop.amp_dtype, self.run.loop.amp_dtype is not None
            ):
                self.run.model.run_teachers(self.batch)
        else:
            with self.storage:
                self.run.step()
        synchronize(self.run.device)
        if counts:
            self.clock.append(time.perf_counter() - start[0])
            self.cpu.append(time.process_time() - start[1])


def main(args):
    require_device(args.device)
    for opts in args.variant:
        if len(opts) % 2:
            raise ConfigError(f"--variant {' '.join(opts)}: write KEY VALUE KEY VALUE ...")
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    progress = Progress(args.warm_up + args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        variants = [Variant(args, opts, folder) for opts in args.variant]
        for index in range(args.warm_up + args.rounds):
            for variant in variants if index % 2 == 0 else variants[::-1]:
                variant.step(index >= args.warm_up)
            progress.tick("teacher" if args.teacher else "steps")
    measure = "clock" if args.device.startswith("cuda") else "cpu"
    first = getattr(variants[0], measure)
    results, rows = {}, []
    for variant in variants:
        own = {
            "cpu_seconds": Spread.of(variant.cpu).as_dict(),
            "seconds": Spread.of(variant.clock).as_dict(),
            "ratio": ratio(getattr(variant, measure), first).as_dict(),
        }
        results[variant.name] = own
        share = own["ratio"]
        rows.append(
            [
                variant.name,
                f"{1e3 * own['cpu_seconds']['median']:.1f}",
                f"{1e3 * own['seconds']['median']:.1f}",
                f"{share['median']:.3f} ({share['low']:.3f}-{share['high']:.3f})",
            ]
        )
    print(tabulate(rows, ["variant", "CPU ms", "ms", f"ratio of {measure} (quartiles)"]))
    report = {"machine": machine(args), "rounds": args.rounds, "results": results}
    if args.output:
        with open(args.output, "w") as file:
            json.dump(report, file, indent=1)
    return report
