"""Inheriting: the student starts from the teacher's neck and heads (ICD, section 4; also FGD, MGD).

A gain that comes on top of any distillation loss, so result tables show it on rows of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..errors import ConfigError

logger = logging.getLogger(__name__)


class Inherited(NamedTuple):
    """What :func:`inherit` did.

    Attributes:
        copied: names of the copied parameters and buffers.
        skipped: name to the reason why it keeps its own values.
    """

    copied: list[str]
    skipped: dict[str, str]


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module, prefixes: Sequence[str]) -> Inherited:
    """Copy the teacher's state into the student where name and shape agree.

    The released code of ICD copies all of a neck or head, or fails: students with a backbone of
    other widths (ResNet-18, MobileNet) have other lateral convolutions. Here the shape of each
    entry decides (ours).

    Args:
        student: changed in place.
        teacher: a detector, on any device.
        prefixes: KD.INIT_FROM_TEACHER: beginnings of names in the student's state dict, e.g.
            ``backbone.fpn_``, ``backbone.top_block.``, ``head.``, ``proposal_generator.``,
            ``roi_heads.``.

    Returns:
        The names, which are logged as well.

    Raises:
        ConfigError: a prefix that no name of the student has, or nothing to copy at all.
    """
    own, other = student.state_dict(), teacher.state_dict()
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in own):
            modules = sorted({".".join(name.split(".")[:2]) for name in own})
            raise ConfigError(
                f"KD.INIT_FROM_TEACHER: nothing in the student begins with '{prefix}'; it has "
                f"{', '.join(modules)}"
            )
    copied: list[str] = []
    skipped: dict[str, str] = {}
    for name, value in own.items():
        if not name.startswith(tuple(prefixes)):
            continue
        if name not in other:
            skipped[name] = "the teacher has none"
        elif other[name].shape != value.shape:
            shapes = (tuple(value.shape), tuple(other[name].shape))
            skipped[name] = "student {}, teacher {}".format(*shapes)
        else:
            value.copy_(other[name])
            copied.append(name)
    if not copied:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ConfigError(
            f"KD.INIT_FROM_TEACHER: nothing can be copied from the teacher: {reasons}"
        )
    logger.info("Copied from the teacher (%d): %s", len(copied), ", ".join(copied))
    if skipped:
        lines = ", ".join(f"{name} ({reason})" for name, reason in skipped.items())
        logger.info("Not copied from the teacher (%d): %s", len(skipped), lines)
    return Inherited(copied, skipped)
