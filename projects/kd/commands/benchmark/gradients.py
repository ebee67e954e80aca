"""How many bytes of gradients the processes of a training exchange in a step, by counting.

    kd-benchmark gradients --config-file configs/shapes/retinanet_student_cwd.yaml
    kd-benchmark gradients --config-file CONFIG --processes 8 16 64 --gigabytes 25

The models are built without memory (on torch's meta device), so any machine will do. Trained are
the student and what its imitation heads add; the teacher has no gradients. Gradients are fp32 in
every precision of the step. A ring of n processes sends and receives 2 (n - 1) / n times the
gradients in each of them (torch's DistributedDataParallel with NCCL; trees need no less). Divided
by the speed of the slowest link, --gigabytes a second and direction, that is the time the exchange
takes at least; most of it passes behind the backward pass. The speed is an assumption: measure
that of your machines with nccl-tests.
"""

from __future__ import annotations

import argparse
import json
import logging

import torch
from tabulate import tabulate

from ... import build_training_model, load_config
from ...analysis.benchmark import without_weights
from ...arguments import Parser, number, output_file, whole
from ...foreign import foreign_scheme

_BYTES = 4  # of a gradient


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE")
    add("--processes", type=whole(2), nargs="+", default=[2, 8, 16, 64])
    add("--gigabytes", type=number(1e-3), default=10.0, help="a second, of the slowest link")
    add("--output", type=output_file, default="", help="JSON file")
    add("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def parameters_of(cfg) -> dict[str, int]:
    """Trained parameters of the student and of each imitation head, by part."""
    with torch.device("meta"):
        model = build_training_model(cfg)
    heads = getattr(model, "heads", None)
    parts = {"student": model if heads is None else model.student}
    parts |= {} if heads is None else {f"head {name}": head for name, head in heads.items()}
    return {
        name: sum(p.numel() for p in part.parameters() if p.requires_grad)
        for name, part in parts.items()
    }


def read_config(args):
    """The config without weights, on the meta device."""
    cfg = without_weights(load_config(args.config_file, args.opts), "meta")
    timm = ["MODEL.TIMM.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", False]
    cfg.merge_from_list(timm)
    teacher = cfg.KD.TEACHER.CONFIG_FILE
    if teacher and not (teacher.endswith(".py") or foreign_scheme(teacher)):
        cfg.KD.TEACHER.OPTS = [*cfg.KD.TEACHER.OPTS, *timm]
    for node in cfg.KD.TEACHERS.values():
        node.WEIGHTS = ""
    return cfg


def main(args):
    logging.disable(logging.WARNING)
    counts = parameters_of(read_config(args))
    total = sum(counts.values())
    mib = {name: n * _BYTES / 2**20 for name, n in counts.items()}
    rows = [[name, f"{n / 1e6:.2f}", f"{mib[name]:.1f}"] for name, n in counts.items()]
    rows.append(["together", f"{total / 1e6:.2f}", f"{total * _BYTES / 2**20:.1f}"])
    print(tabulate(rows, ["trained", "million parameters", "MiB of gradients"]))
    exchange = {}
    for n in args.processes:
        sent = 2 * (n - 1) / n * total * _BYTES
        exchange[n] = {"bytes": sent, "seconds": sent / (args.gigabytes * 1e9)}
    rows = [
        [n, f"{x['bytes'] / 2**20:.1f}", f"{1e3 * x['seconds']:.1f}"] for n, x in exchange.items()
    ]
    speed = f"ms at {args.gigabytes:g} GB/s"
    print()
    print(tabulate(rows, ["processes", "MiB sent by each in a step", speed]))
    report = {"parameters": counts, "gigabytes_a_second": args.gigabytes, "exchange": exchange}
    if args.output:
        with open(args.output, "w") as file:
            json.dump(report, file, indent=1)
    return report
