"""One distillation step on a GPU against the same step on the CPU, and in half precision.

    kd-check-gpu [--output gpu.json]                       # all distillation configs of shapes
    kd-check-gpu --config-file configs/... [KEY VALUE ...]

For each config: student, teacher and heads with random weights, equal on both devices, and one
batch of the config's own training loader. Compared are all losses and the gradient of everything
that is trained:

    fp32      the GPU without TF32 against the CPU
    bfloat16  autocast on the GPU against fp32 on the GPU
    float16   the same, the loss scaled by 1024 for the backward pass

A loss differs by |a - b| / max(|a|, |b|, 0.001 of the sum of all), the gradient by 1 - cosine. A
config fails where a number is not finite or differs by more than LIMITS. The detectors' sampling is
switched off (every anchor and every proposal counts), since the devices' generators draw different
numbers; ICD still draws its negatives from them. Discrete choices remain as well: proposals after
NMS, assignments and top-k change with rounding, and a loss that averages over few of them jumps.
"""

from __future__ import annotations

import argparse
import copy
import glob
import json
import logging
import math
import os
import sys

import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from .. import build_training_model, check_config, load_config
from ..analysis.benchmark import without_weights
from ..analysis.measure import Progress, require_device
from ..arguments import Parser, output_file, whole
from ..data.loader import build_train_loader
from ..data.register import register_configured
from ..errors import ConfigError, exit_on_user_error
from ..files import shipped_configs, write_atomically
from ..seeding import seed_generators

CONFIGS = os.path.join(shipped_configs(), "shapes", "*_student_*.yaml")
# largest difference of (a loss, the gradient)
LIMITS = {"fp32": (1e-3, 1e-3), "bfloat16": (0.1, 0.1), "float16": (0.1, 0.1)}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SCALE = 1024.0
EVERYTHING = [
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10**6),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 10**5),
]


class Pair:
    """Student, teacher and heads on one device, for one step: detectors keep running averages.

    Args:
        cfg: of the pair; its detectors load no weights.
        device: "cpu" or a CUDA device.
        weights: of another pair; None = random ones.
    """

    def __init__(self, cfg, device: str, weights: tuple[dict, dict] | None = None):
        torch.manual_seed(0)
        self.model = build_training_model(without_weights(cfg.clone(), device)).train()
        self._parts = self.model, self.model.teacher.model  # the teacher is no submodule
        if weights is not None:
            for part, values in zip(self._parts, weights, strict=True):
                part.load_state_dict(values)

    def weights(self) -> tuple[dict, dict]:
        """Copies of all weights and buffers, which a step changes."""
        ours, theirs = (copy.deepcopy(part.state_dict()) for part in self._parts)
        return ours, theirs

    def step(self, batch, dtype: torch.dtype | None = None):
        """Losses by name, and the gradient of all trained parameters as one fp64 CPU vector."""
        device = self.model.device
        seed_generators(0, cuda=device.type == "cuda")
        with EventStorage(1), torch.autocast(device.type, dtype, enabled=dtype is not None):
            losses = self.model(batch)
        scale = SCALE if dtype is torch.float16 else 1.0
        (sum(losses.values()) * scale).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        gradient = torch.cat([g.flatten().double().cpu() for g in gradients]) / scale
        return {name: loss.item() for name, loss in losses.items()}, gradient


def compare(ours, theirs) -> dict:
    """Two results of :meth:`Pair.step`.

    Returns:
        ``losses``: name to relative difference; ``gradient``: 1 - cosine; infinite where a number
        of either is not finite.
    """
    (a, gradient_a), (b, gradient_b) = ours, theirs
    if a.keys() != b.keys() or len(gradient_a) != len(gradient_b):
        raise AssertionError("the two steps have other losses or train other parameters")
    floor = max(1e-3 * abs(sum(b.values())), 1e-12)
    losses = {
        name: _finite(abs(a[name] - b[name]) / max(abs(a[name]), abs(b[name]), floor)) for name in b
    }
    cosine = torch.dot(gradient_a, gradient_b) / (gradient_a.norm() * gradient_b.norm())
    return {"losses": losses, "gradient": _finite(1.0 - cosine.item())}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def check(path: str, args) -> dict:
    """All comparisons of one config."""
    cfg = load_config(path, [*EVERYTHING, *args.opts])
    if not cfg.KD.META_ARCHITECTURE:
        raise ConfigError(f"--config-file: KD.META_ARCHITECTURE of {path} is empty")
    cfg.SOLVER.IMS_PER_BATCH = args.images
    register_configured(cfg)
    check_config(without_weights(cfg, "cpu"))
    batch = next(iter(build_train_loader(cfg)))
    reference = Pair(cfg, "cpu")
    weights = reference.weights()
    exact = Pair(cfg, args.device, weights).step(batch)
    result = {"fp32": compare(exact, reference.step(batch))}
    for name in args.dtypes:
        half = Pair(cfg, args.device, weights).step(batch, DTYPES[name])
        result[name] = compare(half, exact)
    return result


def failures(result: dict) -> list[str]:
    """What of a config's comparisons exceeds LIMITS, in words."""
    found = []
    for name, values in result.items():
        of_loss, of_gradient = LIMITS[name]
        for loss, difference in values["losses"].items():
            if difference > of_loss:
                found.append(f"{name}: {loss} differs by {difference:.2g} (limit {of_loss:g})")
        if values["gradient"] > of_gradient:
            found.append(
                f"{name}: the gradient differs by {values['gradient']:.2g} (limit {of_gradient:g})"
            )
    return found


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config-file", action="append", default=[], help="default: those of shapes")
    add("--device", default="cuda")
    add("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    add("--images", type=whole(1), default=4, help="in the batch")
    add("--output", type=output_file, default="", help="a .json file for all numbers")
    add("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def main(args) -> bool:
    """True if every config is within LIMITS."""
    require_device(args.device)
    torch.backends.cudnn.allow_tf32 = False
    logging.disable(logging.WARNING)
    paths = args.config_file or sorted(glob.glob(CONFIGS))
    if not paths:
        raise ConfigError(f"--config-file: there is no {CONFIGS}; name the configs to check")
    progress, results, failed = Progress(len(paths)), {}, {}
    for path in paths:
        name = os.path.splitext(os.path.basename(path))[0]
        results[name] = check(path, args)
        failed[name] = failures(results[name])
        progress.tick(name)
    precisions = ["fp32", *args.dtypes]
    rows = []
    for name, result in results.items():
        cells = []
        for precision in precisions:
            values = result[precision]
            cells += [f"{max(values['losses'].values()):.1e}", f"{values['gradient']:.1e}"]
        rows.append([name, *cells, "FAILED" if failed[name] else "ok"])
    header = [f"{p} {what}" for p in precisions for what in ("losses", "gradient")]
    print(tabulate(rows, ["config", *header, ""], disable_numparse=True))
    for name, lines in failed.items():
        for line in lines:
            print(f"{name}: {line}")
    if args.output:
        write_atomically(args.output, json.dumps(results, indent=1))
    return not any(failed.values())


def run() -> None:
    """The command; its exit status is 1 where a config failed."""
    with exit_on_user_error():
        sys.exit(0 if main(parse_arguments()) else 1)
