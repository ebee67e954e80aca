"""What evaluations lead to: the best weights, copies of the student, and the card beside them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import nn

from ..errors import disk_fault
from .best import build_best
from .eval_pictures import EvalPictures
from .hooks import ModelEMA
from .model_card import write_card
from .student_files import BEST, write_best, write_safetensors

logger = logging.getLogger(__name__)

FINAL = "model_final"


class Outcome:
    """Writes what stays of a run beside its checkpoints.

    Args:
        cfg: of the run.
        student: the plain detector.
        ema: its average, or None; with SOLVER.EMA.EVAL_ONLY that is what is evaluated and kept.
        model: the training model around it, for the pictures of heads.
    """

    def __init__(
        self,
        cfg: CfgNode,
        student: nn.Module,
        ema: ModelEMA | None = None,
        model: nn.Module | None = None,
    ):
        self.cfg, self.student = cfg, student
        self.pictures = EvalPictures(cfg, student if model is None else model, student)
        self.ema = ema if cfg.SOLVER.EMA.EVAL_ONLY else None
        self._evaluated: tuple[int, dict] = (0, {})  # of this process
        self.best = build_best(cfg)
        self._best: tuple[int, dict] | None = None  # iterations and metrics of model_best.pth
        self._last: tuple[int, dict] = (0, {})  # of the last evaluation

    @property
    def exhausted(self) -> bool:
        """Whether TEST.PATIENCE has come to its end."""
        return self.best is not None and self.best.exhausted

    def resume(self, iterations: int) -> None:
        """Take over what evaluations gave before a run was interrupted."""
        if self.best is not None:
            self.best.load(iterations)
            if self.best.best is not None:
                self._best = (self.best.best[0], {self.best.metric: self.best.best[1]})

    def lacks(self, iterations: int) -> bool:
        """Whether an evaluation was due after so many iterations that a kill took away."""
        period = self.cfg.TEST.EVAL_PERIOD
        due = period > 0 < iterations < self.cfg.SOLVER.MAX_ITER and iterations % period == 0
        return self.best is not None and due and iterations not in self.best

    def _weights(self):
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def evaluate(self, test: Callable, iterations: int, seed: int, final: bool = False) -> dict:
        """Evaluate, and keep the weights if they are the best; all processes call it together.

        Weights that were evaluated last are not evaluated again.

        Args:
            test: gives the nested dict of results of the student as it is.
            iterations: that are finished.
            seed: of the run.
            final: these are the last ones.

        Raises:
            ConfigError: there is no TEST.BEST_METRIC among the results, or no place to write to.
        """
        if self._evaluated[0] != iterations:
            with self._weights():
                results = test(self.student)
                self.take(results, iterations, seed)
                if self.pictures.due(iterations, final):
                    self.pictures.put(iterations)
            self._evaluated = (iterations, results)
        return self._evaluated[1]

    def take(self, results: dict, iterations: int, seed: int) -> None:
        """Note an evaluation of the student as it is."""
        self._last = (iterations, flatten_results_dict(results))
        if self.best is None:
            return
        if self.best.take(results, iterations) and comm.is_main_process():
            folder, (_, value) = self.cfg.OUTPUT_DIR, self.best.best
            path = write_best(folder, self.student, iterations, self.best.metric, value)
            self._copy(BEST, iterations)
            self._best = self._last
            logger.info(f"{path} has the best so far: {self.best}")
        self.best.write()
        self._card(seed)

    def finish(self, iterations: int, seed: int) -> None:
        """The end of a run that was not interrupted."""
        if comm.is_main_process():
            with self._weights():
                self._copy(FINAL, iterations)
            self._card(seed, iterations)

    def _copy(self, name: str, iterations: int) -> None:
        if self.cfg.SOLVER.SAFETENSORS:
            path = os.path.join(self.cfg.OUTPUT_DIR, f"{name}.safetensors")
            about = {"iterations": str(iterations), "about": "model_card.md, config.yaml"}
            write_safetensors(path, self.student, about)

    def _card(self, seed: int, final: int = 0) -> None:
        """Write the card; ``final`` are the iterations of model_final.pth, if there is one."""
        if not comm.is_main_process():
            return
        found = {}
        if final:
            found[FINAL] = (final, self._last[1] if self._last[0] == final else {})
        if self._best is not None:
            found[BEST] = self._best
        files = {f"{name}.pth": value for name, value in found.items()}
        if self.cfg.SOLVER.SAFETENSORS:
            files |= {f"{name}.safetensors": value for name, value in found.items()}
        try:
            write_card(self.cfg, self.student, seed, files)
        except OSError as error:
            reason = disk_fault(error) or error
            logger.warning(f"model_card.md cannot be written: {reason}; training goes on")


class FinishHook(HookBase):
    """Calls ``finish`` at the end of a run that has reached it; place it behind the evaluation."""

    def __init__(self, finish):
        self.finish = finish

    def after_train(self) -> None:
        """Not after a failure or a signal to stop."""
        if self.trainer.iter >= self.trainer.max_iter and not self.trainer.failed:
            self.finish()
