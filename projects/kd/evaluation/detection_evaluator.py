"""The evaluator of boxes, masks and keypoints: COCO's numbers at any limit and with any ids."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import os
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager
from pycocotools.cocoeval import COCOeval

from ..data.ground_truth import FIELDS, ByOwnId, GroundTruth
from ..data.register import is_configured
from ..errors import ConfigError

# faster-coco-eval gives pycocotools' numbers to 1e-6 (a test holds it to that) in this series.
FASTER_SERIES = "1.8."


class DetectionEvaluator(COCOEvaluator):
    """detectron2's COCOEvaluator, with its numbers at 100 detections an image, and with

    - AP, APs, APm and APl of any limit computed at that limit,
    - faster-coco-eval in place of pycocotools for boxes and masks where it is installed,
    - ids of any kind: both get numbers from 1, results are written with the file's own ids,
    - the checked ground truth of KD.DATASETS (the same as in training),
    - masks or keypoints scored where some annotations lack them,
    - NaN for the expected tasks when nothing was detected at all.

    Args:
        dataset_name, tasks, distributed, output_dir, kpt_oks_sigmas: see COCOEvaluator; without
            tasks they are inferred from the predictions.
        max_dets_per_image: the detections of an image and class that count.
        expected_tasks: the tasks reported when there is no prediction to infer them from.
        use_fast_impl: False: pycocotools even where faster-coco-eval is installed.

    Raises:
        DataError: see :func:`~projects.kd.data.coco_json.read_coco`.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int = 100,
        kpt_oks_sigmas: Sequence[float] = (),
        expected_tasks: Sequence[str] = ("bbox",),
        use_fast_impl: bool = True,
    ):
        # COCOEvaluator's constructor would have pycocotools read the file as it is
        self._logger = logging.getLogger(__name__)
        self._tasks = tasks
        self._distributed = distributed
        self._output_dir = output_dir
        self._kpt_oks_sigmas = list(kpt_oks_sigmas)
        self._cpu_device = torch.device("cpu")
        self._metadata = MetadataCatalog.get(dataset_name)
        if not self._metadata.get("json_file"):
            if output_dir is None:
                raise ConfigError(f"'{dataset_name}' has no json_file: give an output_dir for one")
            path = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
            convert_to_coco_json(dataset_name, path)
            self._metadata.json_file = path
        self._ground_truth = GroundTruth(self._metadata, mended=is_configured(dataset_name))
        self._coco_api = self._ground_truth.api
        self._do_evaluation = self._ground_truth.has_annotations
        # COCOeval sorts the three limits, so that none may exceed the one that counts
        limit = max_dets_per_image
        self._max_dets_per_image = [min(1, limit), min(10, limit), limit]
        self._expected_tasks = list(expected_tasks)
        self._faster = use_fast_impl and _faster_is_installed()

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
        rows = self._coco_api.dataset["annotations"]
        without = self._ground_truth.lacking(task)
        if not without:
            return True
        field = FIELDS[task]
        if len(without) == len(rows) or (
            task == "keypoints" and not any(row.get("num_keypoints") for row in rows)
        ):
            self._logger.warning(
                f"{self._metadata.json_file}: no annotation has {field}: {task} is not evaluated"
            )
            return False
        self._logger.warning(
            f"{self._metadata.json_file}: {len(without)} of {len(rows)} annotations have no "
            f"{field}: what is detected in their boxes counts neither way for {task}"
        )
        return True

    def _eval_box_proposals(self, predictions):
        api, self._coco_api = self._coco_api, ByOwnId(self._ground_truth)
        try:
            super()._eval_box_proposals(predictions)
        finally:
            self._coco_api = api

    def _score(self, task: str, found: list[dict], img_ids) -> SimpleNamespace:
        """COCO's precision array, and ``stats`` as ``_derive_coco_results`` reads them."""
        truth = self._ground_truth.for_task(task)
        image_number, category_numbers = (
            self._ground_truth.image_number,
            self._ground_truth.category_numbers,
        )
        items = [
            {
                **item,
                "image_id": image_number(item["image_id"]),
                "category_id": category_numbers[item["category_id"]],
            }
            for item in found
        ]
        if task == "segm":  # with a box in it, the box's area would decide the band of a mask
            for item in items:
                del item["bbox"]
        with contextlib.redirect_stdout(io.StringIO()):
            coco_eval = self._coco_eval(task, truth, truth.loadRes(items))
            if img_ids is not None:
                coco_eval.params.imgIds = [image_number(own) for own in img_ids]
            coco_eval.evaluate()
            coco_eval.accumulate()
        precision = coco_eval.eval["precision"]  # (IoU, recall, class, size band, limit)
        thresholds = coco_eval.params.iouThrs
        stats = [_mean(precision[..., 0, -1])]
        stats += [_mean(precision[np.isclose(thresholds, t)][..., 0, -1]) for t in (0.5, 0.75)]
        stats += [_mean(precision[..., band, -1]) for band in range(1, precision.shape[3])]
        return SimpleNamespace(stats=stats, eval=coco_eval.eval)

    def _coco_eval(self, task: str, truth, detections):
        if task == "keypoints":  # faster-coco-eval needs its own ground-truth class here
            coco_eval = COCOeval(truth, detections, task)
            if self._kpt_oks_sigmas:
                coco_eval.params.kpt_oks_sigmas = np.array(self._kpt_oks_sigmas)
            self._check_keypoint_count(len(coco_eval.params.kpt_oks_sigmas), truth, detections)
            return coco_eval
        if self._faster:
            from faster_coco_eval.core.faster_eval_api import COCOeval_faster as implementation
        else:
            implementation = COCOeval
        self._logger.info("Evaluating %s with %s", task, implementation.__name__)
        coco_eval = implementation(truth, detections, task)
        coco_eval.params.maxDets = list(self._max_dets_per_image)
        return coco_eval

    def _check_keypoint_count(self, scales: int, truth, detections) -> None:
        true, predicted = (
            len(next(iter(coco.anns.values()))["keypoints"]) // 3 for coco in (truth, detections)
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
