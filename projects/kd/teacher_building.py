"""The teacher that a config names, with its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from .building import build_detector
from .config import LazyNode, load_config
from .config.key_checks import TEACHER_KEYS, check_each
from .config.teachers import module_name
from .context import ModelInfo
from .data.classes import compare_with_teacher
from .data.register import names_by_kind
from .detectors import taps_for
from .errors import ConfigError, UserError, did_you_mean
from .files import published_weights, resolve_config
from .foreign import build_foreign, foreign_scheme
from .heads.base import build_imitation_heads
from .levels import pair_levels
from .modeling.class_layers import map_classes
from .precision import in_channels_last
from .teacher import Teacher
from .teacher_cache import build_cache, check_cache
from .teacher_link import TeacherLink
from .weights.files import modules_in
from .weights.loading import load_weights

logger = logging.getLogger(__name__)


def build_teacher(cfg) -> Teacher:
    """Build KD.TEACHER with its weights on MODEL.DEVICE.

    Args:
        cfg: the student's config.

    Raises:
        ConfigError: config or weights missing, or parameters that the weights do not hold.
    """
    node = cfg.KD.TEACHER
    check_cache(cfg)
    if foreign_scheme(node.CONFIG_FILE):
        model = build_foreign(node, cfg.MODEL.DEVICE, cfg.KD.ALLOW_PICKLE)
        parts = model, None, model.input_format, model.weights, model.names
    else:
        parts = _build_from_file(cfg)
    model, teacher_cfg, input_format, weights, names = parts
    _check_formats(cfg.INPUT.FORMAT, input_format)
    class_map = map_classes(cfg, model, names)
    teacher = Teacher(
        model,
        input_format=input_format,
        cfg=teacher_cfg,
        names={**names, **class_map.names},
        shared=class_map.shared,
        source=f"config {node.CONFIG_FILE}, weights {weights or 'random'}",
        dtype=node.DTYPE,
        channels_last=in_channels_last(node.CHANNELS_LAST, cfg.MODEL.DEVICE),
        fuse=node.FUSE,
        cache=build_cache(cfg),
    )
    logger.info("%r", teacher)
    return teacher


def paired_infos(cfg, student: nn.Module, teacher: Teacher, level_map: Mapping[str, str]):
    """Both sides as heads see them: shapes of the paired levels under the student's names."""
    ours, theirs = student.backbone.output_shape(), teacher.model.backbone.output_shape()
    student_info = ModelInfo(
        model=student,
        shapes={level: ours[level] for level in level_map},
        taps=frozenset(taps_for(student)),
        cfg=cfg,
    )
    teacher_info = ModelInfo(
        model=teacher.model,
        shapes={level: theirs[other] for level, other in level_map.items()},
        taps=frozenset(taps_for(teacher.model)),
        cfg=teacher.cfg,
        own_names=dict(level_map),
        shared=teacher.shared,
    )
    return student_info, teacher_info


def link_to_teacher(
    cfg, student: nn.Module, name: str = ""
) -> tuple[TeacherLink, dict[str, nn.Module]]:
    """Build a teacher and its heads.

    Args:
        cfg: of this teacher, see :func:`~projects.kd.config.teachers.config_of`.
        student: the detector.
        name: in KD.TEACHERS.

    Returns:
        The link, and the heads by the names of their modules.

    Raises:
        ConfigError: what :func:`build_teacher` and the heads refuse; of several teachers also one
            that shares no level with the student.
    """
    teacher = build_teacher(cfg)
    backbones = student.backbone, teacher.model.backbone
    level_map = pair_levels(cfg.KD.LEVEL_MAP, *backbones, required=bool(name))
    infos = paired_infos(cfg, student, teacher, level_map)
    heads = build_imitation_heads(cfg, *infos)
    compared = {head: module.compares for head, module in heads.items()}
    compare_with_teacher(cfg, teacher.names, compared, teacher.shared)
    own = {module_name(name, head): module for head, module in heads.items()}
    link = TeacherLink(
        teacher,
        level_map,
        tuple(own),
        name,
        scale=cfg.KD.TEACHER.INPUT_SCALE,
        compiled=cfg.KD.TEACHER.COMPILE,
    )
    return link, own


