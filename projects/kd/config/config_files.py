"""YAML configs on disk: their ``_BASE_`` chain, and the mistakes that merging would let pass."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar

import yaml
from detectron2.config import CfgNode as CN

from ..errors import ConfigError, did_you_mean
from ..files import MODEL_ZOO_PREFIX, is_zoo_config, resolve_config
from ..moved_configs import moved
from .config_paths import resolve_relative
from .key_table import rule_of
from .yaml_files import check_yaml

# files that are being read: each is the base of the one before it
_CHAIN: ContextVar[tuple[str, ...]] = ContextVar("chain", default=())
BY_NAME = "by_name"


class ConfigFile(CN):
    """A YAML file whose ``_BASE_`` may be a ``model_zoo://`` name, read without running code.

    detectron2's Base-RetinaNet.yaml computes its anchor sizes with a Python tag. Such tags are
    obeyed only in the installed zoo's own files and in byte-identical copies of them.
    """

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        """As in fvcore; ConfigError for a chain of bases that comes back to itself."""
        if MODEL_ZOO_PREFIX in filename:  # a _BASE_ entry, joined to the folder of its file
            name = filename[filename.index(MODEL_ZOO_PREFIX) :]
            filename = resolve_config(name, "_BASE_")
        chain = _CHAIN.get()
        here = os.path.realpath(filename)
        if chain and "://" not in filename and not os.path.isfile(here):
            raise ConfigError(f"{chain[-1]}: _BASE_: no such file '{filename}'{moved(filename)}")
        if here in chain:
            raise ConfigError(
                f"{chain[-1]}: _BASE_ '{os.path.basename(filename)}' is based on this file itself: "
                f"{' -> '.join(os.path.basename(x) for x in (*chain, here))}"
            )
        log = logging.getLogger("fvcore.common.config")
        log.addFilter(_is_news)
        token = _CHAIN.set((*chain, here))
        try:
            raw = super().load_yaml_with_base(filename, allow_unsafe=is_zoo_config(filename))
            resolve_relative(raw, filename)
            return raw
        finally:
            _CHAIN.reset(token)
            log.removeFilter(_is_news)

    @classmethod
    def _open_cfg(cls, filename: str):
        with super()._open_cfg(filename) as file:
            text = file.read().removeprefix("\ufeff")
        check_yaml(text, filename)
        return io.StringIO(text)


def _is_news(record: logging.LogRecord) -> bool:
    return "unsafe_load" not in str(record.msg)  # only the zoo's own files get that far


def read_yaml(path: str) -> CN:
    """Read a YAML config with its ``_BASE_`` chain; ConfigError if that does not work."""
    try:
        return CN(ConfigFile.load_yaml_with_base(path))
    except ConfigError:
        raise
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(f"{path}: holds Python tags, write the values out: {error}") from error
    except (
        yaml.YAMLError,
        OSError,
        AttributeError,
        TypeError,
        AssertionError,
        ValueError,
        RecursionError,
    ) as error:
        raise ConfigError(f"{path}: cannot be read as a YAML config: {error}") from error


def check_keys(raw: CN, cfg: CN, path: str, prefix: str = "") -> None:
    """Compare what a file holds with the keys that there are.

    Args:
        raw: what :func:`read_yaml` gave.
        cfg: a config with all keys.
        path: the file, for messages.
        prefix: of the keys in ``raw``.

    Raises:
        ConfigError: an unknown key, a key without a value, or a value in place of a group.
    """
    for key, value in raw.items():
        full = f"{prefix}{key}"
        node = look_up(cfg, full, _MISSING)
        if node is _MISSING:
            if not cfg.key_is_deprecated(full) and not cfg.key_is_renamed(full):
                raise ConfigError(f"{path}: {unknown_key(cfg, full)}")
        elif value is None and not _may_be_none(full):
            raise ConfigError(f"{path}: {full} has no value; write one, or remove the line")
        elif isinstance(node, CN):
            if not isinstance(value, CN):
                raise ConfigError(f"{path}: {full} is {value!r}, but it is a group of keys")
            check_keys(value, cfg, path, f"{full}.")


def written_out(value):
    """ "by_name" is short for ["by_name"], in keys that hold a list (KD.TEACHER.CLASS_MAP)."""
    if isinstance(value, dict):
        return type(value)({k: written_out(x) if k != "OPTS" else x for k, x in value.items()})
    return [BY_NAME] if value == BY_NAME else value


def check_override(key, value, cfg: CN, source: str) -> None:
    """ConfigError for an override that names no key, or a group of keys, or has no value."""
    node = look_up(cfg, key, _MISSING) if isinstance(key, str) else _MISSING
    if node is _MISSING:
        raise ConfigError(f"{source}: {unknown_key(cfg, str(key))}")
    if isinstance(node, CN):
        raise ConfigError(f"{source}: {key} is a group of keys; set one of them")
    if (value is None or value == "None") and not _may_be_none(key):
        raise ConfigError(f"{source}: {key} has no value")


def _may_be_none(key: str) -> bool:
    """Whether None means something for a key: its rule takes it."""
    rule = rule_of(key)
    return rule is not None and rule.test(None)


def unknown_key(cfg: CN, key: str) -> str:
    """What to say of a key that does not exist: the nearest in its group, or in another one."""
    known = list(_all_keys(cfg))
    group, dot, last = key.rpartition(".")
    siblings = look_up(cfg, group, _MISSING) if dot else cfg
    elsewhere = [name for name in known if name.rpartition(".")[2] == last.upper()]
    if 0 < len(elsewhere) <= 3:
        hint = did_you_mean(key, elsewhere, cutoff=0.0)
    elif isinstance(siblings, CN):
        hint = did_you_mean(last, siblings, prefix=f"{group}{dot}")
    else:
        hint = did_you_mean(key, known, cutoff=0.7)
    if not hint and key.startswith(("KD.", "MODEL.")):
        hint = " (is the module that adds it in KD.IMPORTS?)"
    return f"unknown key {key}{hint}"


_MISSING = object()


def look_up(cfg: CN, key: str, default=None):
    """What stands at a dotted key, ``default`` where there is no such key."""
    node = cfg
    for part in key.split("."):
        if not isinstance(node, CN) or part not in node:
            return default
        node = node[part]
    return node


def _all_keys(cfg: CN, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield f"{prefix}{key}"
        if isinstance(value, CN):
            yield from _all_keys(value, f"{prefix}{key}.")
