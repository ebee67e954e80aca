"""A warning when a run does not learn, with what to check first."""

from __future__ import annotations

import logging
import math
import os
import statistics
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage

from .progress import main_metrics

logger = logging.getLogger(__name__)

# Ours, set by the logs of 60 runs on shapes, with plain and distilled students of several
# detectors: no alarm in any of them. See flat().
BLOCK = 20  # iterations of which the median is one value
SETTLING = 3  # blocks left out: running normalisers of dense detectors start far off
LEAST = 10  # blocks, so that their scatter is known
LIMIT = 0.15
CERTAIN = 2.0
FIRST_EVALUATION = 200  # iterations before which an AP of 0 says nothing
ZERO = 0.01  # an AP below is 0


def flat(series: Sequence[Sequence[float]]) -> bool | None:
    """Whether none of several series goes anywhere.

    The means of both halves are compared, by the standard error of their difference: a series is
    flat when it is certain (two errors) that they differ by less than 15 per cent, and it moves
    when it is certain that they differ by more.

    Args:
        series: values in their order, ``LEAST`` of each or more; one for each loss.

    Returns:
        True: all are flat. False: one moves. None: not certain yet.
    """
    certain = True
    for values in series:
        half = len(values) // 2
        first, second = values[:half], values[-half:]
        limit = LIMIT * abs(statistics.fmean([*first, *second]))
        variance = statistics.variance(first) + statistics.variance(second)
        error = CERTAIN * math.sqrt(variance / half)
        difference = abs(statistics.fmean(second) - statistics.fmean(first))
        if difference - error > limit:
            return False
        certain = certain and difference + error <= limit
    return certain or None


def task_losses(storage: EventStorage) -> list[list[float]]:
    """Medians of :data:`BLOCK` iterations of each of the student's own losses, once settled.

    A loss that is 0 throughout is left out.
    """
    found = []
    for name, history in storage.histories().items():
        if not name.startswith("loss") or name.startswith(("loss_kd_", "loss_aux_")):
            continue
        values = [value for value, _ in history.values()]
        whole = range(SETTLING * BLOCK, len(values) - BLOCK + 1, BLOCK)
        medians = [statistics.median(values[i : i + BLOCK]) for i in whole]
        if any(medians):
            found.append(medians)
    return found


class LearningCheck(HookBase):
    """Warns once where the first evaluation gives AP 0, or the task losses stay as they were.

    Place it behind the evaluation and what gathers the losses. A run that starts from the weights
    of a whole detector may well have flat losses, and one that is resumed has no start to look at:
    they are not judged by them.

    Args:
        cfg: of the run.
        starts_whole: whether the weights that were loaded left no part of the student random.
    """

    def __init__(self, cfg: CfgNode, starts_whole: Callable[[], bool] = lambda: False):
        self.cfg, self.starts_whole = cfg, starts_whole
        self.period = cfg.SOLVER.GATHER_METRIC_PERIOD
        self._evaluated = self._judged = False
        self._next = 0  # iterations after which the losses are looked at, ever more rarely

    def before_train(self) -> None:
        """Decide what this run can be judged by."""
        self._evaluated = self.trainer.start_iter > 0
        self._judged = self._evaluated or self.starts_whole()
        self._next = max((SETTLING + LEAST) * BLOCK, math.ceil(self.trainer.max_iter / 10))

    def after_step(self) -> None:
        """Look at an evaluation, and once a period at the losses."""
        done = self.trainer.iter + 1
        self._look_at_metrics(done)
        if not self._judged and done % self.period == 0 and done >= self._next:
            self._next = 1.05 * done
            self._look_at_losses(done)

    def after_train(self) -> None:
        """The evaluation at the end may be the first."""
        if not self.trainer.failed:
            self._look_at_metrics(self.trainer.iter)

    def _look_at_metrics(self, done: int) -> None:
        metrics = {} if self._evaluated else main_metrics(self.trainer.storage)
        values = [value for value, _ in metrics.values() if not math.isnan(value)]
        if not values:
            return
        self._evaluated = True
        if done >= FIRST_EVALUATION and max(values) < ZERO:
            self._warn(f"{', '.join(metrics)} 0 at the first evaluation, after {done} iterations")
        elif max(values) >= ZERO:
            self._judged = True  # whatever the losses do, it detects something

    def _look_at_losses(self, done: int) -> None:
        series = task_losses(self.trainer.storage)
        if not series or min(map(len, series)) < LEAST:
            return
        answer = flat(series)
        self._judged = answer is not None
        if answer:
            self._warn(
                f"after {done} iterations the student's own losses are still what they were soon "
                "after the start"
            )

    def _warn(self, what: str) -> None:
        self._evaluated = self._judged = True
        rate = self.trainer.storage.latest().get("lr", (math.nan, 0))[0]
        reasons = "; ".join(f"({i}) {x}" for i, x in enumerate(suspects(self.cfg, rate), 1))
        logger.warning(f"This run does not seem to learn: {what}. Check first: {reasons}")


def suspects(cfg: CfgNode, rate: float) -> list[str]:
    """What keeps a detector from learning, what this config gives reason for first.

    Args:
        cfg: of the run.
        rate: the learning rate now.
    """
    images = cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUM_STEPS
    config = getattr(cfg, "path", os.path.join(cfg.OUTPUT_DIR, "config.yaml"))  # a LazyConfig
    speed = (
        f"SOLVER.BASE_LR {cfg.SOLVER.BASE_LR:g} with {cfg.SOLVER.OPTIMIZER} and {images} images a "
        f"step, the learning rate is {rate:.3g} now (detectron2's R-CNNs take 0.02 with SGD and 16 "
        "images, in proportion to the images)"
    )
    start = cfg.MODEL.WEIGHTS or cfg.MODEL.TIMM.WEIGHTS
    if start or cfg.MODEL.TIMM.PRETRAINED:
        weights = (
            "MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and INPUT.FORMAT are those of the weights "
            f"{start or 'of timm'}"
        )
    else:
        weights = (
            "MODEL.WEIGHTS is empty and the backbone starts at random: name pretrained weights "
            "(MODEL.TIMM.PRETRAINED for timm's), or train several times as long"
        )
    data = (
        "the boxes and classes that training sees: kd-visualize data --config-file "
        f"{config} --dataset {next(iter(cfg.DATASETS.TRAIN), '')} --output boxes.png"
    )
    size = "anchors that fit the objects (kd-visualize sizes, same flags), INPUT.MIN_SIZE_TRAIN"
    return [speed, weights, data, size]
