"""Building a detector from a config: where detectron2 fails, one line with the key to change."""

from __future__ import annotations

import logging
import re
import sys

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from .config import add_kd_config
from .config.key_checks import flat
from .errors import ConfigError, UserError

# Packages whose exceptions, raised while a model is built, come from the config's values.
_KNOWN = {"detectron2", "fvcore", "iopath", "numpy", "PIL", "projects", "timm", "torch"}
_KNOWN |= {"torchvision", "yacs"}


def build_detector(cfg: CfgNode, source: str = "") -> nn.Module:
    """``build_model(cfg)``, whose failures name the config key where that can be told.

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
    try:
        return build_model(cfg)
    except UserError:
        raise
    except Exception as error:
        if not _from_known_packages(error):
            raise
        start = f"{source}: " if source else ""
        text = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{start}{_blamed(cfg, error)} cannot be built from ({text})") from error


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
        with torch.device("meta"):
            build_model(cfg)
    except Exception:
        return False
    finally:
        logging.disable(level)
    return True
