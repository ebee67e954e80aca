"""Checks of config values before anything is built: each key alone, and keys that must agree."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet

from ..errors import ConfigError, did_you_mean
from .key_table import rule_of
from .lazy_files import LazyNode

# What evaluation reads; training reads everything.
_EVALUATION = ("MODEL", "INPUT", "TEST", "OUTPUT_DIR", "SEED")
# What of a teacher's config counts.
TEACHER_KEYS = ("MODEL",)

logger = logging.getLogger(__name__)


def flat(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys of a config and their values, without the groups."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_values(cfg: CfgNode, training: bool = True) -> None:
    """Check every key by the table of :mod:`.key_table`, then those that must agree.

    Args:
        cfg: the full config.
        training: False checks what evaluation reads alone.

    Raises:
        ConfigError: the first value found wrong, with its key and what it must be.
    """
    check_each(cfg, () if training else _EVALUATION)
    _check_device(cfg.MODEL.DEVICE)
    _check_input(cfg)
    if isinstance(cfg, LazyNode):  # the rest is the file's own affair
        return
    _check_anchors(cfg)
    _check_matchers(cfg)
    if training:
        _check_training_input(cfg)
        _check_schedule(cfg.SOLVER)


def check_each(cfg: CfgNode, sections: tuple[str, ...] = (), source: str = "") -> None:
    """Check every key by itself.

    Args:
        cfg: the config.
        sections: first names of the keys to check; () = all.
        source: where the config comes from, put before the message.
    """
    start = f"{source}: " if source else ""
    for key, value in flat(cfg):
        if sections and key.partition(".")[0] not in sections:
            continue
        rule = rule_of(key)
        if rule is None:
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                raise ConfigError(f"{start}{key} is {value}: give it a finite value")
        elif not rule.test(value):
            near = did_you_mean(value, rule.names()) if isinstance(value, str) else ""
            shown = cfg.shown(key) if isinstance(cfg, LazyNode) else key
            raise ConfigError(f"{start}{shown} is {value!r}, it must be {rule.words}{near}")


def _check_device(name: str) -> None:
    key = f"MODEL.DEVICE is '{name}'"
    kind, _, index = name.partition(":")
    if name == "cpu":
        return
    if kind != "cuda" or (":" in name and not index.isdigit()):
        near = did_you_mean(name, ("cpu", "cuda"), cutoff=0.5)
        raise ConfigError(f"{key}: write cpu, cuda or cuda:<number>{near}")
    if not torch.cuda.is_available():
        raise ConfigError(f"{key}: torch finds no GPU on this machine; write cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise ConfigError(f"{key}: this machine has GPUs 0 to {torch.cuda.device_count() - 1}")


def _check_input(cfg) -> None:
    mean, std, form = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT
    if len(mean) != len(std):
        raise ConfigError(
            f"MODEL.PIXEL_STD has {len(std)} values, MODEL.PIXEL_MEAN {len(mean)}: they need one "
            "for each channel"
        )
    # a grey image is broadcast to the three channels of a network trained on colours
    if len(mean) != 3 and not (form == "L" and len(mean) == 1):
        raise ConfigError(
            f"MODEL.PIXEL_MEAN has {len(mean)} values: INPUT.FORMAT {form} takes three"
            + (", or one for a network of one channel" if form == "L" else "")
        )


def _check_training_input(cfg) -> None:
    node, crop = cfg.INPUT, cfg.INPUT.CROP
    if node.MIN_SIZE_TRAIN_SAMPLING == "range" and len(node.MIN_SIZE_TRAIN) != 2:
        raise ConfigError(
            f"INPUT.MIN_SIZE_TRAIN is {node.MIN_SIZE_TRAIN}: MIN_SIZE_TRAIN_SAMPLING 'range' needs "
            "two values"
        )
    limit = math.inf if crop.TYPE.startswith("absolute") else 1
    if crop.ENABLED and any(x > limit or (limit > 1 and x != int(x)) for x in crop.SIZE):
        raise ConfigError(
            f"INPUT.CROP.SIZE is {crop.SIZE}: TYPE '{crop.TYPE}' takes "
            + ("parts of the image, up to 1" if limit == 1 else "whole numbers of pixels")
        )
    low, high = node.DETR_CROP_RANGE
    if low > high:
        raise ConfigError(f"INPUT.DETR_CROP_RANGE is {node.DETR_CROP_RANGE}: smaller one first")
    if cfg.MODEL.LOAD_PROPOSALS:
        for split in ("TRAIN", "TEST"):
            names, files = (cfg.DATASETS[key + split] for key in ("", "PROPOSAL_FILES_"))
            if len(names) != len(files):
                raise ConfigError(
                    f"DATASETS.PROPOSAL_FILES_{split} has {len(files)} files for {len(names)} data "
                    "sets: MODEL.LOAD_PROPOSALS needs one for each"
                )


def _check_schedule(solver) -> None:
    name, steps = solver.LR_SCHEDULER_NAME, [x for x in solver.STEPS if x <= solver.MAX_ITER]
    if name == "WarmupMultiStepLR" and len(steps) >= solver.MAX_ITER:
        raise ConfigError(
            f"SOLVER.STEPS has {len(steps)} steps, too many for SOLVER.MAX_ITER {solver.MAX_ITER}"
        )
    if name == "WarmupCosineLR" and solver.BASE_LR_END > solver.BASE_LR:
        raise ConfigError(
            f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}, above SOLVER.BASE_LR {solver.BASE_LR}"
        )
    if solver.OPTIMIZER == "SGD" and solver.NESTEROV and solver.MOMENTUM == 0:
        raise ConfigError("SOLVER.NESTEROV needs a SOLVER.MOMENTUM above 0")
    if 0 < solver.MAX_ITER <= solver.WARMUP_ITERS:
        logger.warning(
            "SOLVER.WARMUP_ITERS %d is not below SOLVER.MAX_ITER %d: the whole run is warm-up and "
            "hardly reaches SOLVER.BASE_LR",
            solver.WARMUP_ITERS,
            solver.MAX_ITER,
        )


def _check_anchors(cfg) -> None:
    """As many lists as levels, for the detectors that make anchors of MODEL.ANCHOR_GENERATOR."""
    arch = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if isinstance(arch, type) and issubclass(arch, RetinaNet):
        levels, key = cfg.MODEL.RETINANET.IN_FEATURES, "MODEL.RETINANET.IN_FEATURES"
    elif cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN", "ProposalNetwork"):
        levels, key = cfg.MODEL.RPN.IN_FEATURES, "MODEL.RPN.IN_FEATURES"
        if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
            return
    else:
        return
    for name in ("SIZES", "ASPECT_RATIOS"):
        lists = cfg.MODEL.ANCHOR_GENERATOR[name]
        if isinstance(lists[0], (list, tuple)) and len(lists) not in (1, len(levels)):
            raise ConfigError(
                f"MODEL.ANCHOR_GENERATOR.{name} has {len(lists)} lists, {key} {len(levels)} levels "
                f"({', '.join(levels)}): give one list for all or one for each"
            )


def _check_matchers(cfg) -> None:
    for name in ("RPN", "ROI_HEADS", "RETINANET"):
        node = cfg.MODEL[name]
        if len(node.IOU_LABELS) != len(node.IOU_THRESHOLDS) + 1:
            raise ConfigError(
                f"MODEL.{name}.IOU_LABELS has {len(node.IOU_LABELS)} values, it must have one more "
                f"than IOU_THRESHOLDS, {len(node.IOU_THRESHOLDS)}"
            )
