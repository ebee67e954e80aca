"""Optimizer and schedule of a LazyConfig, as detectron2's own training script makes them."""

from __future__ import annotations

import copy

import torch
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig, ListConfig
from torch import nn

from ..config import LazyNode
from ..config.lazy_files import built, select
from ..errors import ConfigError


def lazy_optimizer(cfg: LazyNode, student: nn.Module) -> torch.optim.Optimizer:
    """The file's ``optimizer`` over the student; its ``params`` gets the model.

    Raises:
        ConfigError: it cannot be made, or is no optimizer.
    """
    if not isinstance(select(cfg.lazy, "optimizer.params"), DictConfig):
        raise ConfigError(
            f"{cfg.path}: optimizer.params has to be a LazyCall that takes the model, e.g. "
            "LazyCall(get_default_optimizer_params)()"
        )
    lazy = copy.deepcopy(cfg.lazy)
    lazy.optimizer.params.model = student
    optimizer = built(cfg, "optimizer", lazy.optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"{cfg.path}: optimizer gives a {type(optimizer).__name__}")
    for group in (optimizer.defaults, *optimizer.param_groups):
        for name, value in group.items():
            if isinstance(value, ListConfig):  # betas: checkpoints hold no objects of omegaconf
                group[name] = tuple(value)
    return optimizer


def lazy_scheduler(cfg: LazyNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """The file's ``lr_multiplier`` over SOLVER.MAX_ITER iterations, stepped once an iteration.

    Raises:
        ConfigError: it is no scheduler of fvcore.
    """
    multiplier = built(cfg, "lr_multiplier")
    if not isinstance(multiplier, ParamScheduler):
        raise ConfigError(
            f"{cfg.path}: lr_multiplier gives a {type(multiplier).__name__}, it has to be a "
            "fvcore ParamScheduler"
        )
    return LRMultiplier(optimizer, multiplier, max_iter=cfg.SOLVER.MAX_ITER)
