"""Files of the plain student for others: model_best.pth and copies as safetensors."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..errors import ConfigError, disk_fault
from ..files import replacing

BEST = "model_best"


def write_best(folder: str, model: nn.Module, iterations: int, metric: str, value: float) -> str:
    """Write model_best.pth: the weights that were evaluated, without what training needs.

    The file before stays whole until this one is complete and on the disk.

    Args:
        folder: OUTPUT_DIR.
        model: the plain student, with averaged weights where those were evaluated.
        iterations: that it was trained.
        metric, value: what it is the best by.

    Returns:
        Its path.

    Raises:
        ConfigError: the disk is full or the folder cannot be written.
    """
    path = os.path.join(folder, f"{BEST}.pth")
    state = model.state_dict()
    # under both names, so that SOLVER.EMA.EVAL_ONLY finds what it asks for; stored once
    content = {"model": state, "ema": state, "iteration": iterations - 1, metric: value}
    return _write(path, lambda file: torch.save(content, file))


def write_safetensors(path: str, model: nn.Module, about: dict[str, str]) -> str:
    """Write the plain student as safetensors.

    Args:
        path: the file.
        model: the plain student.
        about: texts for the file's header.

    Raises:
        ConfigError: the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save

    # a copy of each: names that share one tensor are refused otherwise
    state = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
    return _write(path, lambda file: file.write(save(state, {"format": "pt", **about})))


def _write(path: str, write) -> str:
    try:
        with replacing(path) as file:
            write(file)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"OUTPUT_DIR: cannot write {path}: {disk_fault(error) or error}; the file before is "
            "whole, and so are the checkpoints"
        ) from error
    return path
