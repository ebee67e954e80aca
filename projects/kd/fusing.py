"""Batch norms of a detector in evaluation, put into the convolutions before them."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.ops.misc import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

_FROZEN = (FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d, FrozenBatchNormAct2d)
# what timm's norms do after normalising
_AFTER = ("drop", "act")


def fuse_batch_norms(model: nn.Module) -> int:
    """Put batch norms into the convolutions whose output they take, in place.

    Exact but for rounding: ``norm(conv(x))`` is one convolution in evaluation. The factors are
    computed in float64. For a detector that is only used: its state dict has other names and
    values afterwards, and fused parameters take no gradient.

    Norms of detectron2's convolutions are found by their attribute. In ``model.backbone`` one small
    image shows which other norm takes the output of which convolution (timm's models). A norm stays
    where its convolution has another output as well, or several norms (one a level, in the heads of
    one-stage detectors).

    Args:
        model: in evaluation mode, on any device; a detector, or any module.

    Returns:
        How many norms are gone.

    Raises:
        ValueError: a norm still follows its batches: the model is in training mode.
    """
    number = 0
    for module in model.modules():
        if isinstance(module, Conv2d) and is_batch_norm(module.norm):
            _fuse(module, module.norm)
            module.norm = None
            number += 1
    backbone = getattr(model, "backbone", None)
    if backbone is None or not any(map(is_batch_norm, backbone.modules())):
        return number
    names = {module: name for name, module in backbone.named_modules()}
    for norm, conv in _pairs(backbone).items():
        _fuse(conv, norm)
        rest = [getattr(norm, name) for name in _AFTER if hasattr(norm, name)]
        parent, _, leaf = names[norm].rpartition(".")
        setattr(backbone.get_submodule(parent), leaf, nn.Sequential(*rest))
        number += 1
    return number


def is_batch_norm(module) -> bool:
    """Whether a module is a batch norm with statistics, of torch, detectron2 or timm."""
    if isinstance(module, _FROZEN):
        return True
    known = isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))
    return known and module.running_mean is not None


def _fuse(conv: nn.Conv2d, norm: nn.Module) -> None:
    if norm.training and not isinstance(norm, _FROZEN):
        raise ValueError("batch norms can be fused in evaluation mode only")
    weight, bias, mean, variance = (
        None if x is None else x.detach().double()
        for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    factor = (variance + norm.eps).rsqrt() * (1.0 if weight is None else weight)
    own = 0.0 if conv.bias is None else conv.bias.detach().double()
    shift = (own - mean) * factor + (0.0 if bias is None else bias)
    kernel = conv.weight.detach().double() * factor.view(-1, 1, 1, 1)
    for name, value in (("weight", kernel), ("bias", shift)):
        value = value.to(conv.weight.dtype)
        setattr(conv, name, nn.Parameter(value, requires_grad=False))


class _Uses(TorchFunctionMode):
    """Counts the operations that read each output of a convolution."""

    def __init__(self):
        super().__init__()
        self.of: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}  # the tensor is kept, so its id is
        self.count: Counter = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, (torch.Tensor, tuple, list)):
            read = (x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor))
            self.count.update(id(x) for x in read if id(x) in self.of)
        return result


@torch.no_grad()
def _pairs(backbone: nn.Module) -> dict[nn.Module, nn.Conv2d]:
    """Norm to convolution where the norm alone reads what the convolution gives, in every call."""
    uses, taken = _Uses(), defaultdict(list)

    def after(conv, _, output):
        uses.of[id(output)] = conv, output

    def before(norm, inputs):
        conv, _ = uses.of.get(id(inputs[0]), (None, None))
        taken[norm].append(conv)

    handles = []
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after))
        elif is_batch_norm(module):
            handles.append(module.register_forward_pre_hook(before))
    parameter = next(backbone.parameters())
    try:
        with uses:
            backbone(torch.zeros(1, 3, 64, 64, dtype=parameter.dtype, device=parameter.device))
    finally:
        for handle in handles:
            handle.remove()
    calls = Counter(conv for conv, _ in uses.of.values())
    shared = {conv for key, (conv, _) in uses.of.items() if uses.count[key] != 1}
    return {
        norm: convs[0]
        for norm, convs in taken.items()
        if set(convs) == {convs[0]} and calls[convs[0]] == len(convs) and convs[0] not in shared
    }
