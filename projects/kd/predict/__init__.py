"""What a detector offers to heads on predictions (detectron2's own: see ``modeling/stock.py``)."""

from .base import (
    AnchorMatch,
    DensePair,
    Pairs,
    Predictor,
    RegionPair,
    call_constant,
    predictor_for,
    with_modules,
)
from .outputs import DenseOutputs, dense_tap

__all__ = [
    "AnchorMatch",
    "DenseOutputs",
    "DensePair",
    "Pairs",
    "Predictor",
    "RegionPair",
    "call_constant",
    "dense_tap",
    "predictor_for",
    "with_modules",
]
