"""The one function that loads a config, and merging into it."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils.logger import log_first_n

from ..errors import ConfigError
from ..files import resolve_config
from .config_files import check_keys, check_override, read_yaml, written_out
from .config_paths import default_output
from .defaults import add_kd_config
from .lazy_files import LazyNode, attach, is_lazy_file, load_lazy, unread, with_floats
from .lazy_overrides import override, split_words
from .teachers import given_teachers, make_room, make_room_for_key


def load_config(
    config_file: str, opts: Sequence = (), source: str = "command line overrides"
) -> CN:
    """Load a YAML config, or a LazyConfig ``.py``, with this project's keys.

    The modules of KD.IMPORTS (from the file or from ``opts``) are imported first, so that they can
    register what the config names and add their own keys with :func:`register_config`.

    Args:
        config_file: path, or ``model_zoo://`` name of a detectron2 config.
        opts: ``["KEY", value, ...]`` overrides, as on the command line; of a LazyConfig also
            ``["key=value", ...]`` (:func:`~projects.kd.config.lazy_overrides.override`).
        source: where ``opts`` come from, for messages.

    Returns:
        An unfrozen config, a :class:`~projects.kd.config.lazy_files.LazyNode` of a LazyConfig.
        The default of OUTPUT_DIR is ``output/`` and the path of the config below ``configs/``.
        MODEL.DEVICE "cuda" becomes "cpu" on a machine without a GPU.

    Raises:
        ConfigError: file missing, not a mapping, unknown key, or wrong type of a value.
    """
    path = resolve_config(config_file)
    opts, lazy = list(opts), None
    if is_lazy_file(path):
        lazy, raw = load_lazy(path)
        pairs = split_words(opts, source)
        early = [x for key, value in pairs if key.upper() == "KD.IMPORTS" for x in (key, value)]
    elif len(opts) % 2:
        raise ConfigError(f"{source}: they come in pairs KEY VALUE, here is an odd number: {opts}")
    else:
        raw, early = read_yaml(path), opts
        if isinstance(raw.get("model"), dict) and "_target_" in raw["model"]:
            raise ConfigError(
                f"{path}: is the record of a run of a LazyConfig; give its .py file, with the "
                "overrides of then"
            )
    _import_modules(_early_imports(raw, early), path)
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.OUTPUT_DIR = default_output(path)
    if lazy is not None:
        raw = CN({"KD": with_floats(raw.KD, cfg.KD)})
    merge_config(cfg, raw, path)
    cfg = cfg if lazy is None else attach(cfg, lazy, path)
    merge_overrides(cfg, opts, source)
    if lazy is not None and cfg.KD.HEADS:
        told = "META_ARCHITECTURE" in raw.KD or "KD.META_ARCHITECTURE" in {
            x.upper() for x, _ in pairs
        }
        cfg.KD.META_ARCHITECTURE = cfg.KD.META_ARCHITECTURE if told else "DistillMetaArch"
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        log_first_n(logging.WARNING, "No GPU found: MODEL.DEVICE is cpu", name=__name__)
    if lazy is not None and (names := unread(cfg.lazy)):
        text = f"{path}: without effect, nothing here reads it: {', '.join(names)}"
        log_first_n(logging.WARNING, text, name=__name__, key="message")
    return cfg


def merge_config(cfg: CN, raw: CN, path: str) -> None:
    """Merge what :func:`read_yaml` gave; ConfigError names the file and the key."""
    if raw.get("VERSION", cfg.VERSION) != cfg.VERSION:
        raise ConfigError(f"{path}: VERSION {raw.VERSION} is not {cfg.VERSION}, rewrite its keys")
    raw = written_out(raw)
    make_room(cfg, given_teachers(raw), path)
    check_keys(raw, cfg, path)
    try:
        cfg.merge_from_other_cfg(raw)
    except (KeyError, ValueError, AssertionError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: {_message(error)}") from error


def merge_overrides(cfg: CN, opts: Sequence, source: str = "command line overrides") -> None:
    """Merge ``["KEY", value, ...]``; ConfigError names the source and the key."""
    opts = list(opts)
    pairs = list(zip(opts[::2], opts[1::2], strict=False))
    if isinstance(cfg, LazyNode):
        found = (override(cfg, *pair, source) for pair in split_words(opts, source))
        pairs = [pair for pair in found if pair is not None]
    for key, value in pairs:
        value = written_out(value)
        make_room_for_key(cfg, str(key), source)
        check_override(key, value, cfg, source)
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, ValueError, AssertionError, TypeError, AttributeError) as error:
            raise ConfigError(f"{source}: {_message(error)}") from error
        except (RecursionError, MemoryError) as error:
            raise ConfigError(f"{source}: {key}: the value is nested too deeply") from error


def _message(error: BaseException) -> str:
    return str(error.args[0]) if error.args else str(error)


def _early_imports(raw: CN, opts: Sequence) -> tuple[str, ...]:
    kd = raw.get("KD")
    value = kd.get("IMPORTS", ()) if isinstance(kd, dict) else ()
    value = dict(zip(opts[::2], opts[1::2], strict=True)).get("KD.IMPORTS", value)
    try:
        names = CN._decode_cfg_value(value)  # YAML reads a tuple as a string
    except (TypeError, RecursionError, MemoryError):
        names = None
    if not isinstance(names, (list, tuple)) or not all(_is_module(name) for name in names):
        raise ConfigError(f"KD.IMPORTS is {value}: write a tuple of modules, ('package.module',)")
    return tuple(names)


def _is_module(name) -> bool:
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))


def _import_modules(names: Sequence[str], path: str) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"KD.IMPORTS in {os.path.basename(path)}: cannot import '{name}' ({error}); "
                "its folder must be on PYTHONPATH"
            ) from error
