"""Time and memory of D3ETR on a Conditional DETR pair with random weights.

    kd-benchmark d3etr [--threads 2] [--rounds 5] [--output x.json]
        [--config-file configs/COCO-DETR/...d3etr...yaml] [--device cuda] [KEY VALUE ...]

Two images of noise of 800x1333 with 20 boxes each. Measured:

  matching    cost matrices of all decoder layers and their assignment: the adaptive pairs of
              student and teacher, and beside it the student's own matching with ground truth
  step        the whole distillation step against what it cannot do without: student step, teacher's
              forward pass, and one more group of queries through the student's decoder, forward and
              backward; in turns, median of the rounds' ratios with its quartiles
  memory      what tensors hold at most, beyond queries and keys, in the attention terms of both
              groups and all layers, forward and backward; beside it, the same terms from attention
              maps that are all kept in fp32

Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import logging

import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from ... import load_config
from ...analysis.benchmark import Bench, as_leaves, without_weights
from ...analysis.measure import (
    Spread,
    interleave,
    peak_bytes,
    ratio,
    require_device,
)
from ...arguments import Parser, image_size, output_file, whole
from ...functional.d3etr import layer_map
from ...functional.set_targets import Targets
from ...heads.d3etr import Pairs

CONFIG = "configs/COCO-DETR/conditional_detr_R18_C5_from_R50_d3etr_50ep.yaml"
BOXES, MIB = 20, 2**20


def build(args) -> Bench:
    """The pair, without files and with a rate that moves nothing."""
    cfg = load_config(args.config_file, args.opts)
    cfg = without_weights(cfg, args.device)
    return Bench(cfg, ("D3ETR",), args.size, BOXES, images=args.images)


def matching(bench: Bench, rounds: int) -> dict:
    """Seconds of the adaptive and of the ground-truth matching."""
    head, ctx, student = bench.model.heads["D3ETR"], bench.ctx, bench.model.student
    decoded = ctx.student_outputs["decoded"]
    targets = Targets.of(ctx.gt, bench.device)

    @torch.no_grad()
    def ground_truth():
        student.criterion.match(decoded.logits, decoded.boxes, targets)

    @torch.no_grad()
    def adaptive():
        head.adaptive_pairs(decoded, ctx.teacher_outputs["decoded"])

    actions = {"adaptive": adaptive, "ground truth": ground_truth}
    return interleave(actions, bench.device, rounds=max(rounds, 11))


def steps(bench: Bench, rounds: int) -> dict:
    """Seconds of the whole step and of its floor."""
    student = bench.model.student
    memory = bench.ctx.student_outputs["decoded"].memory
    queries = torch.randn_like(student.query_embed.weight).requires_grad_()

    def second_group():
        with bench.autocast():
            decoded = student.decode(memory, queries)
        (decoded.logits.sum() + decoded.boxes.sum()).backward()

    base = bench.base()

    def floor():
        base()
        second_group()

    actions = {"floor": floor, "whole": bench.step(bench.model)}
    seconds = interleave(actions, bench.device, rounds=rounds, warm_up=1)
    actions["whole"].clear()
    return seconds


def attention_terms(bench: Bench) -> dict:
    """The sum of the attention terms, forward and backward: ours, and with all maps kept."""
    head, ctx = bench.model.heads["D3ETR"], bench.ctx
    student, teacher = ctx.student_outputs["decoded"], ctx.teacher_outputs["decoded"]
    layers = layer_map(len(student.logits), len(teacher.logits))
    with torch.no_grad():
        pairs = head.adaptive_pairs(student, teacher)
    # queries and keys are leaves: memory is counted from them on
    groups = [(student, pairs), (as_leaves(head.second_group(ctx, student)), Pairs())]
    head.terms = {"self": 1.0, "cross": 1.0}

    def ours():
        terms = [head.imitate(group, teacher, layers, own) for group, own in groups]
        total = sum(x for group in terms for x in group.values())
        total.backward()
        return total.item()

    def full_maps():
        total = 0.0
        for group, own in groups:
            for k, other in enumerate(layers):
                for name in ("self_attention", "cross_attention"):
                    maps = [getattr(x, name)[i].map() for x, i in ((group, k), (teacher, other))]
                    chosen_rows = [
                        _rows(x, i, columns=name == "self_attention")
                        for x, i in zip(maps, own.layer(k), strict=True)
                    ]
                    own_map, target = (x.clamp(min=1e-12) for x in chosen_rows)
                    total = total + (target * (target.log() - own_map.log())).sum(-1).mean()
        total.backward()
        return total.item()

    return {"ours": ours, "full maps": full_maps}


def _rows(maps, index, columns: bool):
    """Rows (and columns) of the pairs; rows sum to 1 again."""
    if index is None:
        return maps
    maps = torch.take_along_dim(maps, index[:, None, :, None], dim=2)
    if columns:
        maps = torch.take_along_dim(maps, index[:, None, None, :], dim=3)
        maps = maps / maps.sum(-1, keepdim=True)
    return maps


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--config-file", default=CONFIG)
    parser.add_argument("--size", type=image_size(), default=(800, 1333), metavar="HxW")
    parser.add_argument("--images", type=whole(1), default=2)
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--threads", type=whole(), default=0, help="default: torch's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--output", type=output_file, default="", help="a .json file for all numbers"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def main(args) -> dict:
    require_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    with EventStorage(1):
        bench = build(args)
        seconds = matching(bench, args.rounds) | steps(bench, args.rounds)
        terms = attention_terms(bench)
        memory = {name: peak_bytes(action, bench.device) for name, action in terms.items()}
    share = ratio(seconds["whole"], seconds["floor"])
    spreads = {name: Spread.of(values) for name, values in seconds.items()}
    rows = [
        [name, f"{1e3 * x.median:.1f} ({1e3 * x.low:.1f}-{1e3 * x.high:.1f}) ms"]
        for name, x in spreads.items()
    ]
    rows.append(["whole / floor", f"{share.median:.3f} ({share.low:.3f}-{share.high:.3f})"])
    rows += [[f"attention terms, {name}", f"{m / MIB:.0f} MiB"] for name, m in memory.items()]
    rows.append(["ours / full maps", f"{memory['ours'] / memory['full maps']:.3f}"])
    print(tabulate(rows, ["part", "median (quartiles)"]))
    result = {
        "config": args.config_file, "images": args.images, "size": list(args.size), "boxes": BOXES,
        "device": args.device, "threads": torch.get_num_threads(), "bytes": memory,
        "step": share.as_dict(),
        "seconds": {name: x.as_dict() for name, x in spreads.items()},
    }  # fmt: skip
    if args.output:
        with open(args.output, "w") as file:
            json.dump(result, file, indent=1)
    return result
