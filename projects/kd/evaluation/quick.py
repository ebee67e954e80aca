"""Options that make a detector faster in use, without changing its file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from torch import nn

from ..config import register_config
from ..fusing import fuse_batch_norms

# what is computed in another precision, as far as a detector has it; a list counts as its members
_NETWORKS = (
    *("backbone", "head", "proposal_generator.rpn_head", "roi_heads.box_head", "sem_seg_head"),
    "transformer.encoder",
)


@register_config
def add_quick_config(cfg: CfgNode) -> None:
    """Add TEST.QUICK."""
    cfg.TEST.QUICK = quick = CfgNode()
    # For --eval-only, the demo and the benchmark of the deployed student. True: batch norms become
    # part of the convolutions before them.
    quick.FUSE_BN = False
    # True: weights and maps in the order of channels_last.
    quick.CHANNELS_LAST = False
    # "bfloat16" or "float16": backbone and heads by autocast. Boxes, scores and suppression stay
    # in "float32".
    quick.DTYPE = "float32"


def quicken(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Change a detector in evaluation as TEST.QUICK says; returns it.

    Its weights are not those of its file afterwards: it is to be used, not saved.
    """
    quick = cfg.TEST.QUICK
    if quick.FUSE_BN:
        fuse_batch_norms(model)
    if quick.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    if quick.DTYPE != "float32":
        for name in _NETWORKS:
            for network in _found(model, name):
                _run_in(network, getattr(torch, quick.DTYPE))
    return model


def _found(model: nn.Module, name: str) -> list[nn.Module]:
    for part in name.split("."):
        model = getattr(model, part, None)
    if model is None:
        return []
    return list(model) if isinstance(model, nn.ModuleList) else [model]


def _run_in(network: nn.Module, dtype: torch.dtype) -> None:
    forward = network.forward

    def lower(*args, **kwargs):
        device = next(network.parameters()).device.type
        with torch.autocast(device, dtype):
            return _single(forward(*args, **kwargs))

    network.forward = lower


def _single(value):
    """Floating tensors in single precision, in whatever holds them."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _single(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_single(x) for x in value)
    return value
