"""Predictions of a detector beside the ground truth of an image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.utils.visualizer import Visualizer

from ..data.images import read_image

MIN_SCORE = 0.3  # detections below are not drawn


def truth_and_predictions(
    record: dict, predictions: Mapping, metadata: Metadata, white: float = 0.0
) -> np.ndarray:
    """An image with its annotations, and beside it the same with predictions.

    Args:
        record: of the data set, as detectron2 has it; its label map is shown beside one alone.
        predictions: what a detector gives for it, in pixels of the stored image: ``instances``,
            ``sem_seg`` (classes, H, W), or both.
        metadata: of the data set, for the names of classes.
        white: see INPUT.WHITE.

    Returns:
        (H, 2 W, 3) uint8, RGB.
    """
    image = read_image(record["file_name"], "RGB", white)
    if "sem_seg" not in predictions:
        record = {key: value for key, value in record.items() if key != "sem_seg_file_name"}
    truth = Visualizer(image, metadata).draw_dataset_dict(record).get_image()
    drawing = Visualizer(image, metadata)
    if "sem_seg" in predictions:
        drawing.draw_sem_seg(predictions["sem_seg"].argmax(dim=0).cpu())
    if "instances" in predictions:
        found = predictions["instances"].to(torch.device("cpu"))
        drawing.draw_instance_predictions(found[found.scores >= MIN_SCORE])
    return np.concatenate([truth, drawing.output.get_image()], axis=1)
