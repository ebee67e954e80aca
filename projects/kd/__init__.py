"""Knowledge distillation for detectron2 detectors.

Importing this package registers the training wrapper, the imitation heads, detectors, backbones,
evaluators and the built-in data sets: each folder registers what it holds.
"""

from . import data, evaluation, modeling
from .check import check_config
from .config import add_kd_config, head_node, load_config, optimizer_node, register_config
from .context import DistillContext, ModelInfo
from .detectors import register_detector
from .distiller import DistillMetaArch, build_training_model, student_of
from .errors import ConfigError, DataError
from .foreign import ForeignBackbone, ForeignDetector, register_teacher
from .heads import IMITATION_HEAD_REGISTRY, ImitationHead, build_adapters
from .taps import TapSpec
from .teacher import Teacher
from .teacher_building import build_teacher

__all__ = [
    "IMITATION_HEAD_REGISTRY",
    "ConfigError",
    "DataError",
    "DistillContext",
    "DistillMetaArch",
    "ForeignBackbone",
    "ForeignDetector",
    "ImitationHead",
    "ModelInfo",
    "TapSpec",
    "Teacher",
    "add_kd_config",
    "build_adapters",
    "build_teacher",
    "build_training_model",
    "check_config",
    "data",
    "evaluation",
    "head_node",
    "load_config",
    "modeling",
    "optimizer_node",
    "register_config",
    "register_detector",
    "register_teacher",
    "student_of",
]
