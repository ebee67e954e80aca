"""Where imitation heads pull the student in one image: the gradient of their losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from ..context import DistillContext
from .hooks import floats_kept


def pulls(model: nn.Module, example: dict, iteration: int) -> dict[str, list[torch.Tensor]]:
    """Per head, the norm of its gradient in every cell of each map that it acts on.

    Args:
        model: the training wrapper in training mode.
        example: one image of the data set, with its annotations.
        iteration: that the heads are told; ICD reaches the student late.

    Returns:
        Head to (h, w) maps, finest first, cut to the cells inside the image. Maps without a
        gradient are left out; a head without any has an empty list.
    """
    found = {}
    with EventStorage(iteration):
        ctx, _ = model.observe([example])
        for name, head in model.heads.items():
            own = ctx.of_head(name)
            losses = [value for key, value in head(own).items() if key.startswith("loss_kd_")]
            maps = head.acts_on(own)
            gradients = [None] * len(maps)
            total = sum(losses)
            if losses and total.requires_grad:
                gradients = torch.autograd.grad(total, maps, retain_graph=True, allow_unused=True)
            norms = [g[0].float().norm(dim=0) for g in gradients if g is not None]
            norms.sort(key=torch.numel, reverse=True)
            found[name] = [inside(norm, ctx) for norm in norms if norm.any()]
    return found


def inside(norm: torch.Tensor, ctx: DistillContext) -> torch.Tensor:
    """The rows and columns of a map that lie in the image, not in its padding."""
    rows, columns = (
        -(-cells * side // full)  # rounded up
        for cells, side, full in zip(norm.shape, ctx.image_sizes[0], ctx.canvas, strict=True)
    )
    return norm[:rows, :columns]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, a training wrapper can be run on images that are not its own.

    Batch norms work by their running statistics. Afterwards buffers, loss normalisers, random
    numbers and modes are as before.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    # compiled losses would not be the same to the bit afterwards, see TrainLoop
    compiled = torch.jit.optimized_execution(device.type == "cuda")
    with floats_kept(model), torch.random.fork_rng(cuda), compiled:
        try:
            model.train()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for name, value in model.named_buffers():
                    value.copy_(buffers[name])


def heat_row(image: np.ndarray, maps: list[torch.Tensor], height: int = 160) -> np.ndarray:
    """An image and beside it the maps of a head over its grey copy, brightest at their largest.

    Args:
        image: (H, W, 3) RGB, 0..255.
        maps: (h, w), from 0 on.
        height: of the row in pixels.

    Returns:
        (height, columns, 3) uint8, RGB.
    """
    width = max(round(image.shape[1] * height / image.shape[0]), 1)
    shown = cv2.resize(image.astype(np.uint8), (width, height), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    top = max((cells.max().item() for cells in maps), default=1.0)
    row = [shown]
    for cells in maps:
        heat = (255 * cells / top).round().byte().cpu().numpy()
        heat = cv2.resize(heat, (width, height), interpolation=cv2.INTER_NEAREST)
        heat = cv2.applyColorMap(heat, cv2.COLORMAP_INFERNO)[..., ::-1]
        row.append(cv2.addWeighted(grey, 0.25, np.ascontiguousarray(heat), 0.75, 0))
    return np.concatenate(row, axis=1)
