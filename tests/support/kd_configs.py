"""The configs of this repository, each read once in a process."""

from __future__ import annotations

import functools
from pathlib import Path

from detectron2.config import CfgNode

from projects.kd import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def load(name: str) -> CfgNode:
    """A copy of a config by its path below ``configs/`` or its ``model_zoo://`` name."""
    return _read(name).clone()


@functools.cache
def _read(name: str) -> CfgNode:
    return load_config(name if "://" in name else str(CONFIGS / name))
