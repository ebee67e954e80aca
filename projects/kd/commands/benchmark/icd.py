"""Time and memory of the ICD head beside an implementation that keeps full attention maps.

    kd-benchmark icd [--boxes 20 200] [--levels p3-p7] [--threads 2] [--output x.json]

One image of 800x1333 on a canvas of 800x1344, 256 channels, 8 attention heads, features of noise;
forward and backward. The other implementation is icd_full_maps.py. Two things are timed,
in turns, and given as the median of the rounds' ratios with its quartiles:

  attention   from the projected queries, keys and values of both sides to the read-out and the
              distillation term, and back: what is left without the projections that both need
  head        all of ``head(ctx)``

Memory is what tensors hold at most beyond the features, temporaries inside of operations and the
gradients included (of the attention: beyond its projected inputs too). Run it on an idle machine.
"""

from __future__ import annotations

import json
import math

import torch
from detectron2.structures import Boxes, Instances
from tabulate import tabulate

from ... import DistillContext
from ...analysis.measure import (
    Spread,
    interleave,
    peak_bytes,
    random_batch,
    ratio,
)
from ...arguments import Parser, output_file, whole
from ...data.priors import uniform_priors
from ...functional.icd import summed_attention
from ...functional.icd_values import value_distance
from ...heads.icd import ICD
from ...heads.icd_decoder import InstanceDecoder, attend
from . import icd_full_maps

LEVELS = {
    "p3-p7": {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128},
    "p2-p6": {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64},
}
SIZE, CANVAS, CHANNELS, HEADS, CLASSES = (800, 1333), (800, 1344), 256, 8, 80
MIB = 2**20


def build_head(levels, most: int) -> ICD:
    """A head with the published sizes."""
    decoder = InstanceDecoder(
        num_classes=CLASSES, channels=CHANNELS, dim=256, heads=HEADS, layers=1, ffn_dim=1024
    )
    return ICD(
        decoder=decoder, student_channels=CHANNELS, priors=uniform_priors(CLASSES),
        max_queries=most, detach_iters=0, levels=levels, weight=8.0, mask_padding=True,
    )  # fmt: skip


def build_context(strides, boxes: int) -> DistillContext:
    """One step with features of noise."""

    def maps(gradient: bool):
        return {
            level: torch.randn(
                1, CHANNELS, *(math.ceil(side / stride) for side in CANVAS)
            ).requires_grad_(gradient)
            for level, stride in strides.items()
        }

    own: Instances = random_batch(SIZE, boxes, CLASSES)[0]["instances"]
    own.gt_boxes = Boxes(own.gt_boxes.tensor)
    return DistillContext(
        iteration=0, image_sizes=[SIZE], canvas=CANVAS, gt=[own],
        student_features=maps(True), teacher_features=maps(False), strides=dict(strides),
    )  # fmt: skip


def head_actions(head: ICD, ctx: DistillContext):
    """Forward and backward of the head and of the other implementation on the same instances."""
    queries = head.queries(ctx)
    head.queries = lambda _: queries
    learned = [*head.parameters(), *ctx.student_features.values()]

    def run(losses):
        for tensor in learned:
            tensor.grad = None
        sum(losses().values()).backward()

    return {
        "ours": lambda: run(lambda: head(ctx)),
        "full maps": lambda: run(lambda: icd_full_maps.losses(head, ctx, queries)),
    }


def attention_actions(head: ICD, ctx: DistillContext):
    """From projections to gradients of projections."""
    counts = head.queries(ctx).counts[0]
    total = sum(counts)
    tokens = sum(rows * columns for rows, columns in (head._extent(ctx, x, 0) for x in head.levels))
    width = CHANNELS // HEADS
    queries = torch.randn(total, HEADS, width, requires_grad=True)
    keys, values, student = (
        torch.randn(tokens, HEADS, width, requires_grad=True) for _ in range(3)
    )
    inputs = (queries, keys, values, student)
    gradient = torch.randn(total, CHANNELS)
    real = torch.arange(total)[None] < counts[0]
    valid = torch.ones(1, tokens, dtype=torch.bool)

    def ours():
        weights = summed_attention(queries[: counts[0]], keys)
        read = attend(queries, keys, values)
        loss = value_distance(student, values, weights)
        torch.autograd.grad((read * gradient).sum() + loss, inputs)

    def full_maps():
        batch = [x[None] for x in inputs]
        read, loss = icd_full_maps.attention_part(*batch, real, valid)
        torch.autograd.grad((read[0] * gradient).sum() + loss, inputs)

    return {"ours": ours, "full maps": full_maps}


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--boxes", type=whole(1), nargs="+", default=[20, 200])
    parser.add_argument("--levels", choices=list(LEVELS), default="p3-p7")
    parser.add_argument("--threads", type=whole(), default=0, help="default: torch's")
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument(
        "--output", type=output_file, default="", help="a .json file for all numbers"
    )
    return parser.parse_args(argv)


def main(args) -> list[dict]:
    if args.threads:
        torch.set_num_threads(args.threads)
    strides = LEVELS[args.levels]
    rows, results = [], []
    for boxes in args.boxes:
        torch.manual_seed(0)
        ctx = build_context(strides, boxes)
        head = build_head(strides, 300 if args.levels == "p3-p7" else 100)
        parts = {"attention": attention_actions(head, ctx), "head": head_actions(head, ctx)}
        for part, actions in parts.items():
            seconds = interleave(actions, rounds=args.rounds, warm_up=1)
            faster = ratio(seconds["full maps"], seconds["ours"])
            memory = {name: peak_bytes(action) for name, action in actions.items()}
            result = {"boxes": boxes, "levels": args.levels, "part": part, "bytes": memory}
            result |= {"times": faster.as_dict(), "threads": torch.get_num_threads()}
            result["seconds"] = {name: Spread.of(s).as_dict() for name, s in seconds.items()}
            results.append(result)
            rows.append(
                [boxes, part, *(f"{Spread.of(s).median:.3f}" for s in seconds.values())]
                + [f"{faster.median:.2f} ({faster.low:.2f}-{faster.high:.2f})"]
                + [f"{m / MIB:.0f}" for m in memory.values()]
                + [f"{memory['full maps'] / memory['ours']:.2f}"]
            )
    columns = ["boxes", "part", "ours [s]", "full maps [s]", "times faster (quartiles)"]
    columns += ["ours [MiB]", "full maps [MiB]", "times smaller"]
    print(tabulate(rows, columns))
    if args.output:
        with open(args.output, "w") as file:
            json.dump(results, file, indent=1)
    return results
