"""Config keys and their checks: what a config holds, how files are read, what each key takes."""

from detectron2.config import get_cfg

from .defaults import (
    DTYPES,
    INHERIT,
    PROPORTIONAL,
    add_kd_config,
    head_node,
    optimizer_node,
    register_config,
)
from .lazy_files import LazyNode, lazy_of
from .loading import load_config, merge_config, merge_overrides

__all__ = [
    "DTYPES",
    "INHERIT",
    "LazyNode",
    "PROPORTIONAL",
    "add_kd_config",
    "get_cfg",
    "head_node",
    "lazy_of",
    "load_config",
    "merge_config",
    "merge_overrides",
    "optimizer_node",
    "register_config",
]
