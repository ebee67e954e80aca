"""Training hooks that detectron2 lacks, and state that its models keep outside of buffers."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Mapping

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import EventWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ..errors import UserError, disk_fault


class AuxLRScheduler(HookBase):
    """Steps and logs (``lr_<head>``) the learning rates of all optimizers but the main one.

    detectron2 saves the state of hooks by class name, so that a second ``LRScheduler`` hook would
    lose its own; this class holds all other schedulers at once.
    """

    def __init__(self, schedulers: Mapping[str, torch.optim.lr_scheduler.LRScheduler]):
        self.schedulers = dict(schedulers)

    def after_step(self) -> None:
        """Log the rates of this iteration, then move on."""
        for name, scheduler in self.schedulers.items():
            rate = scheduler.optimizer.param_groups[0]["lr"]
            self.trainer.storage.put_scalar(f"lr_{name.lower()}", rate, smoothing_hint=False)
            with warnings.catch_warnings():
                # a head that is idle at the start has taken no step yet
                warnings.filterwarnings(
                    "ignore", "Detected call of `lr_scheduler.step", UserWarning
                )
                scheduler.step()

    def state_dict(self) -> dict:
        """States by head."""
        return {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(state[name])


class LossBalance(HookBase):
    """Warns once when distillation drowns the task: ``loss_kd_*`` above so many times its losses.

    Args:
        period: iterations over which both are averaged, those that the losses are gathered in.
        limit: the ratio from which it warns. Ours: heads with published weights stay below 3.
    """

    def __init__(self, period: int, limit: float = 10.0):
        self.period = period
        self.limit = limit
        self.told = False

    def after_step(self) -> None:
        """Look at the means of the last ``period`` iterations."""
        if self.told or (self.trainer.iter + 1) % self.period:
            return
        means = {
            name: history.avg(self.period)
            for name, history in self.trainer.storage.histories().items()
            if name.startswith("loss_") and not name.startswith("loss_aux_")
        }
        distilled = {name: x for name, x in means.items() if name.startswith("loss_kd_")}
        task = sum(abs(x) for name, x in means.items() if name not in distilled)
        total = sum(distilled.values())
        if task > 0 and total > self.limit * task:
            self.told = True
            logging.getLogger(__name__).warning(
                "Distillation losses are %.0f times the task losses (%.3g beside %.3g; the "
                "largest is %s): the student learns little else. Lower KD.<HEAD>.WEIGHT; "
                "kd-calibrate suggests one",
                total / task,
                total,
                task,
                max(distilled, key=distilled.get),
            )


class ModelEMA:
    """Exponential moving average of a model's parameters; buffers are copied.

    average <- decay * average + (1 - decay) * parameter, once an optimizer step.

    Args:
        model: the student; read now, so create this after weights were loaded into it.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}

    def start(self) -> None:
        """Begin at the model's present weights, unless an average was loaded."""
        if not self.average:
            self.average = {k: v.clone() for k, v in self.model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present weights."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        state = self.model.state_dict()
        moving = [name for name in self.average if name in parameters]
        torch._foreach_lerp_(
            [self.average[name] for name in moving],
            [state[name] for name in moving],
            1.0 - self.decay,
        )
        for name in self.average.keys() - set(moving):
            self.average[name].copy_(state[name])

    @contextlib.contextmanager
    def applied(self):
        """The model has the averaged weights inside the context."""
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def state_dict(self) -> dict:
        """The averaged state dict, with the names of the model's."""
        return self.average

    def load_state_dict(self, state: dict) -> None:
        """Inverse of :meth:`state_dict`."""
        own = self.model.state_dict()
        self.average = {name: value.to(own[name].device) for name, value in state.items()}


class EMAHook(HookBase):
    """Updates a :class:`ModelEMA`; place it before hooks that save or evaluate."""

    def __init__(self, ema: ModelEMA):
        self.ema = ema

    def before_train(self) -> None:
        """Start where training starts."""
        self.ema.start()

    def after_step(self) -> None:
        """Once an iteration."""
        self.ema.update()


class PreciseBN(hooks.PreciseBN):
    """detectron2's PreciseBN, made repeatable.

    Always the same batches, and what the forward passes leave in the model besides the statistics
    (loss normalisers) is undone, so that a resumed run has what the uninterrupted one has.
    """

    def update_stats(self) -> None:
        """See detectron2."""
        if self._disabled:
            return
        self._data_iter = None
        with floats_kept(self._model):
            super().update_stats()
        self._data_iter = None


def repeatable_precise_bn(
    cfg: CfgNode, student: nn.Module, build_loader: Callable
) -> PreciseBN | None:
    """The hook that TEST.PRECISE_BN asks for; None without, or where there is nothing to do.

    Args:
        cfg: of the run.
        student: the plain detector.
        build_loader: of ``(cfg, seed=...)``.
    """
    if not (cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(student)):
        return None
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0  # as detectron2 does
    cfg.DATALOADER.CACHE = "off"  # one beside that of the training
    cfg.KD.UNLABELED.DATASETS = ()  # the plain student takes labelled images
    # not the trainer's seed, which a resume may still change
    loader = build_loader(cfg, seed=max(cfg.SEED, 0))
    return PreciseBN(cfg.TEST.EVAL_PERIOD, student, loader, cfg.TEST.PRECISE_BN.NUM_ITER)


def running_floats(model: nn.Module, constants: Mapping[str, float]) -> dict[str, float]:
    """Plain float attributes of a model's modules that are not constants.

    detectron2's dense detectors keep the running mean by which they divide their losses in such an
    attribute (``loss_normalizer``), which is in no state dict.

    Args:
        model: any module.
        constants: values when the model was built, as this function gives them for ``{}``.

    Returns:
        ``<module path>.<attribute>`` -> value, for those that are new or have changed.
    """
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is float and constants.get(f"{path}.{name}") != value
    }


@contextlib.contextmanager
def floats_kept(model: nn.Module):
    """What :func:`running_floats` gives is after the context what it was before."""
    before = running_floats(model, {})
    try:
        yield
    finally:
        for name in running_floats(model, {}).keys() - before.keys():
            module, attribute = _split(model, name)
            delattr(module, attribute)
        set_floats(model, before)


def set_floats(model: nn.Module, values: Mapping[str, float]) -> None:
    """Set what :func:`running_floats` gave."""
    for name, value in values.items():
        module, attribute = _split(model, name)
        setattr(module, attribute, value)


def _split(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


class PeriodicWriter(hooks.PeriodicWriter):
    """detectron2's, with writers that are made when the first iteration is known.

    Args:
        make_writers: gives the writers.
        period: iterations between two writes.
    """

    def __init__(self, make_writers: Callable[[], list[EventWriter]], period: int = 20):
        super().__init__([], period)
        self.period = period
        self._make_writers = make_writers

    def before_train(self) -> None:
        """Make the writers."""
        self._writers = self._make_writers()

    def after_step(self) -> None:
        """Write; pictures go even where the event file could not be written."""
        super().after_step()
        done = self.trainer.iter + 1
        if done % self.period == 0 or done == self.trainer.max_iter:
            self.trainer.storage.clear_images()


class QuietUserErrors(logging.Filter):
    """Drops detectron2's traceback of errors that the script prints as one line anyway."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a record that carries a :class:`UserError`, or a fault of the disk."""
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, UserError) or disk_fault(error))


def hide_user_errors() -> None:
    """Put :class:`QuietUserErrors` before detectron2's log of exceptions."""
    log = logging.getLogger("detectron2.engine.train_loop")
    if not any(isinstance(item, QuietUserErrors) for item in log.filters):
        log.addFilter(QuietUserErrors())
