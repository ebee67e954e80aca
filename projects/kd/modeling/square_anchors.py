"""One-stage detectors with one square a location: what GFL and RepPoints share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Instances


def square_anchors(strides: Sequence[int], scale: float, offset: float) -> DefaultAnchorGenerator:
    """One square of ``scale`` strides a location.

    Args:
        strides: of the levels, in pixels.
        scale: side of a square in strides.
        offset: of the first location, in strides.
    """
    return DefaultAnchorGenerator(
        sizes=[[scale * stride] for stride in strides],
        aspect_ratios=[[1.0]],
        strides=strides,
        offset=offset,
    )


def points_of(anchors: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, 2) centres XY and (R,) strides of square anchors of ``scale`` strides."""
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    return centres, (anchors[:, 2] - anchors[:, 0]) / scale


class SquareAnchorDetector(DenseDetector):
    """Inference of a detector whose ``box2box_transform`` decodes at :func:`square_anchors`.

    Args:
        anchor_generator: of :func:`square_anchors`.
        box2box_transform: has ``apply_deltas``.
        num_classes: K.
        test_score_thresh, test_topk_candidates, test_nms_thresh, max_detections_per_image: as in
            detectron2's RetinaNet.
        *parts, **pixels: of DenseDetector.
    """

    def __init__(
        self,
        *parts,
        anchor_generator,
        box2box_transform,
        num_classes: int,
        test_score_thresh: float,
        test_topk_candidates: int,
        test_nms_thresh: float,
        max_detections_per_image: int,
        **pixels,
    ):
        super().__init__(*parts, **pixels)
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    def detect(self, images, features, logits, deltas) -> list[Instances]:
        """Per image Instances with ``pred_boxes``, ``scores`` and ``pred_classes``.

        Args:
            images: ImageList, its sizes are read.
            features: of the levels.
            logits, deltas: a level's (N, A_l, K), and (N, A_l, ...) for ``box2box_transform``.
        """
        anchors = self.anchor_generator(features)
        results = []
        for image, size in enumerate(images.image_sizes):
            found = self._decode_multi_level_predictions(
                anchors,
                [x[image].sigmoid() for x in logits],
                [x[image] for x in deltas],
                self.test_score_thresh,
                self.test_topk_candidates,
                size,
            )
            keep = batched_nms(
                found.pred_boxes.tensor, found.scores, found.pred_classes, self.test_nms_thresh
            )
            results.append(found[keep[: self.max_detections_per_image]])
        return results
