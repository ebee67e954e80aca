"""Building a detector from a config: where detectron2 fails, one line with the key to change."""

from __future__ import annotations

import contextlib
import logging
import re
import sys

import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.modeling import build_model
from torch import nn
from torch.overrides import TorchFunctionMode

from .config import LazyNode, add_kd_config
from .config.key_checks import flat
from .errors import ConfigError, UserError
from .modeling.fcos import FCOS

# Packages whose exceptions, raised while a model is built, come from the config's values.
_KNOWN = {"detectron2", "fvcore", "iopath", "numpy", "PIL", "projects", "timm", "torch"}
_KNOWN |= {"torchvision", "yacs", "omegaconf"}


def build_detector(cfg: CfgNode, source: str = "") -> nn.Module:
    """``build_model(cfg)``, whose failures name the config key where that can be told.

    The model of a LazyConfig is instantiated as its file says.

    The table of values catches most; what is left are keys that do not fit each other. The model is
    built again on the meta device with one key at a time at its default: keys with which that
    works are named. Else it is a key whose value the exception quotes.

    Args:
        cfg: the detector's config.
        source: where the config comes from, put before the message.

    Raises:
        ConfigError: in place of exceptions of detectron2, torch and the like. Those of other
            packages (a detector of your own) keep their traceback.
    """
    lazy = isinstance(cfg, LazyNode)
    try:
        return _instantiated(cfg) if lazy else build_model(cfg)
    except UserError:
        raise
    except Exception as error:
        if not _from_known_packages(error):
            raise
        start = f"{source}: " if source else ""
        text = f"{type(error).__name__}: {error}"
        if lazy:
            start = start or f"{cfg.path}: "
            raise ConfigError(f"{start}model cannot be instantiated ({text})") from error
        raise ConfigError(f"{start}{_blamed(cfg, error)} cannot be built from ({text})") from error


def _instantiated(cfg: LazyNode) -> nn.Module:
    model = instantiate(cfg.lazy.model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"it gives a {type(model).__name__}, no torch module")
    if type(model) is FCOS.__base__:
        model.__class__ = FCOS  # the same, but its box loss is computed in float32 under autocast
    return model.to(cfg.MODEL.DEVICE)


class _RealTables(TorchFunctionMode):
    """Numbers that constructors read (drop path rates of ViT, Swin and MViT) stay real."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


@contextlib.contextmanager
def meta_device():
    """Inside, modules are built without memory, on the meta device."""
    with torch.device("meta"), _RealTables():
        yield


def _from_known_packages(error: BaseException) -> bool:
    trace = error.__traceback__.tb_next  # the first frame is ours
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _KNOWN and package not in sys.stdlib_module_names:
            return False
        trace = trace.tb_next
    return True


def _blamed(cfg: CfgNode, error: BaseException) -> str:
    """ "MODEL.A is 1 (2 would do): the model", as far as it can be told."""
    defaults = get_cfg()
    add_kd_config(defaults)
    defaults = dict(flat(defaults))
    own = {k: v for k, v in flat(cfg) if k.startswith("MODEL.") and v != defaults.get(k, v)}
    own.pop("MODEL.DEVICE", None)
    own.pop("MODEL.WEIGHTS", None)
    if not _builds(cfg):
        would = [k for k in own if _builds(_with(cfg, k, defaults[k]))]
        if would:
            parts = (f"{k} is {own[k]!r} ({defaults[k]!r} would do)" for k in would[:3])
            return f"{' or '.join(parts)}: the model"
    quoted = set(re.findall(r"'([^']+)'", str(error)))
    for key, value in own.items():
        if quoted & {str(x) for x in (value if isinstance(value, (list, tuple)) else [value])}:
            return f"{key} is {value!r}: the model"
    return f"MODEL: {cfg.MODEL.META_ARCHITECTURE}"


def _with(cfg: CfgNode, key: str, value) -> CfgNode:
    changed = cfg.clone()
    changed.defrost()
    *path, last = key.split(".")
    node = changed
    for part in path:
        node = node[part]
    node[last] = value
    return changed


def _builds(cfg: CfgNode) -> bool:
    cfg = _with(cfg, "MODEL.DEVICE", "meta")
    cfg.MODEL.TIMM.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED = "", False
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with meta_device():
            build_model(cfg)
    except Exception:
        return False
    finally:
        logging.disable(level)
    return True
