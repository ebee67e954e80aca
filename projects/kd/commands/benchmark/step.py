"""Time and peak memory of the parts of a distillation step.

    kd-benchmark all                                           # built-in pairs
    kd-benchmark step --heads CWD --threads 1
    kd-benchmark all --config-file configs/... --memory --output step.json [KEY VALUE ...]

Protocol: one image (--images) of 512x512 noise with 20 boxes, random weights (times do not depend
on them, so no file is needed), 3 warm-up rounds, 11 rounds in which A and B take turns. A ratio is
the median of the 11 per-round ratios, with its interquartile range. A student step is forward, task
losses, backward and optimizer step. The ratio of a head is

    whole distillation step with this head / (student step + teacher's forward),

the teacher, of whatever library, run as far as the head reads it (its backbone, or its own head
too), both on the same student. To CSA's denominator belongs one more pass of the student's
detection head, forward and backward to its input, as no assistant can do without it, and to
CrossKD's one of the last layers of the teacher's. Memory is what tensors hold at once (allocator
events, temporaries inside of operations included), counted once, at 800x1344, with --memory. Run it
on an idle machine, or with --clock cpu: that counts the seconds which this process computes in all
its threads, and which other programs disturb less.

Parts: data (the training loader of a --config-file), teacher (input and forward), student (step),
heads (each alone: loss and its gradient at features and adapters), step (the ratio, for each head
and for all together), mask (FGFI's imitation mask of 100 boxes at 800x1333 against the student
step and against a plain loop over boxes). Built-in pairs: R50 teacher and R18 student, RetinaNet
and Faster R-CNN, otherwise as in detectron2's 1x configs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import platform
import time

import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from ... import ConfigError, load_config
from ...analysis.benchmark import Bench, loop_masks, without_weights
from ...analysis.measure import (
    PAIRS,
    WARM_UP,
    Progress,
    Spread,
    interleave,
    peak_bytes,
    ratio,
    require_device,
)
from ...arguments import Parser, image_size, output_file, whole
from ...data.loader import build_train_loader
from ...data.register import register_configured
from ...heads.base import head_class

BUILT_IN = {"retinanet": "retinanet_R_50_FPN_1x", "faster_rcnn": "faster_rcnn_R_50_FPN_1x"}
HEADS = ("FGFI", "CWD", "PKD")
TASKS = ("data", "teacher", "student", "heads", "step", "mask")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config-file", action="append", default=[], help="instead of the built-in pairs")
    add("--pair", choices=BUILT_IN, action="append", default=[], help="default: all built-in pairs")
    add("--heads", nargs="+", help=f"default: {' '.join(HEADS)}, or KD.HEADS of the config")
    add("--size", type=image_size(), default=(512, 512), metavar="HxW")
    add("--boxes", type=whole(), default=20)
    add("--images", type=whole(1), default=1, help="in the batch; PSPNet with BatchNorm needs two")
    add("--rounds", type=whole(1), default=PAIRS, help="timed ones")
    add("--memory", action="store_true", help="also count memory")
    add("--memory-size", type=image_size(), default=(800, 1344), metavar="HxW")
    add("--mask-size", type=image_size(), default=(800, 1333), metavar="HxW")
    add("--mask-boxes", type=whole(), default=100)
    add("--threads", type=whole(), default=0, help="CPU threads; 0 = torch's choice")
    add("--clock", choices=CLOCKS, default="wall", help="of all but the data")
    add("--device", default="cpu", help="cpu or cuda")
    add("--output", type=output_file, default="", help="JSON file")
    add("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def configs(args) -> dict:
    """Config by name, with random weights and a learning rate that moves nothing."""
    found = {}
    for path in args.config_file:
        found[os.path.splitext(os.path.basename(path))[0]] = load_config(path, args.opts)
    for name in [] if args.config_file else args.pair or BUILT_IN:
        zoo = f"model_zoo://COCO-Detection/{BUILT_IN[name]}.yaml"
        student = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
        teacher = ["KD.META_ARCHITECTURE", "DistillMetaArch", "KD.TEACHER.CONFIG_FILE", zoo]
        # noise has no annotations to measure ICD's priors in
        head_opts = ["KD.HEADS", HEADS, "KD.ICD.PRIORS", "uniform"]
        found[name] = load_config(zoo, [*student, *teacher, *head_opts, *args.opts])
    for name, cfg in found.items():
        if not cfg.KD.META_ARCHITECTURE:
            raise ConfigError(
                f"KD.META_ARCHITECTURE of {name} is empty: there is nothing to distil"
            )
        cfg.KD.HEADS = tuple(args.heads or cfg.KD.HEADS)
        for head in cfg.KD.HEADS:
            head_class(head)
        without_weights(cfg, args.device)
    return found


class Run:
    """All measurements of one pair."""

    def __init__(self, args, cfg, name: str, progress: Progress):
        self.args, self.cfg, self.name, self.progress = args, cfg, name, progress
        self.heads = tuple(cfg.KD.HEADS)
        # one by one, and all together
        self.sets = {head: (head,) for head in self.heads}
        if len(self.heads) > 1:
            self.sets["+".join(self.heads)] = self.heads

    def _time(self, label, bench, actions):
        def tick():
            self.progress.tick(f"{self.name}: {label}")

        clock = CLOCKS[self.args.clock]
        return interleave(actions, bench.device, rounds=self.args.rounds, tick=tick, clock=clock)

    def _bench(self, heads=(), **kwargs):
        of_batch = {"boxes": self.args.boxes, "images": self.args.images}
        kwargs = {"image_size": self.args.size, **of_batch, **kwargs}
        return Bench(self.cfg, heads or self.heads[:1], **kwargs)

    def data(self) -> dict:
        """Seconds a batch of the training loader, and its share of padding."""
        register_configured(self.cfg)
        batches = iter(build_train_loader(self.cfg))

        def padding():
            batch = next(batches)
            heights, widths = zip(*(x["image"].shape[-2:] for x in batch), strict=True)
            area = sum(h * w for h, w in zip(heights, widths, strict=True))
            sizes.append(len(batch))
            shares.append(1 - area / (len(batch) * max(heights) * max(widths)))

        shares: list[float] = []
        sizes: list[int] = []
        seconds = interleave(
            {"data": padding},
            rounds=self.args.rounds,
            tick=lambda: self.progress.tick(f"{self.name}: data"),
        )
        return {
            "data": {
                **_timing(seconds["data"]),
                "images": sizes[0],
                "padding": sum(shares) / len(shares),
            }
        }

    def parts(self, wanted) -> dict:
        """Seconds of "teacher" and "student", as far as wanted."""
        bench = self._bench()
        actions = {"teacher": bench.teacher, "student": bench.step()}
        actions = {name: action for name, action in actions.items() if name in wanted}
        seconds = self._time(" and ".join(actions), bench, actions)
        return {name: _timing(values) for name, values in seconds.items()}

    def alone(self) -> dict:
        """Seconds of each head alone."""
        bench = self._bench(self.heads)
        actions = {head: bench.head(head) for head in self.heads}
        seconds = self._time("heads alone", bench, actions)
        return {"heads": {head: _timing(values) for head, values in seconds.items()}}

    def steps(self) -> dict:
        """Seconds of whole steps and of their base, and the ratio, for each set of heads."""
        result = {}
        for label, heads in self.sets.items():
            bench = self._bench(heads)
            actions = {"base": bench.base(), "whole": bench.step(bench.model)}
            seconds = self._time(f"step with {label}", bench, actions)
            result[label] = {
                **_timing(seconds["whole"]),
                "base": Spread.of(seconds["base"]).as_dict(),
                "ratio": ratio(seconds["whole"], seconds["base"]).as_dict(),
            }
        return {"step": result}

    def mask(self) -> dict:
        """FGFI's mask beside the student step and a loop over boxes."""
        size, boxes = self.args.mask_size, self.args.mask_boxes
        bench = self._bench(("FGFI",), image_size=size, boxes=boxes, images=1)
        head = bench.model.heads["FGFI"]
        if head.grid_anchors is None:
            raise ConfigError("mask: the loop over boxes needs detectron2's own anchors")

        def fresh(function):
            return lambda: function(dataclasses.replace(bench.ctx, _masks={}))

        actions = {
            "mask": fresh(head.masks),
            "loop": fresh(lambda ctx: loop_masks(head, ctx)),
            "student": bench.step(),
        }
        pairs = zip(actions["mask"]().values(), actions["loop"](), strict=True)
        differing = sum(int((ours != theirs).sum()) for ours, theirs in pairs)
        seconds = self._time("FGFI mask", bench, actions)
        return {
            "mask": {
                **_timing(seconds["mask"]),
                "of_student_step": ratio(seconds["mask"], seconds["student"]).as_dict(),
                "of_loop": ratio(seconds["mask"], seconds["loop"]).as_dict(),
                "peak_bytes": peak_bytes(actions["mask"], bench.device),
                "loop_peak_bytes": peak_bytes(actions["loop"], bench.device),
                "cells_that_differ_from_the_fp32_loop": differing,
            }
        }

    def memory(self) -> dict:
        """Bytes at most of the parts and of whole steps."""
        result = {}
        for label, heads in self.sets.items():
            bench = self._bench(heads, image_size=self.args.memory_size)
            actions = {"teacher": bench.teacher, "base step": bench.base()}
            actions = {} if result else actions
            actions |= {f"step with {label}": bench.step(bench.model)}
            actions |= {f"{head} alone": bench.head(head) for head in heads if len(heads) == 1}
            for name, action in actions.items():
                clear = getattr(action, "clear", lambda: None)
                action()  # the optimizer's state exists after the first step
                clear()
                result[name] = peak_bytes(action, bench.device)
                clear()
                self.progress.tick(f"{self.name}: memory of {name}")
        return {"memory": result}

    def plan(self) -> list:
        """(measurement, number of ticks) of what was asked for."""
        task, rounds = self.args.part, self.args.rounds + WARM_UP
        wanted = set(TASKS) if task == "all" else {task}
        timing = {"teacher", "student"} & wanted
        steps = [
            (self.data, rounds, "data" in wanted and self.args.config_file),
            (lambda: self.parts(timing), rounds, timing),
            (self.alone, rounds, "heads" in wanted),
            (self.steps, rounds * len(self.sets), "step" in wanted),
            (self.mask, rounds, "mask" in wanted and "FGFI" in self.heads),
            (self.memory, 2 + len(self.sets) + len(self.heads), self.args.memory),
        ]
        return [(action, ticks) for action, ticks, condition in steps if condition]


