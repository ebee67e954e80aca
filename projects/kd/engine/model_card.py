"""model_card.md: what a file of weights in OUTPUT_DIR is, for whoever finds it later."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from ..config import LazyNode
from ..config.lazy_files import target_name
from ..config.teachers import config_of, teacher_names
from ..detectors import class_names_of
from ..files import write_atomically

NAME = "model_card.md"
_DISTRIBUTION = "detection-distillation-toolkit"
_ROOT = Path(__file__).resolve().parents[3]


def write_card(
    cfg: CfgNode,
    student: nn.Module,
    seed: int,
    results: Mapping[str, tuple[int, Mapping[str, float]]],
) -> str:
    """Write OUTPUT_DIR/model_card.md, atomically; returns its path.

    Args:
        cfg: of the run.
        student: the plain detector.
        seed: of the run, also where the config leaves it open.
        results: name of a file in OUTPUT_DIR to the iterations it was trained, and the metrics that
            evaluation gave its weights (``task/name``), empty where it was not evaluated.
    """
    path = os.path.join(cfg.OUTPUT_DIR, NAME)
    write_atomically(path, card_text(cfg, student, seed, results))
    return path


def card_text(cfg, student, seed, results) -> str:
    """The text of the card; arguments as in :func:`write_card`."""
    lazy = isinstance(cfg, LazyNode)
    kind = "Distilled student" if cfg.KD.META_ARCHITECTURE else "Plain detector"
    title = os.path.basename(os.path.normpath(cfg.OUTPUT_DIR))
    lines = [f"# {title}", "", f"{kind}: an ordinary detectron2 checkpoint.", ""]
    lines += _table(("", ""), about(cfg, student, seed))
    lines += ["", f"## Results on {', '.join(cfg.DATASETS.TEST) or 'no data set'}", ""]
    names = list(dict.fromkeys(name for _, metrics in results.values() for name in metrics))
    head = ("file", "iterations", *names)
    lines += _table(head, [_row(file, *value, names) for file, value in results.items()])
    load = [
        "## Loading",
        "",
        "```python",
        "from projects.kd import load_config",
        "from projects.kd.building import build_detector",
        "from projects.kd.weights.loading import load_detector",
        "",
        f"cfg = load_config({_config(cfg)!r})" + ("" if lazy else "  # beside this card"),
        "model = build_detector(cfg).eval()",
        f'load_detector(model, "{next(iter(results), "model_final.pth")}", "MODEL.WEIGHTS")',
        "```",
        "",
    ]
    if os.path.exists(os.path.join(cfg.OUTPUT_DIR, "student.yaml")):
        load += ["Or with detectron2 alone: `student.yaml` beside this card.", ""]
    return "\n".join([*lines, "", *load])


def about(cfg: CfgNode, student: nn.Module, seed: int) -> list[tuple[str, str]]:
    """What the weights are and what they were made of and with: (name, text)."""
    solver, kd = cfg.SOLVER, cfg.KD
    count = sum(p.numel() for p in student.parameters())
    lazy = isinstance(cfg, LazyNode)
    named = type(student.backbone).__name__ if lazy else cfg.MODEL.BACKBONE.NAME
    backbone = named + (f", {cfg.MODEL.TIMM.NAME}" if cfg.MODEL.TIMM.NAME else "")
    rows = [
        ("detector", f"{cfg.MODEL.META_ARCHITECTURE} ({backbone}), {count:,} parameters"),
        ("classes", _classes(cfg)),
        (
            "trained on",
            f"{', '.join(cfg.DATASETS.TRAIN)}: SOLVER.MAX_ITER {solver.MAX_ITER}, "
            f"{solver.IMS_PER_BATCH * solver.ACCUM_STEPS} images a step, {_optimizer(cfg)}, "
            f"SOLVER.BASE_LR {solver.BASE_LR:g}, seed {seed}",
        ),
        ("started from", cfg.MODEL.WEIGHTS or cfg.MODEL.TIMM.WEIGHTS or "random weights"),
    ]
    if cfg.MODEL.TIMM.PRETRAINED and not cfg.MODEL.WEIGHTS:
        rows[-1] = ("started from", "timm's ImageNet weights")
    if kd.META_ARCHITECTURE:
        for name in teacher_names(cfg):
            rows += _teacher(config_of(cfg, name).KD, name)
    rows += [
        ("config", _config(cfg) if lazy else "config.yaml beside this card"),
        ("commit", commit() or "no checkout of git"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        ("written", time.strftime("%Y-%m-%d %H:%M:%S %Z")),
    ]
    return rows


def _config(cfg: CfgNode) -> str:
    return cfg.path if isinstance(cfg, LazyNode) else "config.yaml"


def _optimizer(cfg: CfgNode) -> str:
    return target_name(cfg.lazy.optimizer) if isinstance(cfg, LazyNode) else cfg.SOLVER.OPTIMIZER


def _teacher(kd: CfgNode, name: str) -> list[tuple[str, str]]:
    """A teacher, by its name in KD.TEACHERS, and the methods."""
    behind = f" {name}" if name else ""
    weights = kd.TEACHER.WEIGHTS or "weights that its config names"
    methods = [f"{head} (KD.{head.upper()}.WEIGHT {_weight(kd, head)})" for head in kd.HEADS]
    return [
        (f"teacher{behind}", f"{kd.TEACHER.CONFIG_FILE}, {weights}"),
        (f"method{behind}", ", ".join(methods)),
    ]


def _classes(cfg: CfgNode) -> str:
    names = ()
    if cfg.DATASETS.TRAIN:
        kind = class_names_of(cfg.MODEL.META_ARCHITECTURE)
        names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get(kind, ())
    return f"{len(names)}: {', '.join(names)}" if names else "not named by the data set"


def _weight(kd: CfgNode, name: str) -> str:
    weight = kd.get(name.upper(), {}).get("WEIGHT")
    return "its own" if weight is None else f"{weight:g}"


def _row(file: str, iterations: int, metrics: Mapping[str, float], names) -> tuple[str, ...]:
    cells = (f"{metrics[name]:.2f}" if name in metrics else "" for name in names)
    return (f"`{file}`", str(iterations), *cells)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def versions() -> dict[str, str]:
    """Package to version, this project's first."""
    try:
        own = metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {
        _DISTRIBUTION: own,
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "Python": platform.python_version(),
    }


def commit() -> str:
    """Commit of the checkout this runs from, with "-dirty" where files differ; "" without one."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=_ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != _ROOT:  # installed below another project
            return ""
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return ""
