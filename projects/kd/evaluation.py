"""Evaluation: detectron2's evaluators with limits, tasks and keypoint scales that fit the data."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools.cocoeval import COCOeval

from .data.check import repair_ground_truth
from .data.image_mapper import ImageMapper
from .data.mapper import NamedErrors
from .data.register import is_configured
from .engine.stopping import AgreeingEvaluator, UntilStopped
from .errors import ConfigError
from .files import require_pickles
from .sem_seg_evaluation import SemanticEvaluator
from .taps import class_names_of
from .tiles import TiledDetector

# Keypoint scale for OKS where neither the config nor COCO has one: the mean of COCO's 17. Ours.
DEFAULT_OKS_SIGMA = 0.067
# faster-coco-eval gives pycocotools' numbers to 1e-6 (a test holds it to that) in this series.
FASTER_SERIES = "1.8."

# evaluator types of data sets that have nothing but label maps
LABEL_MAPS = ("sem_seg", "cityscapes_sem_seg")

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
        cfg: decides the test-time input, the limits, and what is predicted.
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
        loader = build_detection_test_loader(cfg, name, mapper=to_input)
        own_folder = folder if len(names) == 1 else os.path.join(folder, name)
        evaluator = build_evaluator(cfg, name, own_folder)
        results[name] = inference_on_dataset(
            model, UntilStopped(loader), AgreeingEvaluator(evaluator)
        )
        if comm.is_main_process():
            logger.info("Evaluation results for %s in csv format:", name)
            print_csv_format(results[name])
    return results[names[0]] if len(names) == 1 else results


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
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type")
    if kind in _BUILDERS:
        return _BUILDERS[kind](cfg, dataset_name, folder)
    known = ("coco", *LABEL_MAPS, "coco_panoptic_seg", "ade20k_panoptic_seg")
    if kind not in known:
        raise ConfigError(
            f"DATASETS.TEST: '{dataset_name}' has evaluator_type {kind}; it can be "
            + ", ".join((*known, *_BUILDERS))
        )
    evaluators = []
    segments_only = class_names_of(cfg.MODEL.META_ARCHITECTURE) == "stuff_classes"
    if segments_only and not metadata.get("stuff_classes"):
        raise ConfigError(
            f"DATASETS.TEST: '{dataset_name}' has no label maps to evaluate "
            f"{cfg.MODEL.META_ARCHITECTURE} with"
        )
    if kind not in LABEL_MAPS and not segments_only:
        evaluators.append(_detection_evaluator(cfg, dataset_name, folder))
    if kind != "coco" or metadata.get("stuff_classes"):
        evaluators.append(SemanticEvaluator(dataset_name, output_dir=folder))
    if kind.endswith("panoptic_seg"):
        if importlib.util.find_spec("panopticapi"):
            evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
        else:
            logger.warning("panoptic quality is not computed: panopticapi is not installed")
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def oks_sigmas(cfg: CfgNode, dataset_name: str) -> list[float]:
    """TEST.KEYPOINT_OKS_SIGMAS, or a value for each keypoint where COCO's 17 do not fit.

    Raises:
        ConfigError: the config gives a number of values other than the data set's keypoints.
    """
    given = list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    names = MetadataCatalog.get(dataset_name).get("keypoint_names", [])
    count = len(names) or cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if given and cfg.MODEL.KEYPOINT_ON and len(given) != count:
        raise ConfigError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {len(given)} values, '{dataset_name}' {count} keypoints"
        )
    return given if given or count == 17 else [DEFAULT_OKS_SIGMA] * count


def _detection_evaluator(cfg: CfgNode, dataset_name: str, folder: str) -> DetectionEvaluator:
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if limit < 1:
        raise ConfigError(f"TEST.DETECTIONS_PER_IMAGE is {limit}, it has to be 1 or more")
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("json_file") and not os.path.exists(metadata.json_file):
        DatasetCatalog.get(dataset_name)  # built-in data are made when they are first loaded
    tasks = ["bbox"]
    tasks += ["segm"] if cfg.MODEL.MASK_ON else []
    tasks += ["keypoints"] if cfg.MODEL.KEYPOINT_ON else []
    return DetectionEvaluator(
        dataset_name,
        output_dir=folder,
        max_dets_per_image=limit,
        kpt_oks_sigmas=oks_sigmas(cfg, dataset_name),
        expected_tasks=tasks,
    )


class DetectionEvaluator(COCOEvaluator):
    """detectron2's COCOEvaluator, with its numbers at 100 detections an image, and with

    - AP, APs, APm and APl of any limit computed at that limit,
    - faster-coco-eval in place of pycocotools for boxes and masks where it is installed,
    - the checked ground truth of KD.DATASETS (the same as in training),
    - NaN for the expected tasks when nothing was detected at all.

    Args:
        dataset_name, **options: see COCOEvaluator; tasks are inferred from the predictions.
        expected_tasks: the tasks reported when there is no prediction to infer them from.
        use_fast_impl: False: pycocotools even where faster-coco-eval is installed.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        expected_tasks: Sequence[str] = ("bbox",),
        use_fast_impl: bool = True,
        **options,
    ):
        super().__init__(dataset_name, use_fast_impl=False, **options)
        limit = self._max_dets_per_image[-1]
        # COCOeval sorts the three limits, so that none may exceed the one that counts
        self._max_dets_per_image = [min(1, limit), min(10, limit), limit]
        self._expected_tasks = list(expected_tasks)
        self._faster = use_fast_impl and _faster_is_installed()
        if is_configured(dataset_name):
            with contextlib.redirect_stdout(io.StringIO()):
                repair_ground_truth(self._coco_api, self._metadata.json_file)

    def _eval_predictions(self, predictions, img_ids=None):
        """Fill ``self._results`` with ``{task: metrics}``; overrides COCOEvaluator's."""
        found = list(itertools.chain.from_iterable(p["instances"] for p in predictions))
        inferred = self._tasks_from_predictions(found) if found else self._expected_tasks
        tasks = sorted(self._tasks or inferred)
        self._to_dataset_categories(found)
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            with PathManager.open(path, "w") as stream:
                json.dump(found, stream)
        if not self._do_evaluation:
            self._logger.info("%s has no annotations to evaluate with", self._metadata.json_file)
            return
        for task in tasks:
            if not self._has_ground_truth(task):
                continue
            scores = self._score(task, found, img_ids) if found else None
            self._results[task] = self._derive_coco_results(
                scores, task, class_names=self._metadata.get("thing_classes")
            )

    def _to_dataset_categories(self, found: list[dict]) -> None:
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping is None:
            return
        to_dataset = {contiguous: own for own, contiguous in mapping.items()}
        for item in found:
            if item["category_id"] not in to_dataset:
                raise ConfigError(
                    f"the model predicts class {item['category_id']}, but '{self._metadata.name}' "
                    f"has {len(to_dataset)} classes: change MODEL.*.NUM_CLASSES or DATASETS.TEST"
                )
            item["category_id"] = to_dataset[item["category_id"]]

    def _has_ground_truth(self, task: str) -> bool:
        key = {"segm": "segmentation", "keypoints": "keypoints"}.get(task, "bbox")
        if all(annotation.get(key) for annotation in self._coco_api.anns.values()):
            return True
        self._logger.warning(
            f"{self._metadata.json_file}: not every annotation has {key}: {task} is not evaluated"
        )
        return False

    def _score(self, task: str, found: list[dict], img_ids) -> SimpleNamespace:
        """COCO's precision array, and ``stats`` as ``_derive_coco_results`` reads them."""
        # with a box in it, the box's area would decide the size band of a mask
        left_out = {"bbox"} if task == "segm" else set()
        items = [{k: v for k, v in item.items() if k not in left_out} for item in found]
        with contextlib.redirect_stdout(io.StringIO()):
            coco_eval = self._coco_eval(task, self._coco_api.loadRes(items))
            if img_ids is not None:
                coco_eval.params.imgIds = img_ids
            coco_eval.evaluate()
            coco_eval.accumulate()
        precision = coco_eval.eval["precision"]  # (IoU, recall, class, size band, limit)
        thresholds = coco_eval.params.iouThrs
        stats = [_mean(precision[..., 0, -1])]
        stats += [_mean(precision[np.isclose(thresholds, t)][..., 0, -1]) for t in (0.5, 0.75)]
        stats += [_mean(precision[..., band, -1]) for band in range(1, precision.shape[3])]
        return SimpleNamespace(stats=stats, eval=coco_eval.eval)

    def _coco_eval(self, task: str, detections):
        if task == "keypoints":  # faster-coco-eval needs its own ground-truth class here
            coco_eval = COCOeval(self._coco_api, detections, task)
            if self._kpt_oks_sigmas:
                coco_eval.params.kpt_oks_sigmas = np.array(self._kpt_oks_sigmas)
            self._check_keypoint_count(len(coco_eval.params.kpt_oks_sigmas), detections)
            return coco_eval
        if self._faster:
            from faster_coco_eval.core.faster_eval_api import COCOeval_faster as implementation
        else:
            implementation = COCOeval
        self._logger.info("Evaluating %s with %s", task, implementation.__name__)
        coco_eval = implementation(self._coco_api, detections, task)
        coco_eval.params.maxDets = list(self._max_dets_per_image)
        return coco_eval

    def _check_keypoint_count(self, scales: int, detections) -> None:
        true, predicted = (
            len(next(iter(coco.anns.values()))["keypoints"]) // 3
            for coco in (self._coco_api, detections)
        )
        if not scales == true == predicted:
            raise ConfigError(
                f"'{self._metadata.name}' has {true} keypoints, the model predicts {predicted} "
                f"(MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS), TEST.KEYPOINT_OKS_SIGMAS has {scales}"
            )


def _mean(precision: np.ndarray) -> float:
    """Mean over what exists (COCO marks classes without objects by -1); -1 if nothing does."""
    existing = precision[precision > -1]
    return float(np.mean(existing)) if existing.size else -1.0


def _faster_is_installed() -> bool:
    if not importlib.util.find_spec("faster_coco_eval"):
        return False
    return importlib.metadata.version("faster-coco-eval").startswith(FASTER_SERIES)
