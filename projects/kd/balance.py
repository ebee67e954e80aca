"""Weights that set themselves: each head's share of the gradient is kept at a target (KD.BALANCE).

The *share* r of a head is the L2 norm of the gradient of its ``loss_kd_*`` at the maps it acts on,
relative to the norm of all task losses together at the same maps. It is linear in the head's
weight, so a multiplier m of the weight makes the share r m.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from .config import INHERIT
from .config.teachers import config_of_head, key_of_head
from .context import DistillContext
from .errors import ConfigError

# Losses are multiplied by it before float16 gradients are taken, so that small ones do not vanish;
# a ratio of two norms does not change. Ours: a power of two below GradScaler's first scale.
_FLOAT16_SCALE = 2.0**12
_STATE = "balance_state"


def gradient_norm(loss: torch.Tensor, maps: Sequence[torch.Tensor], scale: float = 1.0) -> float:
    """L2 norm over all ``maps`` together of the gradient of a scalar; 0 where it has none.

    The graph is kept for the next loss.

    Args:
        loss: scalar.
        maps: tensors of its graph.
        scale: the loss is multiplied by it before, the norm divided by it after.
    """
    if not loss.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(loss * scale, maps, retain_graph=True, allow_unused=True)
    squares = [g.double().square().sum() for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt().item() / scale if squares else 0.0


@dataclass(frozen=True)
class Target:
    """The share that a head is kept at: from ``start`` to ``end`` along a geometric line.

    Attributes:
        start: at iteration 0, above 0.
        end: at ``length``, above 0.
        length: iterations of the training.
    """

    start: float
    end: float
    length: int

    def __call__(self, iteration: int) -> float:
        """The target at an iteration counted from 0."""
        part = min(max(iteration / max(self.length, 1), 0.0), 1.0)
        return self.start * (self.end / self.start) ** part


def update(state: torch.Tensor, log_share: float, ema: float) -> None:
    """Take one sample of log r into the running mean, in place.

    ``a <- a + b (x - a)`` with ``b = max(1 - ema, 1 / samples)``: the plain mean of the first
    samples, then an exponential one. A mean of logarithms, since r scatters over factors: one
    crowded image must not move the weight (ours).

    Args:
        state: (2,) float64: a, and the number of samples.
        log_share: x.
        ema: in [0, 1).
    """
    state[1] += 1
    state[0] += max(1.0 - ema, 1.0 / state[1].item()) * (log_share - state[0])


def multiplier(state: torch.Tensor, target: float, bound: float) -> float:
    """``target / exp(a)`` within [1 / bound, bound]; 1 before the first sample."""
    if state[1] == 0:
        return 1.0
    log_factor = math.log(target) - state[0].item()
    return math.exp(min(max(log_factor, -math.log(bound)), math.log(bound)))


class ShareController:
    """Multipliers of the heads' ``loss_kd_*``, measured every ``period`` iterations.

    Source: ours, after the adaptive weight of RT-DETRv4 (arXiv 2510.25257), which moves one weight
    once an epoch by the share in all parameters' gradients. Here the share is taken at the maps
    that a head acts on, where it is linear in the weight and needs no integrator.

    What it keeps, the mean of log r and the number of samples, is a buffer of each head: it goes
    into checkpoints, and ``--resume`` continues exactly. Multipliers are equal on all processes.

    Args:
        heads: all heads by name; those in ``targets`` get the buffer.
        targets: head name to its :class:`Target`; heads left out are not balanced.
        period: iterations between two measurements.
        ema: memory of the running mean of log r.
        bound: largest multiplier, and one over the smallest.
    """

    def __init__(
        self,
        heads: nn.ModuleDict,
        targets: Mapping[str, Target],
        *,
        period: int,
        ema: float,
        bound: float,
    ):
        self.targets = dict(targets)
        self.period, self.ema, self.bound = period, ema, bound
        for name in self.targets:
            heads[name].register_buffer(_STATE, torch.zeros(2, dtype=torch.float64))
        self._states: dict[str, torch.Tensor] = {}
        self._measured = -1  # the iteration, so that further micro-batches do not count
        self._due = False
        self._task: dict[tuple[int, ...], float] = {}
        self._losses: Sequence[torch.Tensor] = ()

    def begin(self, ctx: DistillContext, task: Mapping[str, torch.Tensor]) -> None:
        """A step's task losses, before the heads run."""
        self._due = ctx.iteration % self.period == 0 and self._measured != ctx.iteration
        self._task = {}
        self._losses = list(task.values()) if self._due else ()

    def factor(
        self, name: str, head: nn.Module, losses: Mapping[str, torch.Tensor], ctx: DistillContext
    ) -> float:
        """The multiplier of a head's ``loss_kd_*`` in this step.

        Args:
            name, head: the head.
            losses: what it returned, at its weight in the config and without its schedule.
            ctx: of the step.

        Raises:
            ConfigError: the task losses have no gradient where the head acts.
        """
        if name not in self.targets:
            return 1.0
        state = self._state(name, head)
        share = self._share(name, head, losses, ctx) if self._due else 0.0
        if share > 0:
            update(state, math.log(share), self.ema)
            getattr(head, _STATE).copy_(state)
        factor = multiplier(state, self.targets[name](ctx.iteration), self.bound)
        if share > 0:
            storage = get_event_storage()
            storage.put_scalar(f"kd/share_{name}", share * factor, smoothing_hint=False)
            storage.put_scalar(f"kd/multiplier_{name}", factor, smoothing_hint=False)
        return factor

    def end(self, ctx: DistillContext) -> None:
        """The heads of a step have run."""
        if self._due:
            self._measured = ctx.iteration
        self._due, self._losses, self._task = False, (), {}

    def _state(self, name: str, head: nn.Module) -> torch.Tensor:
        """A head's buffer on the CPU, so that no step waits for the device to read it.

        Copied in the first step, when a checkpoint to resume from has been loaded.
        """
        if name not in self._states:
            self._states[name] = getattr(head, _STATE).to("cpu", copy=True)
        return self._states[name]

    def _share(self, name, head, losses, ctx) -> float:
        """exp of the mean over processes of log r; 0 where any of them has none."""
        maps = ctx.origins(head.acts_on(ctx))
        scale = _FLOAT16_SCALE if any(x.dtype == torch.float16 for x in maps) else 1.0
        key = tuple(id(x) for x in maps)
        if key not in self._task:
            self._task[key] = gradient_norm(sum(self._losses), maps, scale)
        task = self._task[key]
        if task == 0:
            raise ConfigError(
                f"KD.BALANCE: the task losses have no gradient at the maps that {name} acts on "
                f"(is MODEL.BACKBONE frozen, or are they not read?); set {key_of_head(name)}.SHARE "
                "to 0.0"
            )
        parts = [value for key, value in losses.items() if key.startswith("loss_kd_")]
        share = gradient_norm(sum(parts), maps, scale) / task if parts else 0.0
        usable = math.isfinite(share) and share > 0
        sample = [math.log(share) if usable else 0.0, float(usable)]
        total = torch.tensor(sample, dtype=torch.float64, device=ctx.student.device)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(total)
        world = comm.get_world_size()
        return math.exp(total[0].item() / world) if total[1].item() == world else 0.0


def build_balance(cfg, heads: nn.ModuleDict) -> ShareController | None:
    """What KD.BALANCE and the heads' SHARE ask for; None where no head has a target.

    Raises:
        ConfigError: END_TARGET without a target.
    """
    node = cfg.KD.BALANCE
    targets = {}
    for name in heads:
        config, head = config_of_head(cfg, name)
        own = config.KD.get(head.upper(), {}).get("SHARE", INHERIT)
        start = node.TARGET if own == INHERIT else own
        if start > 0:
            end = node.END_TARGET if own == INHERIT and node.END_TARGET > 0 else start
            targets[name] = Target(float(start), float(end), cfg.SOLVER.MAX_ITER)
    if node.END_TARGET > 0 and node.TARGET == 0:
        raise ConfigError("KD.BALANCE.END_TARGET is set and KD.BALANCE.TARGET is 0.0: set both")
    if not targets:
        return None
    return ShareController(heads, targets, period=node.PERIOD, ema=node.EMA, bound=node.BOUND)
