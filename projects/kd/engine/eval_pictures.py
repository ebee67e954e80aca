"""Pictures of evaluations for the writers: detections, and where each head pulls the student."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from ..data.mapper import ImageMapper, NamedErrors, build_annotated_mapper
from ..distiller import DistillMetaArch
from ..evaluation.pictures import truth_and_predictions
from ..evaluation.tiles import TiledDetector
from .pulls import heat_row, pulls, undisturbed


class EvalPictures:
    """Puts pictures of some images into the event storage, every TEST.PICTURES.PERIOD evaluations.

    ``detections/<n>`` has the ground truth on the left and the student's predictions on the right;
    ``pull/<head>/<n>`` the image and the maps that the head acts on, where its gradient is large
    (:func:`~projects.kd.engine.pulls.pulls`). Weights, statistics and random numbers stay as they
    are.

    Args:
        cfg: of the run.
        model: the training model; a wrapper has heads to show.
        student: the plain detector in it.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, student: nn.Module):
        self.cfg, self.model, self.student = cfg, model, student

    def due(self, iterations: int, final: bool) -> bool:
        """Whether the evaluation after so many iterations is one of those that are shown."""
        every = self.cfg.TEST.PICTURES.PERIOD
        number = iterations // self.cfg.TEST.EVAL_PERIOD if self.cfg.TEST.EVAL_PERIOD else 0
        return every > 0 and (final or number % every == 0)

    def records(self) -> list[dict]:
        """The images that are shown, evenly spaced in the first data set of DATASETS.TEST."""
        everything = DatasetCatalog.get(self.cfg.DATASETS.TEST[0])
        count = min(self.cfg.TEST.PICTURES.COUNT, len(everything))
        places = np.linspace(0, len(everything) - 1, count).round().astype(int)
        return [everything[i] for i in places]

    def put(self, iterations: int) -> None:
        """Draw and store; all processes call it, since heads may talk to each other."""
        records = self.records()
        if comm.is_main_process():
            self._detections(records)
        if isinstance(self.model, DistillMetaArch):
            self._pulls(records, iterations)

    def _detections(self, records: list[dict]) -> None:
        cfg = self.cfg
        to_input = NamedErrors(ImageMapper(cfg, is_train=False))
        metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
        model = self.student
        if cfg.TEST.TILES.ENABLED:
            model = TiledDetector.from_config(cfg, model)
        training = self.student.training
        self.student.eval()
        try:
            with torch.no_grad():
                for number, record in enumerate(records):
                    predictions = model([to_input(record)])[0]
                    picture = truth_and_predictions(record, predictions, metadata, cfg.INPUT.WHITE)
                    _store(f"detections/{number}", picture)
        finally:
            self.student.train(training)

    def _pulls(self, records: list[dict], iterations: int) -> None:
        to_example = build_annotated_mapper(self.cfg)
        for number, record in enumerate(records):
            labelled = record.get("annotations") or "sem_seg_file_name" in record
            example = to_example(record) if labelled else {}
            if not len(example.get("instances", ())) and "sem_seg" not in example:
                continue  # nothing that the student's own losses could be of
            with undisturbed(self.model):
                found = pulls(self.model, example, iterations)
            rgb = example["image"] if self.cfg.INPUT.FORMAT == "RGB" else example["image"].flip(0)
            if comm.is_main_process() and len(rgb) == 3:
                image = rgb.permute(1, 2, 0).numpy()
                for head, maps in found.items():
                    _store(f"pull/{head}/{number}", heat_row(image, maps))


def _store(name: str, picture: np.ndarray) -> None:
    image = np.ascontiguousarray(picture.transpose(2, 0, 1))
    get_event_storage().put_image(name, torch.from_numpy(image))
