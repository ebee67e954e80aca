"""Evaluation as a LazyConfig describes it: its test loader and its evaluator."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict

from detectron2.evaluation import DatasetEvaluators, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig

from ..config import LazyNode
from ..config.lazy_files import built, select, target_name
from ..data.lazy_loader import lazy_test_loader
from ..stopping import AgreeingEvaluator, UntilStopped
from .tiles import TiledDetector

logger = logging.getLogger(__name__)

PLACE = "dataloader.evaluator"
# detectron2's evaluators that write predictions where ``output_dir`` says
_WRITING = ("COCOEvaluator", "LVISEvaluator", "SemSegEvaluator", "COCOPanopticEvaluator")


def evaluate_lazy(cfg: LazyNode, model, folder: str) -> OrderedDict:
    """Evaluate a model with the file's ``dataloader.test`` and ``dataloader.evaluator``.

    Args:
        cfg: of a LazyConfig.
        model: called in eval mode; in tiles if TEST.TILES.ENABLED.
        folder: for predictions, of evaluators of detectron2 that the file gives no ``output_dir``.

    Returns:
        ``{task: {metric: value}}``; empty without an evaluator, which is said, and on processes
        other than the main one.

    Raises:
        ConfigError: a part that cannot be instantiated.
    """
    if select(cfg.lazy, PLACE) is None:
        logger.warning(f"{cfg.path}: has no {PLACE}, nothing is evaluated")
        return OrderedDict()
    if cfg.TEST.TILES.ENABLED:
        model = TiledDetector.from_config(cfg, model)
    loader = lazy_test_loader(cfg)  # before the evaluator: built-in data are made when first read
    evaluator = AgreeingEvaluator(_evaluator(cfg, folder))
    results = inference_on_dataset(model, UntilStopped(loader), evaluator) or OrderedDict()
    if comm.is_main_process():
        logger.info("Evaluation results in csv format:")
        print_csv_format(results)
    return results


def _evaluator(cfg: LazyNode, folder: str):
    node = select(copy.deepcopy(cfg.lazy), PLACE)
    nodes = [node] if isinstance(node, DictConfig) else list(node)
    for one in nodes:
        if target_name(one) in _WRITING and one.get("output_dir") is None:
            one.output_dir = folder
    found = [built(cfg, PLACE, one) for one in nodes]
    return found[0] if len(found) == 1 else DatasetEvaluators(found)
