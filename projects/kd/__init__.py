"""Knowledge distillation for detectron2 detectors.

Importing this package registers the training wrapper, the imitation heads, the timm backbones,
Conditional DETR and the built-in data sets.
"""

from . import detectors  # noqa: F401
from . import evaluation as _evaluation  # noqa: F401
from .check import check_config
from .config import add_kd_config, head_node, load_config, register_config
from .context import DistillContext, ModelInfo
from .data import detr_augmentation as _detr_augmentation  # noqa: F401
from .data import register as _register  # noqa: F401
from .distiller import DistillMetaArch, build_training_model, student_of
from .errors import ConfigError, DataError
from .heads import IMITATION_HEAD_REGISTRY, ImitationHead, build_adapters
from .modeling import conditional_detr as _conditional_detr  # noqa: F401
from .modeling import dilated as _dilated  # noqa: F401
from .modeling import fcos as _fcos  # noqa: F401
from .modeling import gfl as _gfl  # noqa: F401
from .modeling import pspnet as _pspnet  # noqa: F401
from .modeling import pyramids as _pyramids  # noqa: F401
from .modeling import reppoints as _reppoints  # noqa: F401
from .modeling import timm_fpn as _timm_fpn  # noqa: F401
from .taps import TapSpec, register_class_key, register_pseudo_anchors, register_taps
from .teacher import Teacher, build_teacher

__all__ = [
    "IMITATION_HEAD_REGISTRY",
    "ConfigError",
    "DataError",
    "DistillContext",
    "DistillMetaArch",
    "ImitationHead",
    "ModelInfo",
    "TapSpec",
    "Teacher",
    "add_kd_config",
    "build_adapters",
    "build_teacher",
    "build_training_model",
    "check_config",
    "head_node",
    "load_config",
    "register_class_key",
    "register_config",
    "register_pseudo_anchors",
    "register_taps",
    "student_of",
]
