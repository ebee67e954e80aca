"""Imitation heads; importing this package registers them."""

from . import (  # noqa: F401
    at,
    csa,
    cwd,
    d3etr,
    fgfi,
    icd,
    ifvd,
    local,
    mimic,
    output_kd,
    pa,
    pi,
    pkd,
    sdf,
)
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
