"""The recommended recipe behind ``train_net.py --config-file STUDENT --teacher TEACHER``.

STUDENT and TEACHER are any detectron2 configs. What a recipe sets is the table below: the values of
the method's paper (or of the code where they were published) for that family of detector. Values
given on the command line always win.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import nn

from .building import build_detector
from .config import load_config, merge_overrides
from .config.key_checks import check_each
from .errors import ConfigError
from .files import published_weights, resolve_config
from .heads.base import IMITATION_HEAD_REGISTRY, head_class
from .heads.sdf import PRESETS
from .levels import default_levels, pair_levels
from .teacher import build_from_lazy, build_from_yaml

ONE_STAGE, TWO_STAGE, OTHER = "one-stage", "two-stage", "other"

DEFAULT_METHOD = "PKD"
DEFAULT_REASON = (
    "the default, as it needs the least tuning: AP is reported to move by 0.3 over weights 3 to 13"
)


@dataclass(frozen=True)
class Recipe:
    """What is set for one method and one family of detector.

    Attributes:
        weight: KD.<METHOD>.WEIGHT.
        source: where the values come from.
        finest: how many of the paired levels are distilled, from the finest; None = all.
        keys: more keys of the KD.<METHOD> node.
        overrides: keys outside of it, as (KEY, value, ...).
    """

    weight: float
    source: str
    finest: int | None = None
    keys: Mapping[str, object] = field(default_factory=dict)
    overrides: tuple = ()


_FGFI = Recipe(
    0.01,
    "Wang et al., CVPR 2019; threshold over all levels as in the LD repository",
    keys={"THRESH_FACTOR": 0.5, "ASSIGN": "joint", "ADAPTER": "conv3x3", "START_ITER": 400},
)
_MIMIC = Recipe(1.0, "mean squared error over all levels as in MasKD's '+mimic' configs")
_SDF_SOURCE = "this project, as the reduction that ScaleKD's goes with is not known (KD.SDF.PRESET)"
_PREDICTIONS = Recipe(
    1.0, "this project, as the form of the published terms is not known (PRESET balanced)"
)
_ICD_SOURCE = "Kang et al., NeurIPS 2021"
# element-wise, as in all configs of ICD's authors
_CLIP = ("SOLVER.CLIP_GRADIENTS.ENABLED", True)
# p7, and R-CNN's p6, are left out by the authors of CWD (p6 is p5 subsampled) and of PKD.
RECIPES: dict[tuple[str, str], Recipe] = {
    ("PKD", ONE_STAGE): Recipe(10.0, "Cao et al., NeurIPS 2022", finest=4),
    ("PKD", TWO_STAGE): Recipe(6.0, "Cao et al., NeurIPS 2022", finest=4),
    ("CWD", ONE_STAGE): Recipe(5.0, "Shu et al., ICCV 2021, RetinaNet config", finest=4),
    ("CWD", TWO_STAGE): Recipe(10.0, "mmrazor's Faster R-CNN 1x config of CWD", finest=4),
    ("FGFI", ONE_STAGE): _FGFI,
    ("FGFI", TWO_STAGE): _FGFI,
    ("ICD", ONE_STAGE): Recipe(8.0, _ICD_SOURCE, keys={"MAX_QUERIES": 300}, overrides=_CLIP),
    ("ICD", TWO_STAGE): Recipe(3.0, _ICD_SOURCE, keys={"MAX_QUERIES": 100}, overrides=_CLIP),
    ("SDF", ONE_STAGE): Recipe(PRESETS["balanced"][0], _SDF_SOURCE),
    ("SDF", TWO_STAGE): Recipe(PRESETS["balanced"][1], _SDF_SOURCE),
    ("OutputKD", ONE_STAGE): _PREDICTIONS,
    ("OutputKD", TWO_STAGE): _PREDICTIONS,
    ("CSA", ONE_STAGE): _PREDICTIONS,
    ("CSA", TWO_STAGE): _PREDICTIONS,
    ("Mimic", ONE_STAGE): _MIMIC,
    ("Mimic", TWO_STAGE): _MIMIC,
}
# Methods whose values go by the teacher's family; all others go by the student's.
BY_TEACHER = frozenset({"PKD"})


def apply_recipe(args):
    """The config of a distillation run from two stock configs; prints what was chosen and why.

    Args:
        args: of ``train_net.py``: ``config_file`` (student), ``teacher``, ``teacher_weights``,
            ``method`` (a head's name in any case, or several with commas; "" = the default),
            ``opts`` and ``eval_only``.

    Returns:
        An unfrozen config.

    Raises:
        ConfigError: unknown method, a student config that distils already, a teacher without
            trained weights, or detectors that share no level.
    """
    cfg = load_config(args.config_file, args.opts)
    if cfg.KD.HEADS or cfg.KD.META_ARCHITECTURE:
        raise ConfigError(
            f"--teacher: '{args.config_file}' distils already (KD.HEADS {tuple(cfg.KD.HEADS)}); "
            "leave out --teacher, or give the plain student's config and choose with --method"
        )
    cfg.KD.META_ARCHITECTURE = "DistillMetaArch"
    cfg.KD.HEADS = _methods(args.method)
    cfg.KD.TEACHER.CONFIG_FILE = args.teacher
    cfg.KD.TEACHER.WEIGHTS = args.teacher_weights or cfg.KD.TEACHER.WEIGHTS
    check_each(cfg)
    student = _student_outline(cfg)
    teacher, weights, trained = _teacher_outline(cfg)
    if trained and not cfg.KD.TEACHER.WEIGHTS:
        cfg.KD.TEACHER.WEIGHTS = trained
        if comm.is_main_process():
            print(f"recipe: teacher's weights from its own run: {trained}", flush=True)
    if not (args.eval_only or cfg.KD.TEACHER.ALLOW_MISSING):
        _check_trained(args.teacher, cfg.KD.TEACHER.WEIGHTS or weights)
    pairs = pair_levels(cfg.KD.LEVEL_MAP, student.backbone, teacher.backbone)
    levels = default_levels(pairs, student, teacher)
    cfg.OUTPUT_DIR = _own_folder(cfg.OUTPUT_DIR, args, cfg.KD.HEADS)  # overrides come after it
    lines = [_fill(cfg, method, student, teacher, levels) for method in cfg.KD.HEADS]
    merge_overrides(cfg, args.opts)
    if comm.is_main_process():
        for method, line in zip(cfg.KD.HEADS, lines, strict=True):
            reason = f"; {DEFAULT_REASON}" if not args.method else ""
            print(f"recipe: {line}{_values(cfg, method, levels)}{reason}", flush=True)
    return cfg


def _methods(names: str) -> tuple[str, ...]:
    """Registry names for what the user wrote after --method."""
    known = {name.lower(): name for name, _ in IMITATION_HEAD_REGISTRY}
    wanted = [name.strip() for name in (names or DEFAULT_METHOD).split(",")]
    unknown = [name for name in wanted if name.lower() not in known]
    if unknown:
        raise ConfigError(
            f"--method: no imitation head '{unknown[0]}'; choose from "
            f"{', '.join(sorted(known.values()))}"
        )
    return tuple(known[name.lower()] for name in wanted)


def family(detector: nn.Module) -> str:
    """ "one-stage", "two-stage" or "other"; a subclass belongs to the family of its base."""
    if isinstance(detector, DenseDetector):
        return ONE_STAGE
    return TWO_STAGE if isinstance(detector, GeneralizedRCNN) else OTHER


def _fill(cfg, method: str, student: nn.Module, teacher: nn.Module, levels: list[str]) -> str:
    """Put the recipe's values into ``cfg.KD.<METHOD>``; the beginning of the line to print."""
    side, detector = ("teacher", teacher) if method in BY_TEACHER else ("student", student)
    kind = f"{family(detector)} {side} ({type(detector).__name__})"
    recipe = RECIPES.get((method, family(detector)))
    if recipe is None:
        return (
            f"{method} with the head's own defaults, as no values are published for it and a "
            f"{kind} (kd-calibrate suggests a weight)"
        )
    node = cfg.KD[method.upper()]
    node.WEIGHT = recipe.weight
    node.update(recipe.keys)
    cfg.merge_from_list(list(recipe.overrides))
    if recipe.finest is not None and not cfg.KD.LEVELS:
        node.LEVELS = tuple(levels[: recipe.finest])
    return f"{method} for a {kind}, values of {recipe.source}"


def _values(cfg, method: str, levels: list[str]) -> str:
    node = cfg.KD.get(method.upper())
    if node is None:
        return ""
    used = ", ".join(node.LEVELS or cfg.KD.LEVELS or levels)
    if "bottom_up" in head_class(method).requires:  # stages of the backbone, not levels
        used = ", ".join(node.LEVELS) or "the last backbone stage"
    return f": KD.{method.upper()}.WEIGHT {node.WEIGHT:g} on {used}"


# --- what the two sides are, without memory or weights ------------------------------------------


def _without_weights(cfg):
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.TIMM.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED = "", False
    return cfg


def _student_outline(cfg) -> nn.Module:
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE: no meta-arch '{cfg.MODEL.META_ARCHITECTURE}' is registered "
            "(is its module in KD.IMPORTS?)"
        )
    with torch.device("meta"):
        return build_detector(_without_weights(cfg))


