"""How strong each imitation head is beside the task losses, and which weight would balance it.

    kd-calibrate --config-file CONFIG [--batches 20] [--target 1.5] [KEY VALUE ...]
    kd-calibrate --weights model_0000499.pth model_0001999.pth model_final.pth --config-file CONFIG

Runs the student of MODEL.WEIGHTS and the teacher over batches of DATASETS.TRAIN without training.
For each loss it takes the L2 norm of its gradient at the student's features: all paired levels
together, or the stages of the backbone if the head reads those. It shows for each head its loss at
weight 1 and at its weight in the config (without schedules), its gradient norm relative to that of
all task losses together (its share), and the weight that would bring this share to --target.
Numbers are medians over the batches, with quartiles in brackets. The JSON file is
OUTPUT_DIR/calibration.json, or what --output names.

Shares change during training, since task losses fall: one that is right at the start may be too
large at the end. --weights takes several checkpoints of one run, with their heads, and prints the
share of each head at each of them, on the same batches.

If a head has modules of its own (adapters, decoders), they are random here unless --weights gives a
checkpoint that holds them. Its share settles far from the value with random modules: FGFI with an
adapter had 0.003 at first and 0.6 after 500 iterations. KD.BALANCE measures during training.

Which share is good depends on what the labels can still teach. From scratch, 30 times the task's
gradient helped most in the first hundreds of iterations. A student that had learnt its 300 pictures
gained most with 8 at the start of the run (CWD), and less with 1.7. With 1500 pictures,
half-trained students gained with 0.6 to 1.8 (FGFI, CWD) and less with 4. The default of 1.5 gained
in the last two cases. Take a suggested weight as a starting point.
"""

from __future__ import annotations

import argparse
import json
import os

