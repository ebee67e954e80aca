"""The recommended recipe behind ``train_net.py --config-file STUDENT --teacher TEACHER``.

STUDENT and TEACHER are any detectron2 configs. What a recipe sets stands in ``configs/methods``,
the files that configs take as a base: the values of the method's paper (or of the code where they
were published) for that family of detector. Values given on the command line always win.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from torch import nn

from ..building import build_detector, meta_device
from ..config import LazyNode, load_config, merge_config, merge_overrides
from ..config.config_files import read_yaml
from ..config.key_checks import check_each
from ..config.lazy_files import is_lazy_file
from ..errors import ConfigError
from ..files import published_weights, resolve_config
from ..foreign import build_foreign, foreign_scheme
from ..heads.base import IMITATION_HEAD_REGISTRY, head_class
from ..levels import default_levels, pair_levels
from ..teacher_building import build_from_config
from .methods import (
    SEGMENTATION,
    TWO_STAGE,
    families_of,
    family,
    method_file,
    method_names,
    source_of,
)

# Without --method: what gained most in our measurements of that family (docs/methods/index.md), and
# where these do not tell the methods apart the one that needs the least tuning.
DEFAULT_METHODS = {
    TWO_STAGE: ("CWD", "the default for R-CNNs, where it gained most in our measurements"),
    SEGMENTATION: ("PI", "the default for segmentation, where it gained most in our measurements"),
}
DEFAULT_METHOD = (
    "PKD",
    "the default, as it needs the least tuning: AP is reported to move by 0.3 over weights 3 to 13",
)
# Methods whose values go by the teacher's family; all others go by the student's.
BY_TEACHER = frozenset({"PKD"})


def apply_recipe(args):
    """The config of a distillation run from two stock configs; prints what was chosen and why.

    Args:
        args: of ``train_net.py``: ``config_file`` (student), ``teacher``, ``teacher_weights``,
            ``method``, ``opts`` and ``eval_only``.

    Returns:
        An unfrozen config.

    Raises:
        ConfigError: see :func:`recipe_config`; also a teacher without trained weights.
    """
    cfg, lines, weights = recipe_config(
        args.config_file, args.teacher, args.method, args.opts, args.teacher_weights
    )
    if not (args.eval_only or cfg.KD.TEACHER.ALLOW_MISSING):
        _check_trained(args.teacher, weights)
    if comm.is_main_process():
        for line in lines:
            print(f"recipe: {line}", flush=True)
    return cfg


def recipe_config(
    student_config: str, teacher_config: str, method: str, opts: Sequence = (), weights: str = ""
):
    """A student's config with a teacher and the values of a method.

    Args:
        student_config, teacher_config: paths or ``model_zoo://`` names.
        method: a name of ``configs/methods`` or of a head in any case, or several with commas;
            "" = the default of the student's family.
        opts: ``["KEY", value, ...]`` overrides; they win over the method's values.
        weights: the teacher's; "" = those of its own run, else those that its config names.

    Returns:
        (an unfrozen config, lines that say what was chosen and why, the teacher's weights).

    Raises:
        ConfigError: unknown method or one without values for such a detector, a student config
            that distils already, or detectors that share no level.
    """
    cfg = load_config(student_config, opts)
    if cfg.KD.HEADS or cfg.KD.META_ARCHITECTURE:
        raise ConfigError(
            f"--teacher: '{student_config}' distils already (KD.HEADS {tuple(cfg.KD.HEADS)}); "
            "leave out --teacher, or give the plain student's config and choose with --method"
        )
    cfg.KD.META_ARCHITECTURE = "DistillMetaArch"
    heads = [name for name, _ in IMITATION_HEAD_REGISTRY]
    cfg.KD.TEACHER.CONFIG_FILE = teacher_config
    cfg.KD.TEACHER.WEIGHTS = weights or cfg.KD.TEACHER.WEIGHTS
    check_each(cfg)
    student = _student_outline(cfg)
    default, reason = DEFAULT_METHODS.get(family(student), DEFAULT_METHOD)
    methods = method_names(method or default, heads)
    teacher, named, trained = _teacher_outline(cfg)
    lines = []
    if trained and not cfg.KD.TEACHER.WEIGHTS:
        cfg.KD.TEACHER.WEIGHTS = trained
        lines.append(f"teacher's weights from its own run: {trained}")
    pairs = pair_levels(cfg.KD.LEVEL_MAP, student.backbone, teacher.backbone)
    levels = default_levels(pairs, student, teacher)
    # before the overrides, which may name another
    cfg.OUTPUT_DIR = _own_folder(cfg.OUTPUT_DIR, student_config, teacher_config, methods)
    told = [_fill(cfg, name, student, teacher, levels) for name in methods]
    cfg.KD.HEADS = tuple(head for _, heads in told for head in heads)
    merge_overrides(cfg, opts)
    for line, heads in told:
        values = "".join(_values(cfg, head, levels, student) for head in heads)
        lines.append(f"{line}{values}" + ("" if method else f"; {reason}"))
    return cfg, lines, cfg.KD.TEACHER.WEIGHTS or named


def _fill(
    cfg, method: str, student: nn.Module, teacher: nn.Module, levels: list[str]
) -> tuple[str, tuple[str, ...]]:
    """Merge a method's values; the beginning of the line to print, and the heads."""
    side, detector = ("teacher", teacher) if method in BY_TEACHER else ("student", student)
    kind = f"{family(detector)} {side} ({type(detector).__name__})"
    path = method_file(method, family(detector))
    if path is None:
        if method not in IMITATION_HEAD_REGISTRY:
            raise ConfigError(
                f"--method: {method} has no values for a {kind}, it is for "
                f"{' and '.join(families_of(method))} detectors"
            )
        line = (
            f"{method} with the head's own defaults, as no values are published for it and a "
            f"{kind} (kd-calibrate suggests a weight)"
        )
        return line, (method,)
    merge_config(cfg, read_yaml(path), path)
    heads = tuple(cfg.KD.HEADS)
    for head in heads:
        node = cfg.KD[head.upper()]
        # a detector has other levels than the one that the values were published for
        node.LEVELS = () if cfg.KD.LEVELS else tuple(levels[: len(node.LEVELS)])
    return f"{method} for a {kind}, values of {source_of(path)}", heads


def _values(cfg, head: str, levels: list[str], student: nn.Module) -> str:
    levels = head_class(head).preferred(levels, student.backbone.output_shape())
    node = cfg.KD.get(head.upper())
    if node is None:
        return ""
    used = ", ".join(node.LEVELS or cfg.KD.LEVELS or levels)
    if "bottom_up" in head_class(head).requires:  # stages of the backbone, not levels
        used = ", ".join(node.LEVELS) or "the last backbone stage"
    key, value = "WEIGHT", node.WEIGHT
    if value < 0:  # the preset's
        key, value = "PRESET", node.PRESET
    shown = value if isinstance(value, str) else f"{value:g}"
    return f": KD.{head.upper()}.{key} {shown} on {used}"


# --- what the two sides are, without memory or weights ------------------------------------------


# what was built, by all that it was built from: the rows of a suite share students and teachers
_OUTLINES: dict = {}


def _without_weights(cfg):
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.TIMM.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED = "", False
    return cfg


def _student_outline(cfg) -> nn.Module:
    registered = cfg.MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY
    if not registered and not isinstance(cfg, LazyNode):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE: no meta-arch '{cfg.MODEL.META_ARCHITECTURE}' is registered "
            "(is its module in KD.IMPORTS?)"
        )
    outline = _without_weights(cfg)
    plain = outline.clone()
    for section in ("KD", "SOLVER", "OUTPUT_DIR", "SEED"):
        plain.pop(section)
    key = plain.dump()
    if key not in _OUTLINES:
        with meta_device():
            _OUTLINES[key] = build_detector(outline)
    return _OUTLINES[key]


