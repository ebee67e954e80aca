"""Between student and teacher features: channels and grid sizes.

Shapes: N images, C channels, (H, W) cells of a level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .errors import ConfigError, require_one_of

ADAPTER_TYPES = ("auto", "none", "conv1x1", "conv3x3", "conv1x1_bn_relu")


def build_adapter(
    kind: str, student_channels: int, teacher_channels: int, key: str = "KD.ADAPTER.TYPE"
) -> nn.Module:
    """A module that maps (N, C_student, H, W) to (N, C_teacher, H, W).

    Except for "conv1x1_bn_relu", no norm or activation follows: FPN outputs are signed, and a ReLU
    would put half of the targets out of reach. Convolutions have torch's default initialisation.

    Args:
        kind: "none" (identity), "conv1x1", "conv3x3", "auto" (identity where the channels agree,
            else 1x1; ours), or "conv1x1_bn_relu": 1x1 without bias, BatchNorm and ReLU, for targets
            that end in a ReLU, such as decoders of segmentation heads. CWD's published code has it.
            Its statistics are those of each process's batch.
        student_channels, teacher_channels: C on both sides.
        key: the config key that gave ``kind``, for messages.

    Raises:
        ConfigError: unknown kind, or "none" with different channels.
    """
    require_one_of(key, kind, ADAPTER_TYPES)
    if kind == "auto":
        kind = "none" if student_channels == teacher_channels else "conv1x1"
    if kind == "none":
        if student_channels != teacher_channels:
            raise ConfigError(
                f"{key}: 'none' needs equal channels, the student has {student_channels} and "
                f"the teacher {teacher_channels}; use 'conv1x1'"
            )
        return nn.Identity()
    if kind == "conv1x1_bn_relu":
        convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(teacher_channels), nn.ReLU())
    size = int(kind[-1])
    return nn.Conv2d(student_channels, teacher_channels, size, padding=size // 2)


def align_spatial(
    teacher: torch.Tensor, student: torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Resize teacher features to the student's grid where the two differ.

    Args:
        teacher: (N, C, Ht, Wt).
        student: (N, C', H, W), only its size matters.
        valid: (N, 1, Ht, Wt) bool, the teacher's cells that lie inside its image; the others take
            no part in a mean, and the result is 0 where nothing else does. None = all cells.

    Returns:
        (N, C, H, W): ``teacher`` itself when the grids agree; the mean of each block of cells when
        the teacher's grid is a whole multiple; bilinear (half-pixel centres) otherwise (ours: the
        papers assume equal grids).
    """
    size, wanted = teacher.shape[-2:], student.shape[-2:]
    if size == wanted:
        return teacher
    if valid is None:
        return _resize(teacher, wanted)
    share = _resize(valid.to(teacher.dtype), wanted)
    return _resize(torch.where(valid, teacher, 0.0), wanted) / share.masked_fill(share == 0, 1.0)


def _resize(values: torch.Tensor, wanted: tuple[int, int]) -> torch.Tensor:
    size = values.shape[-2:]
    if size[0] % wanted[0] == 0 and size[1] % wanted[1] == 0:
        return F.avg_pool2d(values, (size[0] // wanted[0], size[1] // wanted[1]))
    return F.interpolate(values, size=wanted, mode="bilinear", align_corners=False)
