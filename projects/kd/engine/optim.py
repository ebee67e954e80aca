"""Optimizers, gradient clipping and learning rate schedules, from the config."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.projects.deeplab import build_lr_scheduler  # detectron2's, and WarmupPolyLR
from detectron2.solver.build import get_default_optimizer_params
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from ..config import LazyNode
from ..config.key_table import OPTIMIZERS
from ..config.teachers import config_of_head, key_of_head
from ..errors import ConfigError, require_one_of
from ..weights.files import modules_in
from .lazy_optim import lazy_optimizer, lazy_scheduler

logger = logging.getLogger(__name__)

MAIN = "student"  # name of the optimizer over the student, the adapters and the heads


@dataclass(frozen=True)
class GradientClip:
    """Clipping of one optimizer's gradients.

    Attributes:
        kind: one of CLIP_TYPES: "value" limits every element, "norm" the norm of every parameter's
            gradient by itself (both as detectron2 does), "full_model" the norm over all of them.
        limit: largest absolute value or norm.
        norm_type: order of the norm.
    """

    kind: str
    limit: float
    norm_type: float = 2.0

    def __call__(self, parameters: Sequence[nn.Parameter], total_norm: torch.Tensor) -> None:
        """Scale the gradients in place.

        Args:
            parameters: those that have a gradient.
            total_norm: scalar, their norm of order ``norm_type`` over all parameters.
        """
        gradients = [p.grad for p in parameters]
        if not gradients:
            return
        if self.kind == "value":
            torch._foreach_clamp_min_(gradients, -self.limit)
            torch._foreach_clamp_max_(gradients, self.limit)
        elif self.kind == "norm":
            norms = torch._foreach_norm(gradients, self.norm_type)
            factors = [(self.limit / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
            torch._foreach_mul_(gradients, factors)
        else:
            clip_grads_with_norm_(parameters, self.limit, total_norm)


def main_clip(cfg: CfgNode) -> GradientClip | None:
    """The clipping that SOLVER.CLIP_GRADIENTS asks for."""
    node = cfg.SOLVER.CLIP_GRADIENTS
    if not node.ENABLED:
        return None
    return GradientClip(node.CLIP_TYPE, node.CLIP_VALUE, node.NORM_TYPE)


@dataclass
class Optimization:
    """One optimizer with what belongs to it.

    Attributes:
        optimizer: over parameters that no other one has.
        scheduler: its learning rate, stepped once an iteration.
        clip: None = no clipping.
        active: iteration -> whether it steps; None = always.
    """

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    clip: GradientClip | None = None
    active: Callable[[int], bool] | None = None


def build_optimizations(cfg: CfgNode, model: nn.Module) -> dict[str, Optimization]:
    """The main optimizer, and one for every head that has parameters of its own.

    The main one, "student", trains the student, the adapters, and all parameters of the heads that
    ``aux_parameters()`` does not name. The others are named as their heads and read
    ``KD.<HEAD>.OPTIMIZER``. A head that defines ``aux_active(iteration) -> bool`` tells when its
    optimizer steps. The groups depend on the config alone, so a checkpoint of any iteration fits.

    Args:
        cfg: the full config.
        model: the plain student, or the wrapper with attributes ``student`` and ``heads``.
    """
    student = getattr(model, "student", model)
    heads = getattr(model, "heads", nn.ModuleDict())
    lazy = isinstance(cfg, LazyNode)
    auxiliary = {name: trainable(head.aux_parameters()) for name, head in heads.items()}
    auxiliary = {name: parameters for name, parameters in auxiliary.items() if parameters}
    excluded = set(itertools.chain.from_iterable(auxiliary.values()))

    if lazy:
        optimizer = lazy_optimizer(cfg, student)
        for group in main_groups(cfg, nn.ModuleDict({"heads": heads}), excluded):
            optimizer.add_param_group(group)
        scheduler = lazy_scheduler(cfg, optimizer)
    else:
        groups = main_groups(cfg, nn.ModuleDict({"student": student, "heads": heads}), excluded)
        optimizer = build_optimizer(
            cfg.SOLVER.OPTIMIZER, "SOLVER.OPTIMIZER", groups, cfg.SOLVER.BASE_LR, cfg
        )
        scheduler = build_lr_scheduler(cfg, optimizer)
    result = {MAIN: Optimization(optimizer, scheduler, main_clip(cfg))}
    for name, parameters in auxiliary.items():
        result[name] = _auxiliary(cfg, name, heads[name], parameters)
    _check_partition(model, result, complete=not lazy)
    return result


def _auxiliary(cfg: CfgNode, name: str, head: nn.Module, parameters: list) -> Optimization:
    key = f"{key_of_head(name)}.OPTIMIZER"
    config, registered = config_of_head(cfg, name)
    own_keys = config.KD[registered.upper()]
    if "OPTIMIZER" not in own_keys:
        raise ConfigError(f"{key}: head {name} has auxiliary parameters and no such config node")
    node = own_keys.OPTIMIZER
    groups = [{"params": parameters, "weight_decay": node.WEIGHT_DECAY}]
    optimizer = build_optimizer(node.NAME, f"{key}.NAME", groups, node.BASE_LR, cfg)
    clip = GradientClip("full_model", node.CLIP_NORM) if node.CLIP_NORM > 0 else None
    active = getattr(head, "aux_active", None)
    if isinstance(cfg, LazyNode) and not node.LR_SCHEDULER_NAME:  # the student's, with its warm-up
        return Optimization(optimizer, lazy_scheduler(cfg, optimizer), clip, active)
    own = cfg.clone()
    own.defrost()
    # the same final fraction of the start value as in the main schedule
    own.SOLVER.BASE_LR_END *= node.BASE_LR / cfg.SOLVER.BASE_LR
    own.SOLVER.BASE_LR = node.BASE_LR
    own.SOLVER.LR_SCHEDULER_NAME = node.LR_SCHEDULER_NAME or cfg.SOLVER.LR_SCHEDULER_NAME
    own.SOLVER.WARMUP_ITERS = node.WARMUP_ITERS
    return Optimization(optimizer, build_lr_scheduler(own, optimizer), clip, active)


def main_groups(cfg: CfgNode, model: nn.ModuleDict, excluded: set) -> list[dict]:
    """Parameter groups of the main optimizer: few, by learning rate and weight decay.

    detectron2's rules for norm layers (SOLVER.WEIGHT_DECAY_NORM) and biases (BIAS_LR_FACTOR,
    WEIGHT_DECAY_BIAS); SOLVER.BACKBONE_MULTIPLIER for parameters of ``student.backbone``;
    KD.ADAPTER.LR_FACTOR for those below a module of a head whose name starts with ``adapter``; the
    factors that a head declares for its modules (:attr:`ImitationHead.lr_factors`).

    Args:
        model: ``student`` and ``heads``.
        excluded: parameters that other optimizers have.
    """

    def factor(name: str) -> float:
        value = cfg.SOLVER.BIAS_LR_FACTOR if name.endswith(".bias") else 1.0
        if name.startswith("student.backbone."):
            return value * cfg.SOLVER.BACKBONE_MULTIPLIER
        side, *modules = name.split(".")[:-1]
        if side != "heads":
            return value
        if any(part.startswith("adapter") for part in modules):
            value *= cfg.KD.ADAPTER.LR_FACTOR
        head, inner = modules[0], ".".join(modules[1:]) + "."
        for path, own in getattr(model["heads"][head], "lr_factors", {}).items():
            if inner.startswith(f"{path}."):
                value *= own
        return value

    groups = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        lr_factor_func=factor,
    )
    for group in groups:
        group["params"] = [p for p in group["params"] if p not in excluded]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: str, key: str, groups: list[dict], base_lr: float, cfg: CfgNode
) -> torch.optim.Optimizer:
    """One of OPTIMIZERS over parameter groups; SGD with SOLVER.MOMENTUM and NESTEROV.

    Args:
        name: the class.
        key: the config key that holds ``name``, for the error.
        groups: parameter groups with their ``weight_decay``.
        base_lr: learning rate of groups that have none.
        cfg: the full config.
    """
    require_one_of(key, name, OPTIMIZERS)
    if not groups:
        raise ConfigError("MODEL.BACKBONE.FREEZE_AT: the model has no trainable parameter")
    # one kernel for all parameters; on a CPU an eighth of the time of the default loop
    if name == "SGD":
        momentum = {"momentum": cfg.SOLVER.MOMENTUM, "nesterov": cfg.SOLVER.NESTEROV}
        return torch.optim.SGD(groups, lr=base_lr, fused=True, **momentum)
    return getattr(torch.optim, name)(groups, lr=base_lr, fused=True)


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that require a gradient, each once, in their order."""
    return list(dict.fromkeys(p for p in parameters if p.requires_grad))


def _check_partition(model: nn.Module, optimizations: dict, complete: bool = True) -> None:
    owners: dict[nn.Parameter, str] = {}
    for name, optimization in optimizations.items():
        for parameter in itertools.chain.from_iterable(
            group["params"] for group in optimization.optimizer.param_groups
        ):
            if parameter in owners:
                raise AssertionError(f"a parameter is in '{owners[parameter]}' and in '{name}'")
            owners[parameter] = name
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p not in owners]
    if missing and not complete:  # as its LazyConfig says
        logger.warning(f"optimizer.params leaves out, so that they stay: {modules_in(missing)}")
        return
    if missing or len(owners) != len(trainable(model.parameters())):
        raise AssertionError(f"parameters of the model and its optimizers differ: {missing}")
