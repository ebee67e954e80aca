"""Evaluation: data sets' evaluators, tiles, test-time augmentation; importing registers them."""

from . import quick, results_keys, visdrone_evaluator  # noqa: F401
from .detection_evaluator import DetectionEvaluator
from .evaluators import (
    build_evaluator,
    check_evaluation,
    evaluate,
    oks_sigmas,
    register_evaluator,
)

__all__ = [
    "DetectionEvaluator",
    "build_evaluator",
    "check_evaluation",
    "evaluate",
    "oks_sigmas",
    "register_evaluator",
]
