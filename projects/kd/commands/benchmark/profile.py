"""Where the time of a training goes, for any config, in one run.

    kd-benchmark profile --config-file configs/shapes/retinanet_student_cwd.yaml
    kd-benchmark profile --config-file CONFIG --size 800x1333 --images 1 --output output/profile

The trainer of the config takes steps without a profiler (their median is the time of a step), and
then some under torch.profiler. The first table is of those: host milliseconds a step and the
share, by part: the loader with reading, augmentation and annotations; the teacher; the modules of
the student, forward and backward; each head, forward and backward; optimizer, logging. On a GPU
also the milliseconds of its kernels, which run while the host goes on; steps are synchronised at
both ends. With DATALOADER.NUM_WORKERS the loader is what the step waits for.

The second table is of the run that the config describes: its steps, checkpoints and evaluations
(inference on --eval-images images, without the scoring), each measured here, times their number.

Weights are random unless --weights is given: times hardly depend on them, apart from an
evaluation's. With --size the images are noise of that size, in place of the training data.
--output is a folder for profile.json, flame.svg (open it in a browser) and trace.json (for
https://ui.perfetto.dev or chrome://tracing).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import math
import os
import tempfile
import time

import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from ... import ConfigError, check_config, load_config
from ...analysis.benchmark import noise_batch, settle_detector, without_weights
from ...analysis.flame import flame_svg
from ...analysis.measure import Progress, Spread, require_device, synchronize
from ...analysis.shares import label, marked, shares_of
from ...arguments import Parser, image_size, output_folder, whole
from ...config import LazyNode
from ...data.lazy_loader import lazy_test_loader
from ...data.mapper import ImageMapper, NamedErrors
from ...data.register import register_configured
from ...engine.trainer import DistillTrainer
from ...evaluation.batches import build_test_loader
from .step import machine

_FEWEST_SHOWN = 0.0005  # share of a part below which the table leaves it out


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE")
    add("--steps", type=whole(1), default=3, help="with the profiler, and as many without")
    add("--warm-up", type=whole(1), default=2, help="steps before them")
    add("--size", type=image_size(), default=None, metavar="HxW", help="images of noise")
    add("--boxes", type=whole(), default=20, help="on an image of noise")
    add("--images", type=whole(1), default=0, help="in a batch; default: SOLVER.IMS_PER_BATCH")
    add("--eval-images", type=whole(), default=8, help="0 = no evaluation")
    add("--weights", action="store_true", help="the weights that the config names")
    add("--threads", type=whole(), default=0, help="CPU threads; 0 = torch's choice")
    add("--device", default="cpu", help="cpu or cuda")
    add("--output", type=output_folder, metavar="FOLDER")
    add("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def read_config(args, folder: str):
    """The config of the run, changed so that nothing of it is written outside of ``folder``."""
    cfg = load_config(args.config_file, args.opts)
    planned = cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
    if args.weights:
        cfg.merge_from_list(["MODEL.DEVICE", args.device])
    else:
        without_weights(cfg, args.device)
    own = ["OUTPUT_DIR", folder, "TEST.EVAL_PERIOD", 0, "TEST.PATIENCE", 0, "TEST.BEST_METRIC", ""]
    own += ["WRITERS.NAMES", (), "TEST.PICTURES.PERIOD", 0, "VIS_PERIOD", 0]
    if args.images:
        own += ["SOLVER.IMS_PER_BATCH", args.images]
    cfg.merge_from_list(own)
    register_configured(cfg)
    if args.size is None:
        check_config(cfg)
    elif cfg.KD.UNLABELED.DATASETS:
        raise ConfigError("--size: images of noise all have labels, KD.UNLABELED.DATASETS has not")
    return cfg, planned


class Run:
    """One config's trainer, step by step."""

    def __init__(self, args, cfg):
        self.args, self.cfg = args, cfg
        start = time.perf_counter()
        self.trainer = DistillTrainer(cfg)
        if args.weights:
            self.trainer.resume_or_load(resume=False)
        self.loop = self.trainer._trainer
        self.device = self.loop.device
        self.model = self.trainer._unwrapped
        links = getattr(self.model, "links", ())
        self.teachers = [link.teacher.model for link in links]
        if args.size is None:
            loader = self.trainer.build_train_loader(cfg, seed=self.trainer.seed)
        else:
            scale = next((link.scale for link in links if link.scale != 1), 1.0)
            loader = itertools.repeat(
                noise_batch(cfg, args.size, args.boxes, cfg.SOLVER.IMS_PER_BATCH, scale)
            )
        self.batches = iter(loader)
        first = next(self.batches)
        if not args.weights:
            for detector in (self.trainer.student, *self.teachers):
                settle_detector(detector, first)
        self.loop.data_loader = itertools.chain([first], self.batches)
        self.built = time.perf_counter() - start
        self.images = len(first)

    def step(self) -> float:
        """One iteration; seconds."""
        synchronize(self.device)
        start = time.perf_counter()
        self.loop.run_step()
        synchronize(self.device)
        seconds = time.perf_counter() - start
        self.loop.storage.step()
        self.loop.iter += 1
        return seconds

    def checkpoint(self) -> float:
        """Seconds of writing one."""
        start = time.perf_counter()
        self.trainer.checkpointer.save("profile", iteration=self.loop.iter)
        return time.perf_counter() - start

    @torch.no_grad()
    def evaluation(self) -> tuple[float, int]:
        """Seconds an image, and the images of one evaluation."""
        cfg, model, seconds, number = self.cfg, self.trainer.student.eval(), [], 0
        for loader in _test_loaders(cfg):
            number += len(loader.dataset)
            batches, left = iter(loader), min(self.args.eval_images, len(loader.dataset))
            while left > 0:
                start = time.perf_counter()
                model(batch := next(batches))
                synchronize(self.device)
                # each image of a batch takes its part
                seconds += [(time.perf_counter() - start) / len(batch)] * len(batch)
                left -= len(batch)
        model.train()
        return (Spread.of(seconds).median if seconds else 0.0), number


