"""Evaluation: detectron2's evaluators with limits, tasks and keypoint scales that fit the data."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    COCOPanopticEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm

from ..config import LazyNode
from ..data.mapper import ImageMapper, NamedErrors
from ..detectors import class_names_of
from ..errors import ConfigError
from ..files import require_pickles
from ..stopping import AgreeingEvaluator, UntilStopped
from .batches import build_test_loader
from .detection_evaluator import DetectionEvaluator
from .lazy_evaluation import evaluate_lazy
from .sem_seg_evaluator import SemanticEvaluator
from .tiles import TiledDetector

# Keypoint scale for OKS where neither the config nor COCO has one: the mean of COCO's 17. Ours.
DEFAULT_OKS_SIGMA = 0.067

# evaluator types of data sets that have nothing but label maps
LABEL_MAPS = ("sem_seg", "cityscapes_sem_seg")
# those with an evaluator here, beside what register_evaluator adds
EVALUATORS = ("coco", *LABEL_MAPS, "coco_panoptic_seg", "ade20k_panoptic_seg")

logger = logging.getLogger(__name__)

_BUILDERS: dict[str, Callable] = {}


def register_evaluator(kind: str) -> Callable:
    """Decorator: ``function(cfg, dataset_name, output_folder)`` builds evaluators of that type."""

    def register(function: Callable) -> Callable:
        _BUILDERS[kind] = function
        return function

    return register


def evaluate(
    cfg: CfgNode,
    model,
    dataset_names: Sequence[str] | None = None,
    output_dir: str | None = None,
    mapper: Callable[[dict], dict] | None = None,
) -> OrderedDict:
    """Evaluate a model; progress and the time left are logged.

    Args:
        cfg: decides the test-time input, the limits, and what is predicted; of a LazyConfig its
            ``dataloader.test`` and ``dataloader.evaluator`` do.
        model: called in eval mode with detectron2's batches; in tiles if TEST.TILES.ENABLED.
        dataset_names: default: DATASETS.TEST.
        output_dir: predictions are written to its ``inference`` folder; default: OUTPUT_DIR.
        mapper: data set dict to the model's input; default: detectron2's for INPUT.

    Returns:
        ``{task: {metric: value}}`` of one data set, ``{data set: {task: ...}}`` of several; empty
        on processes other than the main one. A metric that cannot be computed is NaN.
    """
    names = list(cfg.DATASETS.TEST if dataset_names is None else dataset_names)
    folder = os.path.join(output_dir or cfg.OUTPUT_DIR, "inference")
    if isinstance(cfg, LazyNode) and dataset_names is None and mapper is None:
        return evaluate_lazy(cfg, model, folder)
    if cfg.TEST.TILES.ENABLED:
        if mapper is not None:  # tiles are cut from one image, not from what a mapper adds
            raise ConfigError("TEST.TILES.ENABLED: this evaluation has a mapper of its own")
        model = TiledDetector.from_config(cfg, model)
    if cfg.MODEL.LOAD_PROPOSALS:  # pickles
        files = cfg.DATASETS.PROPOSAL_FILES_TEST
        require_pickles(files, "DATASETS.PROPOSAL_FILES_TEST", cfg.KD.ALLOW_PICKLE)
    results: OrderedDict = OrderedDict()
    for name in names:
        to_input = NamedErrors(mapper or ImageMapper(cfg, is_train=False))
        loader = build_test_loader(cfg, name, to_input)
        own_folder = folder if len(names) == 1 else os.path.join(folder, name)
        evaluator = build_evaluator(cfg, name, own_folder)
        results[name] = inference_on_dataset(
            model, UntilStopped(loader), AgreeingEvaluator(evaluator)
        )
        if comm.is_main_process():
            logger.info("Evaluation results for %s in csv format:", name)
            print_csv_format(results[name])
    return results[names[0]] if len(names) == 1 else results


def check_evaluation(cfg: CfgNode) -> None:
    """Refuse what evaluation on DATASETS.TEST would end with, before anything is trained.

    Raises:
        ConfigError: see :func:`build_evaluator`.
    """
    for name in () if isinstance(cfg, LazyNode) else cfg.DATASETS.TEST:
        kind = _evaluator_kind(cfg, name)
        if kind in LABEL_MAPS or _segments_only(cfg):
            continue
        _detection_limit(cfg)
        oks_sigmas(cfg, name)


def check_best_metric(cfg: CfgNode) -> None:
    """Refuse a TEST.BEST_METRIC that no evaluation of this config can give, and PATIENCE without.

    Raises:
        ConfigError: names the key to change.
    """
    metric, names = cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST
    if cfg.TEST.PATIENCE and not (metric and cfg.TEST.EVAL_PERIOD):
        raise ConfigError(
            "TEST.PATIENCE needs TEST.BEST_METRIC and a TEST.EVAL_PERIOD above 0: it counts "
            "evaluations without a better result"
        )
    if not metric or isinstance(cfg, LazyNode):  # its evaluator says what there is
        return
    if not names:
        raise ConfigError("TEST.BEST_METRIC needs a data set in DATASETS.TEST")
    known = {}
    for name in names:
        tasks = evaluated_tasks(cfg, name)
        if tasks is None:  # of an evaluator that somebody registered
            return
        known |= {f"{name}/{task}" if len(names) > 1 else task: None for task in tasks}
    task, _, last = metric.rpartition("/")
    if task not in known or not last:
        raise ConfigError(
            f"TEST.BEST_METRIC is '{metric}', it must be a metric of "
            f"{', '.join(f'{task}/...' for task in known)} (e.g. bbox/AP, sem_seg/mIoU)"
        )


def evaluated_tasks(cfg: CfgNode, dataset_name: str) -> list[str] | None:
    """Tasks under which :func:`evaluate` gives metrics; None where a registered evaluator says."""
    kind = _evaluator_kind(cfg, dataset_name)
    if kind in _BUILDERS:
        return None
    tasks = []
    if kind not in LABEL_MAPS and not _segments_only(cfg):
        tasks += detection_tasks(cfg)
    if kind != "coco" or MetadataCatalog.get(dataset_name).get("stuff_classes"):
        tasks.append("sem_seg")
    return [*tasks, "panoptic_seg"] if kind.endswith("panoptic_seg") else tasks


def detection_tasks(cfg: CfgNode) -> list[str]:
    """What a detector predicts of each object: boxes, and masks and keypoints as configured."""
    tasks = ["bbox"]
    tasks += ["segm"] if cfg.MODEL.MASK_ON else []
    return tasks + (["keypoints"] if cfg.MODEL.KEYPOINT_ON else [])


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None):
    """The evaluator(s) for the data set's ``evaluator_type``.

    ``coco``: boxes, masks and keypoints as far as the model predicts them, and semantic
    segmentation where data set and model have it (that alone for a model that only segments);
    ``sem_seg``, ``cityscapes_sem_seg`` (with detectron2's mIoU); ``coco_panoptic_seg`` and
    ``ade20k_panoptic_seg``: all of these and the panoptic quality; and the types of
    :func:`register_evaluator`.

    Raises:
        ConfigError: another ``evaluator_type``; TEST.DETECTIONS_PER_IMAGE or
            TEST.KEYPOINT_OKS_SIGMAS do not fit.
    """
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = _evaluator_kind(cfg, dataset_name)
    if kind in _BUILDERS:
        return _BUILDERS[kind](cfg, dataset_name, folder)
    evaluators = []
    if kind not in LABEL_MAPS and not _segments_only(cfg):
        evaluators.append(_detection_evaluator(cfg, dataset_name, folder))
    if kind != "coco" or MetadataCatalog.get(dataset_name).get("stuff_classes"):
        evaluators.append(SemanticEvaluator(dataset_name, output_dir=folder))
    if kind.endswith("panoptic_seg"):
        if importlib.util.find_spec("panopticapi"):
            evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
        else:
            logger.warning("panoptic quality is not computed: panopticapi is not installed")
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _evaluator_kind(cfg: CfgNode, dataset_name: str) -> str:
    """The data set's ``evaluator_type``; ConfigError unless it can be evaluated with."""
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type")
    if kind in _BUILDERS:
        return kind
    if kind not in EVALUATORS:
        raise ConfigError(
            f"DATASETS.TEST: '{dataset_name}' has evaluator_type {kind}; it can be "
            + ", ".join((*EVALUATORS, *_BUILDERS))
        )
    if (kind != "coco" or _segments_only(cfg)) and not metadata.get("stuff_classes"):
        raise ConfigError(
            f"DATASETS.TEST: '{dataset_name}' (evaluator_type {kind}) has no label maps to "
            f"evaluate {cfg.MODEL.META_ARCHITECTURE} with"
        )
    if kind.endswith("panoptic_seg") and not metadata.get("panoptic_json"):
        raise ConfigError(
            f"DATASETS.TEST: '{dataset_name}' (evaluator_type {kind}) has no panoptic_json"
        )
    return kind


def _segments_only(cfg: CfgNode) -> bool:
    return class_names_of(cfg.MODEL.META_ARCHITECTURE) == "stuff_classes"


def oks_sigmas(cfg: CfgNode, dataset_name: str) -> list[float]:
    """TEST.KEYPOINT_OKS_SIGMAS, or a value for each keypoint where COCO's 17 do not fit.

    Raises:
        ConfigError: the config gives a number of values other than the data set's keypoints, or
            one that is not positive.
    """
    given = list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    if not all(isinstance(x, (int, float)) and 0 < x < math.inf for x in given):
        raise ConfigError(f"TEST.KEYPOINT_OKS_SIGMAS is {given}, all values must be positive")
    names = MetadataCatalog.get(dataset_name).get("keypoint_names", [])
    count = len(names) or cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if given and cfg.MODEL.KEYPOINT_ON and len(given) != count:
        raise ConfigError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {len(given)} values, '{dataset_name}' {count} keypoints"
        )
    return given if given or count == 17 else [DEFAULT_OKS_SIGMA] * count


def _detection_limit(cfg: CfgNode) -> int:
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if limit < 1:
        raise ConfigError(f"TEST.DETECTIONS_PER_IMAGE is {limit}, it has to be 1 or more")
    return limit


def _detection_evaluator(cfg: CfgNode, dataset_name: str, folder: str) -> DetectionEvaluator:
    limit = _detection_limit(cfg)
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("json_file") and not os.path.exists(metadata.json_file):
        DatasetCatalog.get(dataset_name)  # built-in data are made when they are first loaded
    return DetectionEvaluator(
        dataset_name,
        output_dir=folder,
        max_dets_per_image=limit,
        kpt_oks_sigmas=oks_sigmas(cfg, dataset_name),
        expected_tasks=detection_tasks(cfg),
    )