def _timing(seconds) -> dict:
    return {"seconds": Spread.of(seconds).as_dict()}


def table(results: dict) -> str:
    def ms(spread):
        return (
            f"{1e3 * spread['median']:.1f} ({1e3 * spread['low']:.1f}-{1e3 * spread['high']:.1f})"
        )

    def share(spread):
        return f"{spread['median']:.4g} ({spread['low']:.4g}-{spread['high']:.4g})"

    def row(pair, name, entry, compared="", key=""):
        mib = f"{entry['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in entry else ""
        time = ms(entry["seconds"]) if "seconds" in entry else ""
        return [pair, name, time, share(entry[key]) if key else "", compared, mib]

    rows = []
    for pair, result in results.items():
        rows += [row(pair, name, result[name]) for name in TASKS[:3] if name in result]
        rows += [row(pair, f"{name} alone", x) for name, x in result.get("heads", {}).items()]
        for name, entry in result.get("step", {}).items():
            rows.append(row(pair, f"step with {name}", entry, "student step + teacher", "ratio"))
        if "mask" in result:
            mask = result["mask"]
            rows.append(row(pair, "FGFI mask", mask, "student step", "of_student_step"))
            rows.append(row(pair, "FGFI mask", mask, "loop over boxes", "of_loop"))
            rows.append(row(pair, "loop over boxes", {"peak_bytes": mask["loop_peak_bytes"]}))
        rows += [row(pair, n, {"peak_bytes": b}) for n, b in result.get("memory", {}).items()]
    header = ["pair", "part", "ms (quartiles)", "ratio (quartiles)", "to", "peak MiB"]
    return tabulate(rows, header)


