"""Teachers from other libraries, by a scheme in KD.TEACHER.CONFIG_FILE.

Importing this registers ``torchvision://``, ``timm://`` and ``torchscript://``; others register
themselves with :func:`register_teacher`.
"""

from . import timm_teacher, torchscript, torchvision_teacher  # noqa: F401
from .base import (
    ForeignBackbone,
    ForeignDetector,
    TeacherRequest,
    build_foreign,
    foreign_scheme,
    register_teacher,
)

__all__ = [
    "ForeignBackbone",
    "ForeignDetector",
    "TeacherRequest",
    "build_foreign",
    "foreign_scheme",
    "register_teacher",
]
