"""Overrides of a LazyConfig: detectron2's KEY=VALUE, and keys of this project that act on it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from detectron2.config import CfgNode as CN
from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError, did_you_mean, one_line
from .config_files import look_up
from .lazy_files import ACTING, ALIASES, LISTS, LazyNode, plain, project, select


def split_words(words: Sequence, source: str) -> list[tuple[str, object]]:
    """Overrides as (key, value): KEY=VALUE in one word, or KEY VALUE in two.

    Raises:
        ConfigError: a key without a value.
    """
    found, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if isinstance(word, str) and "=" in word:
            key, _, value = word.partition("=")
            found.append((key, value))
        elif rest:
            found.append((str(word), rest.pop(0)))
        else:
            raise ConfigError(f"{source}: {word} has no value: write {word}=VALUE")
    return found


def override_file(cfg: LazyNode, key: str, value, source: str, as_text: bool = True) -> None:
    """Set a place of the file by its path, as detectron2's KEY=VALUE does.

    Args:
        cfg: changed in place, with the keys that are read from there.
        key: e.g. "train.max_iter".
        value: text in Hydra's grammar, or a value.
        source: where it comes from, for the message.
        as_text: False = text is a value as it is.

    Raises:
        ConfigError: a path that leads nowhere, or a value that cannot be read.
    """
    top, *_ = parts = key.split(".")
    above = ".".join(parts[:-1])
    if top not in cfg.lazy or (top != "train" and select(cfg.lazy, above) is None):
        raise ConfigError(
            f"{source}: the LazyConfig {cfg.path} has no '{above or top}'; at its top it has "
            f"{', '.join(map(str, cfg.lazy))} and kd{did_you_mean(top, [*cfg.lazy, 'kd'])}"
        )
    lazy = copy.deepcopy(cfg.lazy)
    try:
        if isinstance(value, str) and as_text:
            LazyConfig.apply_overrides(lazy, [f"{key}={value}"])
        else:
            OmegaConf.update(lazy, key, value, merge=True)
    except Exception as error:
        raise ConfigError(f"{source}: {key}={value}: {one_line(error)}") from error
    before, vars(cfg)["lazy"] = cfg.lazy, lazy
    project(cfg, before)


def override(cfg: LazyNode, key: str, value, source: str) -> tuple[str, object] | None:
    """Apply an override to the file's parts, or say which key of this project it sets.

    Args:
        cfg: changed in place.
        key: a place in the file (``train.max_iter``), a setting of its ``kd`` (``kd.cwd.weight``),
            or a key of this project (``KD.CWD.WEIGHT``, ``SOLVER.MAX_ITER``).
        value: text or a value.
        source: where it comes from, for messages.

    Returns:
        The key of this project and the value for yacs, None where the file's parts took it.

    Raises:
        ConfigError: a key that has no effect on a LazyConfig.
    """
    if key.startswith("kd."):
        value, old = _hydra_value(key, value, source), look_up(cfg, key.upper())
        return key.upper(), float(value) if isinstance(old, float) and type(value) is int else value
    if key in ALIASES:
        value = CN._decode_cfg_value(value)
        if key in LISTS and isinstance(value, (list, tuple)):
            # an evaluator takes one name
            value = list(value) if len(value) != 1 else value[0]
        value = list(value) if isinstance(value, tuple) else value
        override_file(cfg, ALIASES[key], value, source, as_text=False)
        return None
    if key.startswith("KD.") or any(key == name or key.startswith(f"{name}.") for name in ACTING):
        return key, value
    if key.partition(".")[0] in cfg:
        raise ConfigError(
            f"{source}: {key} has no effect on the LazyConfig {cfg.path}: change the file, or "
            "write PLACE=VALUE of it, e.g. optimizer.lr=0.01"
        )
    override_file(cfg, key, value, source)
    return None


def _hydra_value(key: str, value, source: str):
    if not isinstance(value, str):
        return value
    try:
        scratch = LazyConfig.apply_overrides(DictConfig({}), [f"{key}={value}"])
    except Exception as error:
        raise ConfigError(f"{source}: {key}={value}: {one_line(error)}") from error
    return plain(OmegaConf.select(scratch, key))
