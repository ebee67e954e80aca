"""The hooks of the main process that tell how a run goes."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from ..config import LazyNode
from ..config.teachers import config_of, module_name, teacher_names
from .best import BestResult
from .cache_report import CacheReport
from .hooks import LossBalance, PeriodicWriter
from .learning import LearningCheck
from .progress import Progress

PERIOD = 20  # iterations between two lines, and two writes


def report_hooks(
    cfg: CfgNode,
    best: BestResult | None,
    starts_whole: Callable[[], bool],
    make_writers: Callable[[], list],
) -> list[HookBase]:
    """Warnings, the line of a period, and the writers; in this order, behind the evaluation.

    Args:
        cfg: of the run.
        best: the evaluations so far, or None.
        starts_whole: see :class:`~projects.kd.engine.learning.LearningCheck`.
        make_writers: gives the writers when training starts.
    """
    names = teacher_names(cfg) if cfg.KD.META_ARCHITECTURE else ()
    heads = [module_name(name, head) for name in names for head in config_of(cfg, name).KD.HEADS]
    period = max(PERIOD, cfg.SOLVER.GATHER_METRIC_PERIOD)  # the losses are there by then
    found: list[HookBase] = []
    if heads:
        found += [LossBalance(cfg.SOLVER.GATHER_METRIC_PERIOD), CacheReport(cfg, cfg.KD.LOG_PERIOD)]
    found += [LearningCheck(cfg, starts_whole), Progress(heads, period, best)]
    writes = cfg.SOLVER.GATHER_METRIC_PERIOD if isinstance(cfg, LazyNode) else PERIOD
    return [*found, PeriodicWriter(make_writers, writes)]