def _teacher_outline(cfg) -> tuple[nn.Module, str, str]:
    """The teacher on the meta device, the weights that its config names, those that it trained."""
    node = cfg.KD.TEACHER
    if foreign_scheme(node.CONFIG_FILE):
        return _foreign_outline(node), node.CONFIG_FILE, ""
    path = resolve_config(node.CONFIG_FILE, "--teacher")
    outline = _without_weights(cfg)
    if not is_lazy_file(path):
        no_backbone_weights = ["MODEL.TIMM.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", False]
        outline.KD.TEACHER.OPTS = [*node.OPTS, *no_backbone_weights]
    key = path, os.stat(path).st_mtime_ns, str(node.OPTS)
    if key not in _OUTLINES:
        with meta_device():
            _OUTLINES[key] = build_from_config(outline, path)
    model, own, weights, *_ = _OUTLINES[key]
    weights = published_weights(node.CONFIG_FILE, weights, node.OPTS)
    return model, weights, _trained_weights(own)


def _foreign_outline(node) -> nn.Module:
    key = node.CONFIG_FILE, node.WEIGHTS, str(node.OPTS)
    if key not in _OUTLINES:
        with meta_device():
            _OUTLINES[key] = build_foreign(node, "cpu", outline=True)
    return _OUTLINES[key]


def _trained_weights(cfg) -> str:
    """model_final.pth of the run of a config, "" if it has none.

    The folder that every config has by default is left out: what lies there may be of any run.
    """
    if cfg is None or os.path.normpath(cfg.OUTPUT_DIR) == os.path.normpath(get_cfg().OUTPUT_DIR):
        return ""
    path = os.path.join(os.path.expandvars(os.path.expanduser(cfg.OUTPUT_DIR)), "model_final.pth")
    return path if os.path.isfile(path) else ""


def _own_folder(students: str, config: str, teacher: str, methods: tuple[str, ...]) -> str:
    """OUTPUT_DIR of a one-flag run, beside the plain student's, which it must never take."""
    default = os.path.normpath(students) == os.path.normpath(get_cfg().OUTPUT_DIR)
    parent = "output" if default else os.path.dirname(os.path.normpath(students))
    return os.path.join(parent, "_".join((_stem(config), "from", _stem(teacher), *methods)))


def _check_trained(teacher: str, weights: str) -> None:
    if not weights or "ImageNetPretrained" in weights:
        found = f"only '{weights}', where its training starts" if weights else "none"
        raise ConfigError(
            f"--teacher-weights: name the trained teacher's weights; '{teacher}' has {found}, and "
            "its OUTPUT_DIR no model_final.pth"
        )


def _stem(config: str) -> str:
    """A config's name for a folder; OUTPUT_DIR/config.yaml goes by its folder."""
    folder, name = os.path.split(config.rpartition("://")[2])
    stem = os.path.splitext(name)[0]
    return os.path.basename(folder) or stem if stem == "config" else stem
