"""Convolutions that torch computes wrongly in half precision on a CPU, computed in fp32.

torch 2.11 with oneDNN on a CPU that has instructions for bfloat16: a convolution with a stride
along the width whose output is one cell wide leaves parts of its output, and of its weight's
gradient where the input is one cell wide too, as they lay in memory. That is p7 of a small image,
for example. Found by comparing all small shapes with fp32; neither stride 1 nor a wider map shows
it. The transposed convolution has the same fault in the other direction.
"""

from __future__ import annotations

import functools

import torch
from timm.layers import CondConv2d
from torch import nn


class _FullPrecisionOnNarrowMaps:
    """Mixed into the class of a convolution by :func:`guard_narrow_maps`."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        half = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if not (half and _is_narrow(self, x.shape[-1])):
            return super().forward(x, *args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            result = super().forward(x.float(), *args, **kwargs)
        return result.to(torch.get_autocast_dtype("cpu"))


def guard_narrow_maps(model: nn.Module) -> nn.Module:
    """Let the strided convolutions of a model compute maps that are one cell wide in fp32.

    In place, and without effect on a GPU, without autocast, and on wider maps. Their classes
    become subclasses under the same name; parameters and their names stay. Convolutions that a
    model calls as functions are not reached.
    """
    for module in model.modules():
        strided = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, CondConv2d))
        if strided and module.stride[1] > 1:
            module.__class__ = _guarded(type(module))
    return model


@functools.cache
def _guarded(cls: type) -> type:
    if issubclass(cls, _FullPrecisionOnNarrowMaps):
        return cls
    return type(cls.__name__, (_FullPrecisionOnNarrowMaps, cls), {"__module__": cls.__module__})


def _is_narrow(conv: nn.Module, width: int) -> bool:
    if isinstance(conv, nn.ConvTranspose2d):
        return width == 1
    # timm's "same" convolutions pad by themselves: for them this says yes a little too often
    padding = conv.padding if isinstance(conv.padding, (tuple, list)) else (0, 0)
    reach = conv.dilation[1] * (conv.kernel_size[1] - 1) + 1
    return width + 2 * padding[1] - reach < conv.stride[1]
