"""Losses in at least fp32, whatever the type of the features and the surrounding autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

HALF = (torch.float16, torch.bfloat16)


def _promote(value):
    is_half = isinstance(value, torch.Tensor) and value.dtype in HALF
    return value.float() if is_half else value


def full_precision(function: Callable) -> Callable:
    """Decorator: half-precision tensor arguments become fp32, and autocast is off inside.

    The first argument must be a tensor; float64 stays float64 (gradient checks).
    """

    @functools.wraps(function)
    def run(first: torch.Tensor, *args, **kwargs):
        with torch.autocast(first.device.type, enabled=False):
            args = [_promote(value) for value in args]
            kwargs = {key: _promote(value) for key, value in kwargs.items()}
            return function(_promote(first), *args, **kwargs)

    return run


def full_pair(student: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in fp32, or in float64 where the student's tensor is; the target without gradient."""
    target = target.detach()
    if student.dtype is not torch.float64:
        return student.float(), target.float()
    return student, target
