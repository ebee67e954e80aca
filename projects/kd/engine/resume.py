"""What a resumed run changes is named in one line and takes effect, or is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
import yaml
from detectron2.config import CfgNode

from ..config.teachers import common_key, key_of_head
from ..errors import ConfigError

logger = logging.getLogger(__name__)

# Read before the first iteration only: a resumed run has the checkpoint's weights.
START_ONLY = (
    "MODEL.WEIGHTS",
    "MODEL.TIMM.WEIGHTS",
    "MODEL.TIMM.PRETRAINED",
    "KD.INIT_FROM_TEACHER",
)
_NO_MATTER = ("OUTPUT_DIR", "VERSION")  # a folder may be moved


def config_text(cfg: CfgNode) -> str:
    """A config as a checkpoint keeps it."""
    return cfg.dump()


def changed_keys(old: str, cfg: CfgNode) -> dict[str, tuple]:
    """Keys whose value differs from that of a checkpoint's config.

    Args:
        old: what :func:`config_text` gave.
        cfg: the config now.

    Returns:
        Key to (old value, new value), in the order of the config. Keys that only one of them has
        (another version, a package no longer imported) are left out.
    """
    try:
        before = dict(_leaves(yaml.safe_load(old) or {}))
    except yaml.YAMLError as error:
        raise ConfigError(f"--resume: the config in the checkpoint is damaged: {error}") from error
    now = dict(_leaves(yaml.safe_load(cfg.dump())))
    return {
        key: (before[key], value)
        for key, value in now.items()
        if key in before and before[key] != value and key not in _NO_MATTER
    }


def _leaves(node, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(node, Mapping) and (node or not path):
        for name, value in node.items():
            yield from _leaves(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, node


def split_changes(changes: Mapping[str, tuple]) -> tuple[dict, dict]:
    """Changed keys that take effect, and those that cannot any more."""
    idle = {
        k: v
        for k, v in changes.items()
        if common_key(k) in START_ONLY or (k == "SEED" and v[1] < 0)
    }
    return {k: v for k, v in changes.items() if k not in idle}, idle


def changes_since(state: Mapping, cfg: CfgNode) -> tuple[dict, dict]:
    """:func:`split_changes` since a checkpoint, by the trainer's state in it."""
    if "config" in state:
        return split_changes(changed_keys(state["config"], cfg))
    logger.warning(
        "--resume: the checkpoint is of an older version that kept no config: what has changed "
        "since then takes effect without being named"
    )
    return {}, {}


def tell_changes(iteration: int, used: Mapping[str, tuple], idle: Mapping[str, tuple]) -> None:
    """Name what :func:`changes_since` gave in the log, for a run that goes on at ``iteration``."""
    if used:
        logger.warning(
            f"--resume: from iteration {iteration} on other values than before: {listing(used)}"
        )
    if idle:
        logger.warning(
            "--resume: without effect, since the checkpoint's weights and seed are used: "
            f"{listing(idle)}"
        )


def listing(changes: Mapping[str, tuple]) -> str:
    """``KEY old -> new``, one behind the other."""
    return "; ".join(f"{key} {_short(old)} -> {_short(new)}" for key, (old, new) in changes.items())


def _short(value, most: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def keep_old_values(cfg: CfgNode, idle: Mapping[str, tuple]) -> None:
    """Put the checkpoint's values of ``idle`` keys into a config, which then says what is used."""
    frozen = cfg.is_frozen()
    cfg.defrost()
    for key, (old, _) in idle.items():
        *path, name = key.split(".")
        node = cfg
        for part in path:
            node = node[part]
        node[name] = tuple(old) if isinstance(node[name], tuple) else old
    if frozen:
        cfg.freeze()


def load_optimizer(name: str, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Give an optimizer a checkpoint's momenta; rates, decay and the like stay those of the config.

    Args:
        name: ``student``, or the head it belongs to.
        optimizer: over the same parameters in the same groups.
        state: its ``state_dict`` of then.

    Raises:
        ConfigError: another kind of optimizer, or other parameters or groups.
    """
    key = "SOLVER.OPTIMIZER" if name == "student" else f"{key_of_head(name)}.OPTIMIZER.NAME"
    new_run = "to start a new run from its weights give the file as MODEL.WEIGHTS without --resume"
    kind, kept = _kind(state["state"]), type(optimizer).__name__
    if kind and (kind == "SGD") != (kept == "SGD"):
        raise ConfigError(
            f"--resume: {key} is {kept}, the checkpoint's momenta are of {kind}; set it back, or "
            f"{new_run}"
        )
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"--resume: the parameter groups of optimizer '{name}' differ from the checkpoint's "
            f"({error}); SOLVER, KD or the model has changed; {new_run}"
        ) from error
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)
        for parameter in group["params"]:
            for value in optimizer.state.get(parameter, {}).values():
                if (
                    isinstance(value, torch.Tensor)
                    and value.dim()
                    and value.shape != parameter.shape
                ):
                    raise ConfigError(
                        f"--resume: the parameters of optimizer '{name}' come in other groups than "
                        f"in the checkpoint; SOLVER, KD or the model has changed; {new_run}"
                    )


def _kind(state: Mapping) -> str:
    entries = [entry for entry in state.values() if isinstance(entry, Mapping)]
    if any("exp_avg" in entry for entry in entries):
        return "Adam or AdamW"
    return "SGD" if any("momentum_buffer" in entry for entry in entries) else ""


def place_schedules(
    schedulers: Sequence[torch.optim.lr_scheduler.LRScheduler],
    settings: Sequence[dict],
    max_iter: int,
) -> None:
    """Schedules with the config's settings go on from the iteration that a checkpoint has put in.

    Args:
        schedulers: just loaded, so that they also have the checkpoint's base rates.
        settings: their ``vars`` from before loading.
        max_iter: where they end; behind it nothing is trained, and they have no rate.
    """
    for scheduler, own in zip(schedulers, settings, strict=True):
        iteration = scheduler.last_epoch
        vars(scheduler).update(own)
        scheduler.last_epoch = iteration
        scheduler._step_count = iteration + 1
        if iteration > max_iter:
            continue
        rates = scheduler.get_lr()
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = list(rates)