def machine(args) -> dict:
    facts = {
        "torch": torch.__version__,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
    }
    if args.device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(args.device)
    return facts


def main(args):
    require_device(args.device)
    if args.clock == "cpu" and args.device != "cpu":
        raise ConfigError(f"--clock cpu: of --device {args.device} it would count the waiting")
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    if args.part == "data" and not args.config_file:
        raise ConfigError("data: needs --config-file: the built-in pairs have no data")
    logging.disable(logging.WARNING)  # detectors are built again for each part
    runs = {}
    progress = Progress(0)
    for name, cfg in configs(args).items():
        runs[name] = Run(args, cfg, name, progress)
    progress.total = sum(ticks for run in runs.values() for _, ticks in run.plan())
    if not progress.total:
        raise ConfigError(f"{args.part}: nothing to measure with --heads {args.heads}")
    results = {name: {} for name in runs}
    with EventStorage(1):  # iteration 1: heads log their scalars at multiples of KD.LOG_PERIOD
        for name, run in runs.items():
            for action, _ in run.plan():
                results[name] |= action()
    keys = (
        "size",
        "boxes",
        "images",
        "rounds",
        "clock",
        "memory_size",
        "mask_size",
        "mask_boxes",
        "opts",
    )
    report = {
        "protocol": {"warm_up": WARM_UP, **{key: getattr(args, key) for key in keys}},
        "machine": machine(args),
        "results": results,
    }
    print(table(results))
    if args.output:
        with open(args.output, "w") as file:
            json.dump(report, file, indent=1)
    return report