def _build_from_file(cfg):
    """A detectron2 detector with its weights: (model, its config, image format, weights, names)."""
    node = cfg.KD.TEACHER
    path = resolve_config(node.CONFIG_FILE, "KD.TEACHER.CONFIG_FILE")
    model, teacher_cfg, weights, input_format, datasets = build_from_config(cfg, path)
    weights = node.WEIGHTS or published_weights(node.CONFIG_FILE, weights, node.OPTS)
    if weights:
        loaded = load_weights(model, weights, "KD.TEACHER.WEIGHTS", cfg.KD.ALLOW_PICKLE)
        if loaded.missing and not node.ALLOW_MISSING:
            raise ConfigError(
                f"KD.TEACHER.WEIGHTS: '{weights}' lacks {len(loaded.missing)} of the "
                f"{len(model.state_dict())} parameters and buffers of the teacher that "
                f"KD.TEACHER.CONFIG_FILE describes: {modules_in(loaded.missing)}; {loaded}"
            )
    elif not node.ALLOW_MISSING:
        raise ConfigError("KD.TEACHER.WEIGHTS is empty and the teacher's config names no weights")
    return model, teacher_cfg, input_format, weights, _names(cfg, teacher_cfg, datasets)


def _check_formats(ours: str, theirs: str) -> None:
    """Channels can be swapped and grey be shown as a colour; nothing else is converted."""
    colours = ("BGR", "RGB")
    if ours != theirs and not (ours in (*colours, "L") and theirs in colours):
        raise ConfigError(
            f"INPUT.FORMAT is {ours}, and the teacher's is {theirs}: one image serves both, it can "
            "be BGR or RGB on either side, L for the student of such a teacher, or the same"
        )


def build_from_config(cfg, path: str):
    """A teacher from a YAML or a LazyConfig: (model, its config, weights, format, data sets)."""
    try:
        teacher_cfg = load_config(path, cfg.KD.TEACHER.OPTS, "KD.TEACHER.OPTS")
    except ConfigError as error:
        start = "" if str(error).startswith("KD.TEACHER") else "KD.TEACHER.CONFIG_FILE: "
        raise ConfigError(f"{start}{error}") from error
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    source = f"KD.TEACHER.CONFIG_FILE '{path}'"
    source += " with KD.TEACHER.OPTS" if cfg.KD.TEACHER.OPTS else ""
    arch = teacher_cfg.MODEL.META_ARCHITECTURE
    if arch not in META_ARCH_REGISTRY and not isinstance(teacher_cfg, LazyNode):
        raise ConfigError(
            f"{source}: its MODEL.META_ARCHITECTURE '{arch}' is not registered (KD.IMPORTS)"
            f"{did_you_mean(arch, (name for name, _ in META_ARCH_REGISTRY))}"
        )
    check_each(teacher_cfg, TEACHER_KEYS, source)
    teacher_cfg.freeze()
    model = build_detector(teacher_cfg, source)
    weights = teacher_cfg.MODEL.WEIGHTS
    return model, teacher_cfg, weights, teacher_cfg.INPUT.FORMAT, teacher_cfg.DATASETS.TRAIN


def _names(cfg, teacher_cfg, datasets: Sequence[str]) -> dict[str, list[str]]:
    """What the teacher learnt to find: :func:`names_by_kind` of the first of its data sets.

    Its config's own KD.DATASETS come first: a name may stand for another file there.
    """
    if not datasets:
        return {}
    try:
        return names_by_kind([c for c in (teacher_cfg, cfg) if c is not None], datasets[0])
    except UserError as error:  # trained elsewhere: its data need not be here
        logger.warning("KD.TEACHER.CONFIG_FILE: the teacher's classes are not known: %s", error)
        return {}
