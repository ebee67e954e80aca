"""Config keys and their checks: what a config holds, how files are read, what each key takes."""

from detectron2.config import get_cfg

from .defaults import (
    DTYPES,
    INHERIT,
    PROPORTIONAL,
    add_kd_config,
    head_node,
    load_config,
    merge_config,
    merge_overrides,
    optimizer_node,
    register_config,
)

__all__ = [
    "DTYPES",
    "INHERIT",
    "PROPORTIONAL",
    "add_kd_config",
    "get_cfg",
    "head_node",
    "load_config",
    "merge_config",
    "merge_overrides",
    "optimizer_node",
    "register_config",
]