import torch
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from .. import ConfigError, build_training_model, check_config, load_config
from ..analysis.measure import Progress, Spread
from ..arguments import Parser, number, output_file, whole
from ..balance import gradient_norm
from ..data.loader import build_train_loader
from ..data.register import register_configured
from ..engine.hooks import floats_kept, set_floats
from ..errors import exit_on_user_error
from ..precision import step_dtype
from ..unlabelled import context_of
from ..weights.loading import load_detector, load_run


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--batches", type=whole(1), default=20)
    parser.add_argument(
        "--target",
        type=number(1e-6),
        default=1.5,
        help="wanted share of the gradient, default 1.5; see above for what was found",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="FILE",
        help="checkpoints of one run, the oldest first, in place of MODEL.WEIGHTS; other flags "
        "follow before KEY VALUE",
    )
    parser.add_argument(
        "--output", type=output_file, default="", help="default: OUTPUT_DIR/calibration.json"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def measure_batch(model, batch) -> tuple[dict, dict]:
    """Loss and gradient norm by name: of the task losses and their sum, of heads at weight 1."""
    ctx, task = model.observe(batch)
    features = ctx.origins([ctx.student_features[level] for level in model.level_map])
    losses = {f"task/{name}": value for name, value in task.items()}
    losses["task/all"] = sum(task.values())
    for name, head in model.heads.items():
        weight, head.weight = head.weight, 1.0
        try:
            with torch.autocast(model.device.type, enabled=False):
                own = head(context_of(head, name, ctx.of_head(name)))
        finally:
            head.weight = weight
        parts = [value for key, value in own.items() if key.startswith("loss_kd_")]
        losses[f"head/{name}"] = sum(parts)
    norms = {name: gradient_norm(value, features) for name, value in losses.items()}
    for name, head in model.heads.items():
        stages = ctx.origins(head.acts_on(context_of(head, name, ctx.of_head(name))))
        if [id(x) for x in stages] != [
            id(x) for x in features
        ]:  # stages of the backbone, which the task trains too
            norms[f"head/{name}"] = gradient_norm(losses[f"head/{name}"], stages)
            norms[f"task/all for head/{name}"] = gradient_norm(losses["task/all"], stages)
    return {name: value.item() for name, value in losses.items()}, norms


def summarise(model, measured, target: float) -> dict:
    """Medians over the batches, and the weights."""

    def over_batches(which, name, factor=1.0):
        return Spread.of(factor * batch[which][name] for batch in measured).as_dict()

    def shares(name, factor=1.0):
        task = f"task/all for {name}" if f"task/all for {name}" in measured[0][1] else "task/all"
        found = [factor * n[name] / n[task] for _, n in measured if n[task] > 0]
        return Spread.of(found).as_dict() if found else None

    report: dict = {"task_losses": {}, "heads": {}}
    for name in (name for name in measured[0][0] if name.startswith("task/")):
        report["task_losses"][name.removeprefix("task/")] = {
            "loss": over_batches(0, name),
            "gradient": over_batches(1, name),
            "share": shares(name),
        }
    for name, head in model.heads.items():
        share = shares(f"head/{name}")
        at_one = share["median"] if share else 0.0
        report["heads"][name] = {
            "weight": head.weight,
            "raw_loss": over_batches(0, f"head/{name}"),
            "weighted_loss": over_batches(0, f"head/{name}", head.weight),
            "gradient": over_batches(1, f"head/{name}", head.weight),
            "share": shares(f"head/{name}", head.weight),
            "suggested_weight": target / at_one if at_one > 0 else None,
        }
    return report


def show(spread: dict | None) -> str:
    return "{median:.4g} ({low:.3g}-{high:.3g})".format(**spread) if spread else "none"


def table(report: dict) -> str:
    rows = [
        [name, "", "", show(entry["loss"]), show(entry["gradient"]), show(entry["share"]), ""]
        for name, entry in report["task_losses"].items()
    ]
    for name, entry in report["heads"].items():
        weight = entry["suggested_weight"]
        columns = [show(entry[key]) for key in ("raw_loss", "weighted_loss", "gradient", "share")]
        suggestion = "no gradient here" if weight is None else f"{weight:.3g}"
        rows.append([name, f"{entry['weight']:g}", *columns, suggestion])
    header = ["loss", "weight", "at weight 1", "weighted", "gradient", "share of task", "suggested"]
    return tabulate(rows, header, disable_numparse=True)


def untrained(model) -> str:
    """A line that names the heads whose own modules are random, or nothing."""
    names = [name for name, head in model.heads.items() if any(True for _ in head.parameters())]
    if not names:
        return ""
    return (
        f"{', '.join(names)}: measured with random modules of their own, shares will settle "
        "elsewhere; give --weights of a short run, or set KD.BALANCE\n"
    )


def growth(reports: list[dict]) -> str:
    """Share of every head, a column a checkpoint."""
    header = ["share of task"]
    header += [os.path.basename(x["weights"]).removesuffix(".pth") for x in reports]
    rows = [
        [name, *(show(x["heads"][name]["share"]) for x in reports)] for name in reports[0]["heads"]
    ]
    return tabulate(rows, header, disable_numparse=True)


def measure(cfg, model, number: int, progress) -> list[tuple[dict, dict]]:
    """:func:`measure_batch` on the first batches of training, always the same ones."""
    seed = max(cfg.SEED, 0)
    torch.manual_seed(seed)
    batches = iter(build_train_loader(cfg, seed=seed))
    dtype = step_dtype(cfg)
    measured = []
    # after the last iteration, when every schedule inside of a head is over
    with EventStorage(cfg.SOLVER.MAX_ITER):
        for _ in range(number):
            with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
                measured.append(measure_batch(model, next(batches)))
            progress.tick("batches")
    return measured


def main(args):
    setup_logger()
    setup_logger(name="projects")
    cfg = load_config(args.config_file, args.opts)
    if not cfg.KD.META_ARCHITECTURE:
        raise ConfigError("KD.META_ARCHITECTURE is empty: give the config of a distilled student")
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: there are no task losses to compare with")
    register_configured(cfg)
    check_config(cfg)
    torch.manual_seed(max(cfg.SEED, 0))
    model = build_training_model(cfg).train()
    if cfg.MODEL.WEIGHTS and not args.weights:
        load_detector(model.student, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", cfg.KD.ALLOW_PICKLE)
    progress = Progress(args.batches * max(len(args.weights), 1))
    report = {
        "config": args.config_file,
        "opts": args.opts,
        "batches": args.batches,
        "images": cfg.SOLVER.IMS_PER_BATCH,
        "target": args.target,
        "levels": list(model.level_map),
    }
    if args.weights:
        report["checkpoints"] = found = []
        for path in args.weights:
            content = load_run(model, path, "--weights", cfg.KD.ALLOW_PICKLE)
            with floats_kept(model):  # normalisers of the losses, of the run's first process
                set_floats(model, content.get("trainer", {}).get("running", [{}])[0])
                measured = measure(cfg, model, args.batches, progress)
            found.append({"weights": path, **summarise(model, measured, args.target)})
        print(growth(found))
    else:
        measured = measure(cfg, model, args.batches, progress)
        report |= {"weights": cfg.MODEL.WEIGHTS, **summarise(model, measured, args.target)}
        print(table(report))
        print(untrained(model), end="")
    path = args.output or os.path.join(cfg.OUTPUT_DIR, "calibration.json")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w") as file:
        json.dump(report, file, indent=1)
    print(f"written to {path}")
    return report


def run() -> None:
    """The command."""
    with exit_on_user_error():
        main(parse_arguments())
