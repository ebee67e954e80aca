"""Convolutions that torch computes wrongly or slowly in half precision on a CPU, computed in fp32.

Wrongly: torch 2.11 with oneDNN on a CPU that has instructions for bfloat16: a convolution with a
stride along the width whose output is one cell wide leaves parts of its output, and of its weight's
gradient where the input is one cell wide too, as they lay in memory. That is p7 of a small image,
for example. Found by comparing all small shapes with fp32; neither stride 1 nor a wider map shows
it. The transposed convolution has the same fault in the other direction.

Slowly: depthwise convolutions with a stride or a kernel of more than 3 cells, of which the
MobileNets are full. In bfloat16 they take from two to eight times as long as in fp32, and a whole
mobilenetv3_small longer than in fp32; ordinary ones, and those of 3 cells at stride 1, do not.
"""

from __future__ import annotations

import functools

import torch
from timm.layers import CondConv2d
from torch import nn


class _InFullPrecision:
    """Mixed into the class of a convolution by :func:`use_full_precision`."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        half = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if not (half and (_is_slow(self) or _is_narrow(self, x.shape[-1]))):
            return super().forward(x, *args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            result = super().forward(x.float(), *args, **kwargs)
        return result.to(torch.get_autocast_dtype("cpu"))


def use_full_precision(model: nn.Module) -> nn.Module:
    """Let the convolutions of a model that half precision spoils or slows down on a CPU be in fp32.

    In place, and without effect on a GPU and without autocast; the result has autocast's type.
    Their classes become subclasses under the same name; parameters and their names stay.
    Convolutions that a model calls as functions are not reached.
    """
    for module in model.modules():
        known = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, CondConv2d))
        if known and (module.stride[1] > 1 or _is_slow(module)):
            module.__class__ = _guarded(type(module))
    return model


@functools.cache
def _guarded(cls: type) -> type:
    if issubclass(cls, _InFullPrecision):
        return cls
    return type(cls.__name__, (_InFullPrecision, cls), {"__module__": cls.__module__})


def _is_slow(conv: nn.Module) -> bool:
    depthwise = isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels > 1
    return depthwise and (max(conv.stride) > 1 or max(conv.kernel_size) > 3)


def _is_narrow(conv: nn.Module, width: int) -> bool:
    if isinstance(conv, nn.ConvTranspose2d):
        return width == 1
    # timm's "same" convolutions pad by themselves: for them this says yes a little too often
    padding = conv.padding if isinstance(conv.padding, (tuple, list)) else (0, 0)
    reach = conv.dilation[1] * (conv.kernel_size[1] - 1) + 1
    return width + 2 * padding[1] - reach < conv.stride[1]