def _test_loaders(cfg):
    if isinstance(cfg, LazyNode):
        yield lazy_test_loader(cfg)
        return
    for name in cfg.DATASETS.TEST:
        mapper = NamedErrors(ImageMapper(cfg, is_train=False))
        yield build_test_loader(cfg, name, mapper, workers=0)


def measure(args, run: Run, progress: Progress):
    """(:class:`Shares`, report) of a run's steps, checkpoint and evaluation."""
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if run.device.type == "cuda" else []
    with EventStorage(1) as run.loop.storage, contextlib.ExitStack() as marks:
        run.loop.iter = 1  # heads log their scalars at multiples of KD.LOG_PERIOD
        for _ in range(args.warm_up):
            run.step()
            progress.tick("warm-up")
        plain = []
        for _ in range(args.steps):
            plain.append(run.step())
            progress.tick("steps")
        plain_student = run.model is run.trainer.student
        marks.enter_context(
            marked(run.trainer.student, "kd/forward" if plain_student else "kd/student")
        )
        for teacher in run.teachers:
            marks.enter_context(marked(teacher, "kd/teacher"))
        with profile(activities=activities, acc_events=True) as profiler:
            watched = []
            for _ in range(args.steps):
                watched.append(run.step())
                progress.tick("steps with the profiler")
        shares = shares_of(profiler.events(), 1e3 * sum(watched))
        report = {
            "step_seconds": Spread.of(plain).as_dict(),
            "step_seconds_with_profiler": Spread.of(watched).as_dict(),
            "images": run.images,
            "host_ms": {part: ms / args.steps for part, ms in shares.host.items()},
            "gpu_ms": {part: ms / args.steps for part, ms in shares.device.items()},
            "checkpoint_seconds": run.checkpoint(),
            "building_seconds": run.built,
        }
        progress.tick("checkpoint")
        if args.eval_images and args.size is None and run.cfg.DATASETS.TEST:
            seconds, number = run.evaluation()
            report |= {"evaluation_seconds_an_image": seconds, "evaluation_images": number}
        progress.tick("evaluation")
    if args.output:
        profiler.export_chrome_trace(os.path.join(args.output, "trace.json"))
    return shares, report


def steps_table(report: dict) -> str:
    """Parts of a step by the order of their shares, those of one side together."""
    host, gpu = report["host_ms"], report["gpu_ms"]
    whole_host, whole_gpu = sum(host.values()), sum(gpu.values())
    rows = []
    for part in sorted({*host, *gpu}, key=lambda p: (p.split("/")[:2], p)):
        own, theirs = host.get(part, 0.0), gpu.get(part, 0.0)
        if max(own / whole_host, theirs / whole_gpu if gpu else 0.0) < _FEWEST_SHOWN:
            continue
        row = [label(part), f"{own:.2f}", f"{own / whole_host:.1%}"]
        rows.append(row + ([f"{theirs:.2f}", f"{theirs / whole_gpu:.1%}"] if gpu else []))
    header = ["part of a step", "host ms", "share"] + (["GPU ms", "share"] if gpu else [])
    return tabulate(rows, header, disable_numparse=True)


def run_table(report: dict, planned: tuple[int, int, int]) -> str:
    """What a whole run of the config spends, from what was measured here."""
    iterations, checkpoint_period, eval_period = planned
    step = report["step_seconds"]["median"]
    parts = {
        f"{iterations} steps": step * iterations,
        f"{(n := math.ceil(iterations / checkpoint_period))} checkpoints": n
        * report["checkpoint_seconds"],
        "building, first batch": report["building_seconds"],
    }
    if "evaluation_images" in report:
        n = math.ceil(iterations / eval_period) if eval_period > 0 else 1
        images = report["evaluation_images"]
        seconds = n * images * report["evaluation_seconds_an_image"]
        parts[f"{n} evaluations of {images} images, without scoring"] = seconds
    total = sum(parts.values())
    rows = [[name, f"{seconds:.1f}", f"{seconds / total:.1%}"] for name, seconds in parts.items()]
    return tabulate(rows, ["part of the run", "s", "share"], disable_numparse=True)


def main(args):
    require_device(args.device)
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        cfg, planned = read_config(args, folder)
        run = Run(args, cfg)
        progress = Progress(args.warm_up + 2 * args.steps + 2)
        shares, report = measure(args, run, progress)
    report["machine"] = machine(args)
    report["planned"] = dict(
        zip(("iterations", "checkpoint_period", "eval_period"), planned, strict=True)
    )
    step = report["step_seconds"]["median"]
    watched = report["step_seconds_with_profiler"]["median"]
    print(steps_table(report))
    print(
        f"\na step of {run.images} images: {1e3 * step:.1f} ms, {run.images / step:.2f} images/s; "
        f"{1e3 * watched:.1f} ms with the profiler\n"
    )
    print(run_table(report, planned))
    if args.output:
        with open(os.path.join(args.output, "profile.json"), "w") as file:
            json.dump(report, file, indent=1)
        name = os.path.splitext(os.path.basename(args.config_file))[0]
        with open(os.path.join(args.output, "flame.svg"), "w") as file:
            stacks = {path: ms / args.steps for path, ms in shares.stacks.items()}
            file.write(flame_svg(stacks, f"{name}, host time of a step"))
    return report