def _teacher_outline(cfg) -> tuple[nn.Module, str, str]:
    """The teacher on the meta device, the weights that its config names, those that it trained."""
    node = cfg.KD.TEACHER
    path = resolve_config(node.CONFIG_FILE, "--teacher")
    lazy = path.endswith(".py")
    outline = _without_weights(cfg)
    if not lazy:
        no_backbone_weights = ["MODEL.TIMM.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", False]
        outline.KD.TEACHER.OPTS = [*node.OPTS, *no_backbone_weights]
    with torch.device("meta"):
        model, own, weights, *_ = (build_from_lazy if lazy else build_from_yaml)(outline, path)
    weights = published_weights(node.CONFIG_FILE, weights, node.OPTS)
    return model, weights, _trained_weights(own)


def _trained_weights(cfg) -> str:
    """model_final.pth of the run of a config, "" if it has none.

    The folder that every config has by default is left out: what lies there may be of any run.
    """
    if cfg is None or os.path.normpath(cfg.OUTPUT_DIR) == os.path.normpath(get_cfg().OUTPUT_DIR):
        return ""
    path = os.path.join(os.path.expandvars(os.path.expanduser(cfg.OUTPUT_DIR)), "model_final.pth")
    return path if os.path.isfile(path) else ""


def _own_folder(students: str, args, heads: tuple[str, ...]) -> str:
    """OUTPUT_DIR of a one-flag run, beside the plain student's, which it must never take."""
    names = (_stem(args.config_file), "from", _stem(args.teacher), *heads)
    default = os.path.normpath(students) == os.path.normpath(get_cfg().OUTPUT_DIR)
    parent = "output" if default else os.path.dirname(os.path.normpath(students))
    return os.path.join(parent, "_".join(names))


def _check_trained(teacher: str, weights: str) -> None:
    if not weights or "ImageNetPretrained" in weights:
        found = f"only '{weights}', where its training starts" if weights else "none"
        raise ConfigError(
            f"--teacher-weights: name the trained teacher's weights; '{teacher}' has {found}, and "
            "its OUTPUT_DIR no model_final.pth"
        )


def _stem(config: str) -> str:
    """A config's name for a folder; OUTPUT_DIR/config.yaml goes by its folder."""
    folder, name = os.path.split(config)
    stem = os.path.splitext(name)[0]
    return os.path.basename(folder) or stem if stem == "config" else stem
