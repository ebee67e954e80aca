"""The trainer: detectron2's DefaultTrainer around a distilled or plain student."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from .. import stopping
from ..config.teachers import config_of
from ..data.loader import build_train_loader
from ..data.unlabelled import scale_unlabelled
from ..distiller import build_training_model, student_of
from ..errors import ConfigError, Stopped
from ..files import replacing, writable_folder
from ..precision import step_dtype
from .checkpoint import DistillCheckpointer, Heads
from .export import write_student_config
from .hooks import (
    AuxLRScheduler,
    EMAHook,
    ModelEMA,
    hide_user_errors,
    repeatable_precise_bn,
    running_floats,
    set_floats,
)
from .inherit import inherit
from .loop import TrainLoop
from .optim import MAIN, build_optimizations
from .outcome import FINAL, FinishHook, Outcome
from .processes import wrap_ddp
from .report_hooks import report_hooks
from .resume import (
    changes_since,
    config_text,
    keep_old_values,
    listing,
    place_schedules,
    tell_changes,
)
from .trackers import build_trackers
from .writers import build_writers

logger = logging.getLogger(__name__)


class DistillTrainer(DefaultTrainer):
    """Trains what :func:`~projects.kd.distiller.build_training_model` gives for a config.

    Hooks, writers and file names are detectron2's. What differs: the loop
    (:class:`~projects.kd.engine.loop.TrainLoop`), the loader, and checkpoints of the student that
    ``--resume`` continues exactly. Exact means: the same config, number of processes, software and
    machine, and operations that are themselves deterministic, as on a CPU. Random numbers need no
    saving: every iteration and image seeds the generators from (seed, place), see
    :mod:`projects.kd.seeding`; the seed is SEED, or drawn once and kept in the checkpoint.

    Args:
        cfg: the full config, checked.
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        hide_user_errors()
        cfg = scale_unlabelled(cfg, DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size()))
        self.cfg = cfg
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        # an iteration raised, or a signal came; detectron2 still runs the hooks' after_train
        self.failed = False

        training_model = self.build_model(cfg)
        self.student = student_of(training_model)
        self._unwrapped = training_model
        self._constants = running_floats(training_model, {})
        self.optimizations = build_optimizations(cfg, training_model)
        self.scheduler = self.optimizations[MAIN].scheduler
        self.ema = ModelEMA(self.student, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None
        saved = {"trainer": weakref.proxy(self)}
        if training_model is not self.student:
            saved["distill"] = Heads(training_model.heads)
        if self.ema is not None:
            saved["ema"] = self.ema
        self.checkpointer = DistillCheckpointer(
            self.student,
            cfg.OUTPUT_DIR,
            allow_pickle=cfg.KD.ALLOW_PICKLE,
            allow_missing_distill=cfg.KD.ALLOW_MISSING_DISTILL,
            keep=cfg.SOLVER.KEEP_CHECKPOINTS,
            **saved,
        )
        self.outcome = Outcome(cfg, self.student, self.ema, training_model)
        self._trainer = TrainLoop(
            training_model,
            None,  # made by train(), when the place to start from is known
            {name: item.optimizer for name, item in self.optimizations.items()},
            amp_dtype=step_dtype(cfg),
            accum_steps=cfg.SOLVER.ACCUM_STEPS,
            clips={n: o.clip for n, o in self.optimizations.items() if o.clip is not None},
            active={n: o.active for n, o in self.optimizations.items() if o.active is not None},
            gather_period=cfg.SOLVER.GATHER_METRIC_PERIOD,
            seed=self.seed,
            stop_requested=stopping.requested,
            last_checkpoint=self.checkpointer.last_good,
        )
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The training model on its device."""
        model = build_training_model(cfg)
        logger.info(f"Model:\n{model}")
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0, seed: int | None = None):
        """Override it for data of another kind; it must start at ``start_iter``."""
        return build_train_loader(cfg, start_iter, seed=seed)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module):
        """Evaluate a plain detector on DATASETS.TEST; returns detectron2's dict of results."""
        from ..evaluation import evaluate

        return evaluate(cfg, model)

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from OUTPUT_DIR's last checkpoint, or load MODEL.WEIGHTS into the student.

        Without a checkpoint to resume from, training starts at MODEL.WEIGHTS, as in detectron2,
        and at the teacher's weights where KD.INIT_FROM_TEACHER says so.
        """
        rest = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if "iteration" in rest:
            self.start_iter = rest["iteration"] + 1
            self.outcome.resume(self.start_iter)
            if self.outcome.exhausted:  # TEST.PATIENCE has ended this run
                self.max_iter = self.start_iter
            elif self.start_iter >= self.max_iter:
                logger.warning(
                    f"--resume: {self.start_iter} iterations are done, SOLVER.MAX_ITER is "
                    f"{self.max_iter}: nothing is left to train"
                )
        else:
            for link in getattr(self._unwrapped, "links", ()):
                prefixes = config_of(self.cfg, link.name).KD.INIT_FROM_TEACHER
                if prefixes:
                    inherit(self.student, link.teacher.model, prefixes)

    def write_config(self) -> None:
        """Put the config of this run into OUTPUT_DIR, once it is known that it is used.

        A run with nothing left to train keeps the one that it was trained with.
        """
        path = os.path.join(self.cfg.OUTPUT_DIR, "config.yaml")
        if 0 < self.max_iter <= self.start_iter and os.path.exists(path):
            return
        if comm.is_main_process():
            with replacing(path) as file:
                file.write(self.cfg.dump().encode())
            logger.info(f"Full config saved to {path}")

    def build_writers(self) -> list:
        """metrics.json, WRITERS and event files, from the iteration that is the first."""
        trackers = build_trackers(self.cfg, self.start_iter)
        return build_writers(self.cfg.OUTPUT_DIR, self.start_iter, trackers)

    def build_hooks(self) -> list:
        """detectron2's hooks, on all ranks, with the other learning rates and the average."""
        cfg = self.cfg
        auxiliary = {n: o.scheduler for n, o in self.optimizations.items() if n != MAIN}
        result = [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            AuxLRScheduler(auxiliary) if auxiliary else None,
            repeatable_precise_bn(cfg, self.student, self.build_train_loader),
            EMAHook(self.ema) if self.ema is not None else None,
            # on every rank, because what a checkpoint holds is gathered from all
            hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD),
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, lambda: self.unless_stopped(self._test_and_keep)),
            FinishHook(lambda: self.outcome.finish(self.max_iter, self.seed)),
        ]
        if comm.is_main_process():
            best = self.outcome.best
            result += report_hooks(cfg, best, lambda: self.checkpointer.whole, self.build_writers)
        return [hook for hook in result if hook is not None]

    def _test_and_keep(self, iterations: int = 0):
        """Evaluate the weights after so many iterations (0 = those that are done), once."""
        iterations = iterations or min(self.iter + 1, self.max_iter)
        test = functools.partial(self.test, self.cfg)
        try:
            final = iterations >= self.max_iter
            self._last_eval_results = self.outcome.evaluate(test, iterations, self.seed, final)
        except ConfigError:  # that it could not be known before costs no iteration
            if self.checkpointer.last_saved != iterations - 1 and iterations < self.max_iter:
                self.checkpointer.save(f"model_{iterations - 1:07d}", iteration=iterations - 1)
            raise
        return self._last_eval_results

    def before_train(self) -> None:
        """Hooks, and the evaluation that was due where the interrupted run ended."""
        super().before_train()
        if self.outcome.lacks(self.start_iter):
            logger.info(
                f"--resume: the evaluation after {self.start_iter} iterations is in no best.json "
                "and is made now"
            )
            self.unless_stopped(lambda: self._test_and_keep(self.start_iter))
        if self.outcome.exhausted:
            self._end_early(self.start_iter)

    def _end_early(self, iterations: int) -> None:
        """Write model_final.pth of these weights and end as after SOLVER.MAX_ITER."""
        logger.info(
            f"TEST.PATIENCE {self.cfg.TEST.PATIENCE}: training ends after {iterations} iterations, "
            f"the best was {self.outcome.best}"
        )
        self.max_iter = iterations
        self.iter = self._trainer.iter = iterations - 1
        self.checkpointer.save(FINAL, iteration=self.iter)
        self.iter = iterations
        raise _Enough

    def unless_stopped(self, evaluate: Callable[[], dict]) -> dict:
        """The results of an evaluation; {} after a failed iteration or a signal to stop."""
        if self.failed or self._trainer.stopping:
            return {}
        try:
            return evaluate()
        except stopping.EvaluationStopped:
            self._trainer.stopping = stopping.requested()
            return {}

    def train(self):
        """Run from ``start_iter`` to MAX_ITER; returns the last evaluation's results, if any.

        Raises:
            Stopped: after SIGINT, SIGTERM or SIGUSR1, when the step is finished and a checkpoint
                is written.
        """
        self._trainer.seed = self.seed
        self._trainer.max_iter = self.max_iter
        if self._trainer.data_loader is None:
            self._trainer.data_loader = self.build_train_loader(
                self.cfg, self.start_iter, self.seed
            )
        self._trainer.iter = self.start_iter
        if comm.get_world_size() > 1:
            self._trainer.distribute(functools.partial(wrap_ddp, self.cfg))
        writable_folder(self.cfg.OUTPUT_DIR, "OUTPUT_DIR")
        if comm.is_main_process():
            write_student_config(self.cfg, self.student)
        with stopping.stop_after_step():
            try:
                self._to_the_end()
                if self._trainer.stopping:  # in the evaluation at the end
                    self._raise_stopped()
            except Stopped as stop:
                logger.warning(stop.line)  # the last line of the run
                raise
        return getattr(self, "_last_eval_results", None)

    def _to_the_end(self) -> None:
        try:
            super().train()
        except _Enough:  # past the end of detectron2's function
            if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
                verify_results(self.cfg, self._last_eval_results)

    def run_step(self) -> None:
        """One iteration of the loop."""
        try:
            super().run_step()
        except BaseException:
            self.failed = True
            raise

    def after_step(self) -> None:
        """Hooks, and the end of the run where a signal asks for it."""
        super().after_step()
        if self._trainer.stopping:
            if self.checkpointer.last_saved != self.iter:
                self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
            self.failed = True  # no evaluation at the end
            self._raise_stopped()
        if self.outcome.exhausted and self.iter + 1 < self.max_iter:
            self._end_early(self.iter + 1)

    def after_train(self) -> None:
        """Hooks; a run with nothing left to train is where it was."""
        self.iter = min(self.iter, max(self.max_iter, self.start_iter))
        super().after_train()

    def _raise_stopped(self) -> None:
        comm.synchronize()  # what the main process has written is there for all
        iteration = self.checkpointer.last_saved
        done = (
            f"{iteration + 1} iterations are in {self.checkpointer.get_checkpoint_file()}"
            if iteration >= 0
            else "no iteration was added"
        )
        what = f"{done}; to go on: {stopping.command_to_resume()}"
        raise Stopped(self._trainer.stopping, what, told=True)

    def state_dict(self) -> dict:
        """All but the weights; every rank must call it together."""
        state = super().state_dict()
        state["config"] = config_text(self.cfg)
        state["seed"] = self.seed
        state["running"] = comm.all_gather(running_floats(self._unwrapped, self._constants))
        return state

    def load_state_dict(self, state: dict) -> None:
        """Inverse of :meth:`state_dict`, but what the config says now is used, and named."""
        used, idle = changes_since(state, self.cfg)
        schedulers = [item.scheduler for item in self.optimizations.values()]
        settings = [dict(vars(scheduler)) for scheduler in schedulers]
        try:
            super().load_state_dict(state)
        except ConfigError as error:
            if not used:
                raise
            raise ConfigError(f"{error}; changed since then: {listing(used)}") from error
        place_schedules(schedulers, settings, self.max_iter)
        tell_changes(state["iteration"] + 1, used, idle)
        if self.cfg.SEED < 0:
            self.seed = state["seed"]
        keep_old_values(self.cfg, idle)
        running = state["running"]
        if len(running) != comm.get_world_size():
            logger.warning(
                f"the checkpoint is of {len(running)} processes, this run has "
                f"{comm.get_world_size()}: it does not continue exactly"
            )
        set_floats(self._unwrapped, running[min(comm.get_rank(), len(running) - 1)])


class _Enough(BaseException):
    """Ends the loop without being an error, which detectron2 would log."""
