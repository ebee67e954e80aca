"""The detector that MODEL.WEIGHTS holds, as evaluation and the demo use it."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from ..building import build_detector
from ..errors import ConfigError
from ..evaluation.quick import quicken
from ..weights.loading import load_detector
from .formats import is_exported
from .runtime import ExportedDetector


def trained_detector(cfg: CfgNode) -> nn.Module:
    """The plain student with all of its weights, in evaluation mode.

    Raises:
        ConfigError: MODEL.WEIGHTS is empty, or lacks a parameter of this config's student.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty: name the student's checkpoint")
    model = build_detector(cfg).eval()
    missing = load_detector(model, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", cfg.KD.ALLOW_PICKLE)
    if missing:
        raise ConfigError(
            f"MODEL.WEIGHTS: '{cfg.MODEL.WEIGHTS}' lacks {len(missing)} of the student's "
            f"parameters: {', '.join(missing)}"
        )
    return model


def exported_detector(cfg: CfgNode) -> ExportedDetector:
    """The exported detector that MODEL.WEIGHTS names.

    Raises:
        ConfigError: not one of this config's meta-arch, TEST.AUG, or TEST.QUICK; and what
            :meth:`ExportedDetector.load` raises.
    """
    if cfg.TEST.AUG.ENABLED:
        raise ConfigError(
            "TEST.AUG.ENABLED: an exported detector has no augmentation, set it False"
        )
    for key, value in cfg.TEST.QUICK.items():
        if value not in (False, "float32"):
            raise ConfigError(
                f"TEST.QUICK.{key}: an exported detector stays as it is; leave this key out"
            )
    detector = ExportedDetector.load(cfg.MODEL.WEIGHTS)
    if detector.facts["detector"] != cfg.MODEL.META_ARCHITECTURE:
        raise ConfigError(
            f"MODEL.WEIGHTS: '{cfg.MODEL.WEIGHTS}' is an exported {detector.facts['detector']}, "
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}"
        )
    return detector


def used_detector(cfg: CfgNode) -> nn.Module:
    """An exported detector, or the student with the options of TEST.QUICK."""
    if is_exported(cfg.MODEL.WEIGHTS):
        return exported_detector(cfg)
    return quicken(cfg, trained_detector(cfg))
