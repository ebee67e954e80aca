"""Imitation heads; importing this package registers them."""

from ..functional.ranks import mean_over_ranks
from . import (  # noqa: F401
    at,
    bckd,
    crosskd,
    csa,
    cwd,
    d3etr,
    dist,
    dkd,
    dsi,
    fgd,
    fgfi,
    icd,
    ifvd,
    ld,
    local,
    mgd,
    mimic,
    output_kd,
    pa,
    pi,
    pkd,
    review_kd,
    score_l2,
    sdf,
)
from .base import (
    IMITATION_HEAD_REGISTRY,
    ImitationHead,
    build_adapters,
    build_imitation_heads,
    choose_levels,
)

__all__ = [
    "IMITATION_HEAD_REGISTRY",
    "ImitationHead",
    "build_adapters",
    "build_imitation_heads",
    "choose_levels",
    "mean_over_ranks",
]
