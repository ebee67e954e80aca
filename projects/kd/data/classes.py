"""Classes by name: all data sets of a run, and its teacher, mean the same by a class index.

Data sets of KD.DATASETS that list the classes of the first training set in another order are mapped
when they are registered (:mod:`.register`). What cannot be mapped is refused here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..detectors import class_names_of, offers
from ..errors import ConfigError
from .register import KINDS

logger = logging.getLogger(__name__)


def check_class_names(cfg: CfgNode, training: bool) -> None:
    """All data sets have the classes (and keypoints) of the first training set, in its order.

    Args:
        cfg: with KD.DATASETS registered.
        training: False: only DATASETS.TEST is looked at; names that the first training set does not
            have are a warning then, since the weights may come from elsewhere.

    Raises:
        ConfigError: names both data sets and what differs.
    """
    if not cfg.DATASETS.TRAIN or cfg.DATASETS.TRAIN[0] not in DatasetCatalog:
        return
    first = cfg.DATASETS.TRAIN[0]
    others = [("DATASETS.TRAIN", name) for name in cfg.DATASETS.TRAIN[1:]] if training else []
    others += [("DATASETS.TEST", name) for name in cfg.DATASETS.TEST]
    for key, name in others:
        for kind in kinds_of(cfg):
            ours, theirs = (list(MetadataCatalog.get(x).get(kind, ())) for x in (first, name))
            if not ours or not theirs or ours == theirs:
                continue
            line = (
                f"{key}: data set '{name}' has other {KINDS[kind]} than '{first}', which the model "
                f"trains on: {difference(name, theirs, first, ours)}"
            )
            if not training and sorted(ours) != sorted(theirs):
                logger.warning(line)
                continue
            hint = "give both the same names"
            if sorted(ours) == sorted(theirs):
                hint = "write them in one order"
                if kind == "thing_classes":
                    hint += " (data sets of KD.DATASETS are matched by name)"
            raise ConfigError(f"{line}; {hint}")


def check_taught_names(cfg: CfgNode, taught: Mapping[str, Sequence[str]]) -> None:
    """The data sets of DATASETS.TEST against what a detector learnt from other data.

    Args:
        cfg: with KD.DATASETS registered, by preference in the order of ``taught``.
        taught: names by kind (KINDS); one that is missing is not known.

    Raises:
        ConfigError: the same names in another order. Other names are a warning.
    """
    for name in cfg.DATASETS.TEST:
        for kind in kinds_of(cfg):
            theirs, own = list(MetadataCatalog.get(name).get(kind, ())), list(taught.get(kind, ()))
            if not theirs or not own or theirs == own:
                continue
            line = (
                f"DATASETS.TEST: data set '{name}' has other {KINDS[kind]} than the teacher "
                f"learnt: {difference(name, theirs, 'teacher', own)}"
            )
            if sorted(theirs) == sorted(own):
                raise ConfigError(line)
            logger.warning(line)


def difference(one: str, names: Sequence[str], other: str, others: Sequence[str]) -> str:
    """What two lists of names do not share, or their two orders, in one line."""
    if sorted(names) == sorted(others):
        orders = f"'{one}' has {short_list(names)}, '{other}' has {short_list(others)}"
        return f"the order differs, {orders}"
    only = [name for name in names if name not in others]
    only_other = [name for name in others if name not in names]
    return f"only '{one}' has {short_list(only)}, only '{other}' has {short_list(only_other)}"


def compare_with_teacher(
    cfg: CfgNode,
    theirs: Mapping[str, Sequence[str]],
    heads: Mapping[str, Iterable[str]],
    mapped: Iterable[str] = (),
) -> None:
    """Warn where the teacher's classes are not the data set's; refuse heads that compare them.

    Args:
        cfg: of the student, with KD.DATASETS registered.
        theirs: by kind (KINDS) the names that the teacher learnt; one that is missing is not known.
        heads: name of a head to the kinds whose predictions it compares one by one.
        mapped: kinds that KD.TEACHER.CLASS_MAP has matched.

    Raises:
        ConfigError: a head, and what differs.
    """
    data = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else {}
    predicted = kinds_of(cfg)
    for kind, what in KINDS.items():
        comparing = [name for name, kinds in heads.items() if kind in kinds]
        known, taught = list(data.get(kind, ())), list(theirs.get(kind, ()))
        if kind in mapped or (not comparing and kind not in predicted):
            continue
        if not known or not taught:
            if comparing and known:
                logger.warning(
                    f"{', '.join(comparing)}: the {what} of the teacher are not known (its "
                    "DATASETS.TRAIN is empty, or not to be found here): they have to be those of "
                    f"the data set, in this order: {short_list(known)}"
                )
            continue
        if known == taught:
            continue
        line = difference("teacher", taught, "student", known).replace("'", "")
        if comparing:
            raise ConfigError(
                f"KD.HEADS: {', '.join(comparing)} compares {what} one by one, and the teacher "
                f"learnt others than the student's data set has: {line}; match them by "
                "KD.TEACHER.CLASS_MAP, use heads on features, or, if the numbers mean the same, "
                "KD.TEACHER.OPTS with DATASETS.TRAIN () for the teacher"
            )
        copied = ""
        if cfg.KD.INIT_FROM_TEACHER:
            copied = "; what KD.INIT_FROM_TEACHER copies may predict others than it is trained on"
        logger.warning(
            f"The teacher's {what} differ from the data set's (heads on features do not mind): "
            f"{line}{copied}"
        )


def kinds_of(cfg: CfgNode) -> list[str]:
    """The kinds that a detector predicts."""
    arch = cfg.MODEL.META_ARCHITECTURE
    kinds = {class_names_of(arch)}
    if offers(arch, "sem_seg"):
        kinds.add("stuff_classes")
    if cfg.MODEL.KEYPOINT_ON:
        kinds.add("keypoint_names")
    return [kind for kind in KINDS if kind in kinds]


def short_list(names: Sequence[str], most: int = 8) -> str:
    """The first of them for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
