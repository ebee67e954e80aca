"""KD.TEACHER.CLASS_MAP: which class of the teacher is which of the student's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..config.config_files import BY_NAME
from ..detectors import class_names_of, configured_classes
from ..errors import ConfigError, did_you_mean
from ..shared_classes import SharedClasses
from .classes import kinds_of, short_list
from .register import KINDS

KEY = "KD.TEACHER.CLASS_MAP"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassMap:
    """What KD.TEACHER.CLASS_MAP says, each by the metadata that names the classes.

    Attributes:
        chosen: the teacher's classes that the student has too, in the student's order.
        shared: the student's classes that the teacher has too.
        names: of the shared classes, as the student's data set calls them; () = not known.
    """

    chosen: dict[str, list[int]] = field(default_factory=dict)
    shared: dict[str, SharedClasses] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Side:
    """Classes of a side: names (() = not known) and number (0 = not known)."""

    side: str
    names: tuple[str, ...]
    number: int


def read_class_map(
    cfg: CfgNode, names: Mapping[str, Sequence[str]], numbers: Mapping[str, int]
) -> ClassMap:
    """Compare the classes of both sides.

    Args:
        cfg: of the student, with KD.DATASETS registered.
        names: by kind (KINDS) the classes that the teacher learnt; one that is missing is not
            known.
        numbers: by kind how many classes the teacher predicts.

    Returns:
        Empty maps where CLASS_MAP is empty.

    Raises:
        ConfigError: classes that do not exist or are named twice, nothing that both sides have, or
            names that are not known.
    """
    entries = list(cfg.KD.TEACHER.CLASS_MAP)
    if not entries:
        return ClassMap()
    kinds = [kind for kind in kinds_of(cfg) if kind in numbers]
    if entries != [BY_NAME]:
        own = class_names_of(cfg.MODEL.META_ARCHITECTURE)
        kinds = [kind for kind in kinds if kind == own]
    if not kinds:
        raise ConfigError(
            f"{KEY}: the teacher predicts none of the student's kinds of classes, or registers no "
            "class layers (register_detector); heads on features need no map"
        )
    result = ClassMap()
    for kind in kinds:
        ours, theirs = _student(cfg, kind), _teacher(names, numbers, kind)
        pairs = _by_name(ours, theirs) if entries == [BY_NAME] else _read(entries, ours, theirs)
        known = sorted(pairs)
        result.chosen[kind] = [pairs[k] for k in known]
        complete = len(known) == ours.number
        result.shared[kind] = SharedClasses(None if complete else tuple(known), ours.number)
        result.names[kind] = [ours.names[k] for k in known] if ours.names else []
        _tell(kind, ours, theirs, pairs)
    return result


def _student(cfg: CfgNode, kind: str) -> _Side:
    """By the first data set that it trains on, else by its config."""
    names = ()
    if cfg.DATASETS.TRAIN:
        names = tuple(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get(kind, ()))
    number = len(names)
    if not number and kind == class_names_of(cfg.MODEL.META_ARCHITECTURE):
        number = configured_classes(cfg, cfg.MODEL.META_ARCHITECTURE) or 0
    return _Side("student", names, number)


def _teacher(names, numbers, kind: str) -> _Side:
    found = tuple(names.get(kind, ()))
    if found and len(found) != numbers[kind]:
        raise ConfigError(
            f"{KEY}: the teacher predicts {numbers[kind]} {KINDS[kind]} and its DATASETS.TRAIN has "
            f"{len(found)}; set KD.TEACHER.OPTS with DATASETS.TRAIN to what it was trained on, or "
            "to () and write pairs of numbers"
        )
    return _Side("teacher", found, numbers[kind])


def _by_name(ours: _Side, theirs: _Side) -> dict[int, int]:
    for side in (ours, theirs):
        if not side.names:
            raise ConfigError(
                f"{KEY}: the {side.side}'s class names are not known (DATASETS.TRAIN of its config "
                "is empty, or not to be found here): write pairs [student class, teacher class]"
            )
    pairs = {k: theirs.names.index(x) for k, x in enumerate(ours.names) if x in theirs.names}
    if not pairs:
        raise ConfigError(
            f"{KEY}: no class has the same name on both sides; student: {short_list(ours.names)}; "
            f"teacher: {short_list(theirs.names)}; write pairs [student class, teacher class]"
        )
    return pairs


def _read(entries: list, ours: _Side, theirs: _Side) -> dict[int, int]:
    pairs: dict[int, int] = {}
    for entry in entries:
        own, other = (_index(x, side) for x, side in zip(entry, (ours, theirs), strict=True))
        for used, side, value in ((pairs, ours, own), (pairs.values(), theirs, other)):
            if value in used:
                raise ConfigError(
                    f"{KEY}: {entry} takes {entry[0] if side is ours else entry[1]} of the "
                    f"{side.side} a second time: a class goes with one class"
                )
        pairs[own] = other
    return pairs


def _index(given: str | int, side: _Side) -> int:
    if isinstance(given, str):
        if not side.names:
            raise ConfigError(
                f"{KEY}: '{given}': the {side.side}'s class names are not known (DATASETS.TRAIN); "
                "write its number"
            )
        if given not in side.names:
            raise ConfigError(
                f"{KEY}: the {side.side} has no class '{given}'{did_you_mean(given, side.names)}; "
                f"it has {short_list(side.names)}"
            )
        return side.names.index(given)
    if not 0 <= given < side.number:
        has = f"it has 0 to {side.number - 1}" if side.number else "its number is not known"
        raise ConfigError(f"{KEY}: the {side.side} has no class {given}; {has}")
    return given


def _tell(kind: str, ours: _Side, theirs: _Side, pairs: Mapping[int, int]) -> None:
    def name(side: _Side, index: int) -> str:
        return side.names[index] if side.names else str(index)

    told = [f"{name(ours, a)} = {name(theirs, b)}" for a, b in sorted(pairs.items())]
    without = [name(ours, k) for k in range(ours.number) if k not in pairs]
    logger.info(
        f"{KEY}: {len(pairs)} of the student's {ours.number} {KINDS[kind]} (student = teacher): "
        f"{short_list(told)}; {theirs.number - len(pairs)} of the teacher's are left out"
    )
    if without:
        logger.warning(
            f"{KEY}: the teacher has no {KINDS[kind]} {short_list(without)}: heads on class "
            "outputs leave them out, they learn from ground truth alone"
        )
