"""KD.TEACHERS: several teachers, each a node of what differs for it from the keys of KD.

A node may hold the keys of KD.TEACHER, WEIGHT, those in OF_KD, and nodes of heads; what it does not
say is as in KD::

    KD:
      HEADS: ("PKD",)
      TEACHERS:
        CNN: {CONFIG_FILE: "a.yaml", WEIGHTS: "a.pth", WEIGHT: 0.5}
        VIT: {CONFIG_FILE: "b.yaml", HEADS: [CWD, PKD], PKD: {LEVELS: [p4]}}

All that works with one teacher gets the config of one (:func:`config_of`).
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Mapping

from detectron2.config import CfgNode as CN

from ..errors import ConfigError, UserError, did_you_mean

GROUP = "KD.TEACHERS"
# keys of KD that a teacher may have a value of its own for
OF_KD = (
    "HEADS",
    "LEVELS",
    "LEVEL_MAP",
    "START_ITER",
    "WARMUP_ITERS",
    "END_ITER",
    "INIT_FROM_TEACHER",
)
_BETWEEN = "-"  # of a teacher's name and a head's, in names of modules; stands in neither


def teacher_names(cfg: CN) -> list[str]:
    """Those of KD.TEACHERS in alphabetical order; [""] = the one of KD.TEACHER."""
    return sorted(cfg.KD.TEACHERS) or [""]


def config_of(cfg: CN, name: str) -> CN:
    """The config as it would be with this teacher alone, in KD.TEACHER.

    Args:
        cfg: the student's.
        name: one of :func:`teacher_names`; "" gives ``cfg`` itself.
    """
    if not name:
        return cfg
    own = cfg.clone()
    own.defrost()
    given, own.KD.TEACHERS = own.KD.TEACHERS[name], CN()
    own.KD.INIT_FROM_TEACHER = ()
    for key, value in given.items():
        if key in own.KD.TEACHER:
            own.KD.TEACHER[key] = value
        elif isinstance(value, CN):
            _put(own.KD[key], value)
        elif key != "WEIGHT":
            own.KD[key] = value
    if cfg.is_frozen():
        own.freeze()
    return own


def _put(node: CN, values: CN) -> None:
    for key, value in values.items():
        if isinstance(value, CN):
            _put(node[key], value)
        else:
            node[key] = value


def weight_of(cfg: CN, name: str) -> float:
    """The factor of all ``loss_kd_*`` of a teacher's heads."""
    return float(cfg.KD.TEACHERS[name].get("WEIGHT", 1.0)) if name else 1.0


def module_name(teacher: str, head: str) -> str:
    """Of a head among the modules that are trained and saved."""
    return f"{teacher}{_BETWEEN}{head}" if teacher else head


def key_of_head(module: str) -> str:
    """The config key of a head, by its :func:`module_name`."""
    teacher, between, head = module.rpartition(_BETWEEN)
    return f"{GROUP}.{teacher}.{head.upper()}" if between else f"KD.{head.upper()}"


def config_of_head(cfg: CN, module: str) -> tuple[CN, str]:
    """The config of a head's teacher, and its registered name."""
    teacher, _, head = module.rpartition(_BETWEEN)
    return config_of(cfg, teacher), head


def input_scales(cfg: CN) -> dict[str, float]:
    """KD.TEACHER.INPUT_SCALE of every teacher, by its name."""
    return {x: config_of(cfg, x).KD.TEACHER.INPUT_SCALE for x in teacher_names(cfg)}


def image_scale(cfg: CN) -> float:
    """The scale of ``image_teacher``; 1 where all teachers see the student's images.

    Raises:
        ConfigError: two teachers with other scales than 1, and than each other.
    """
    others = {name: scale for name, scale in input_scales(cfg).items() if scale != 1}
    if len(set(others.values())) > 1:
        shown = ", ".join(f"{GROUP}.{name}: {scale:g}" for name, scale in others.items())
        raise ConfigError(
            f"INPUT_SCALE: images are loaded at one size beside the student's, here are {shown}"
        )
    return next(iter(others.values()), 1.0)


@contextlib.contextmanager
def told_of(name: str):
    """Errors inside name the teacher's own keys in place of KD.TEACHER's."""
    try:
        yield
    except UserError as error:
        if not name or f"{GROUP}.{name}" in str(error):
            raise
        line = str(error).replace("KD.TEACHER.", f"{GROUP}.{name}.")
        start = "" if f"{GROUP}.{name}" in line else f"{GROUP}.{name}: "
        raise type(error)(f"{start}{line}") from error


# --- merging -------------------------------------------------------------------------------------


def given_teachers(raw: Mapping) -> Mapping:
    """What a file says of KD.TEACHERS; {} where it is no group of keys."""
    kd = raw.get("KD")
    given = kd.get("TEACHERS") if isinstance(kd, Mapping) else None
    return given if isinstance(given, Mapping) else {}


def make_room(cfg: CN, given: Mapping, source: str) -> None:
    """Add nodes and keys of KD.TEACHERS with their defaults, so that values can be merged there.

    Args:
        cfg: with all other keys.
        given: name of a teacher to what a file or an override says of it.
        source: the file, for messages.

    Raises:
        ConfigError: a name that is no word, or a key that a teacher does not have.
    """
    known = _keys(cfg)
    for name, node in given.items():
        where = f"{source}: {GROUP}.{name}"
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ConfigError(f"{where}: a teacher's name is a word of letters, digits and _")
        same = [x for x in cfg.KD.TEACHERS if x.lower() == name.lower() and x != name]
        if same:
            raise ConfigError(f"{where}: {same[0]} has this name already (losses are lower case)")
        if not isinstance(node, Mapping):
            raise ConfigError(f"{where} is {node!r}, but it is a group of keys")
        _make_room(cfg.KD.TEACHERS.setdefault(name, CN()), node, known, where)


def _make_room(node: CN, given: Mapping, known: CN, where: str) -> None:
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key}{did_you_mean(key, known)}")
        if not isinstance(known[key], CN):
            node.setdefault(key, copy.deepcopy(known[key]))
        elif not isinstance(value, Mapping):
            raise ConfigError(f"{where}.{key} is {value!r}, but it is a group of keys")
        else:
            _make_room(node.setdefault(key, CN()), value, known[key], f"{where}.{key}")


def _keys(cfg: CN) -> CN:
    """What a teacher's node may hold, with the values that it has without."""
    known = CN({**cfg.KD.TEACHER, "WEIGHT": 1.0})
    for key, value in cfg.KD.items():
        if key in OF_KD or (isinstance(value, CN) and "MASK_PADDING" in value):
            known[key] = value
    return known


def make_room_for_key(cfg: CN, key: str, source: str) -> None:
    """:func:`make_room` for an override of one key, e.g. KD.TEACHERS.CNN.PKD.WEIGHT."""
    if not key.startswith(f"{GROUP}."):
        return
    name, *parts = key[len(GROUP) + 1 :].split(".")
    if parts:
        given: object = None
        for part in reversed(parts):
            given = {part: given}
        make_room(cfg, {name: given}, source)


def common_key(key: str) -> str:
    """The key that has the same meaning without KD.TEACHERS; others stay."""
    if not key.startswith(f"{GROUP}."):
        return key
    _, dot, rest = key[len(GROUP) + 1 :].partition(".")
    if not dot or rest == "WEIGHT":
        return key
    return f"KD.{rest}" if rest in OF_KD or "." in rest else f"KD.TEACHER.{rest}"
