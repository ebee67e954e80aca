"""Imitation heads; importing this package registers them."""

from . import at, cwd, fgfi, icd, ifvd, local, mimic, pa, pi, pkd  # noqa: F401
from .base import (
    IMITATION_HEAD_REGISTRY,
    ImitationHead,
    build_adapters,
    build_imitation_heads,
    choose_levels,
    mean_over_ranks,
)

__all__ = [
    "IMITATION_HEAD_REGISTRY",
    "ImitationHead",
    "build_adapters",
    "build_imitation_heads",
    "choose_levels",
    "mean_over_ranks",
]
