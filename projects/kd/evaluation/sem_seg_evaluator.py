"""Evaluation of label maps: detectron2's evaluator, with one-line errors."""

from __future__ import annotations

import functools

from detectron2.evaluation import SemSegEvaluator
from detectron2.evaluation.sem_seg_evaluation import load_image_into_numpy_array
from detectron2.utils import comm

from ..errors import DataError


class SemanticEvaluator(SemSegEvaluator):
    """detectron2's SemSegEvaluator; silent when the model predicts no semantic segmentation."""

    def __init__(self, *args, **kwargs):
        # the loader's default, no copy, is an error of numpy 2 where the type of numbers changes
        load = functools.partial(load_image_into_numpy_array, copy=True)
        super().__init__(*args, sem_seg_loading_fn=load, **kwargs)

    def reset(self):
        """Forget all predictions."""
        super().reset()
        self._any = False

    def process(self, inputs, outputs):
        """Count the outputs that hold ``sem_seg``; DataError for unusable label maps."""
        pairs = [(i, o) for i, o in zip(inputs, outputs, strict=True) if "sem_seg" in o]
        for item, output in pairs:
            self._any = True
            path = self.input_file_to_gt_file[item["file_name"]]
            truth = self.sem_seg_loading_fn(path, dtype=int)
            if truth.shape != tuple(output["sem_seg"].shape[-2:]):
                raise DataError(
                    f"{path}: the label map has {truth.shape[1]}x{truth.shape[0]} pixels, the "
                    f"prediction {output['sem_seg'].shape[-1]}x{output['sem_seg'].shape[-2]}"
                )
            wrong = truth[(truth != self._ignore_label) & (truth >= self._num_classes)]
            if wrong.size:
                raise DataError(
                    f"{path}: label {wrong[0]} is none of {self._num_classes} classes, and not "
                    f"{self._ignore_label} (ignored)"
                )
            super().process([item], [output])

    def evaluate(self):
        """``{"sem_seg": {"mIoU": ...}}`` on the main process, nothing without predictions."""
        predicted = comm.all_gather(self._any) if self._distributed else [self._any]
        return super().evaluate() if any(predicted) else None
