"""From the tensors of a graph to detectron2's results: what an exported file leaves to its user."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.structures.keypoints import heatmaps_to_keypoints


def finish(outputs: Mapping[str, torch.Tensor], facts: Mapping, item: Mapping) -> dict:
    """One image's results as detectron2's detectors give them.

    Args:
        outputs: by name, of a batch of this image alone.
        facts: of the file (:func:`~projects.kd.deploy.facts.facts_of`).
        item: ``image`` (3, H, W) that went in, and the ``height`` and ``width`` to give results
            for, by default those of ``image``.
    """
    size = tuple(item["image"].shape[-2:])
    wanted = item.get("height", size[0]), item.get("width", size[1])
    result = {}
    if "boxes" in outputs:
        result["instances"] = detector_postprocess(_instances(outputs, facts, size), *wanted)
    if "sem_seg" in outputs:
        result["sem_seg"] = sem_seg_postprocess(outputs["sem_seg"][0], size, *wanted)
    if "panoptic" in facts["after"]:
        limits = facts["after"]["panoptic"]
        result["panoptic_seg"] = combine_semantic_and_instance_outputs(
            result["instances"],
            result["sem_seg"].argmax(0),
            *(limits[name] for name in ("overlap", "stuff_area", "score")),
        )
    return result


def _instances(outputs, facts, size) -> Instances:
    boxes, scores = outputs["boxes"], outputs["scores"]
    if "levels" in outputs:
        limits = facts["after"]["suppression"]
        boxes, scores, classes = suppress(boxes[0], scores[0], outputs["levels"], **limits)
    else:
        classes = outputs["classes"]
        if boxes.dim() == 3:  # of a batch
            boxes, scores, classes = boxes[0], scores[0], classes[0]
    found = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
    if "masks" in outputs:
        found.pred_masks = outputs["masks"]
    if "heatmaps" in outputs:
        points = heatmaps_to_keypoints(outputs["heatmaps"], boxes)
        found.pred_keypoints = points[:, :, [0, 1, 3]]
        found.pred_keypoint_heatmaps = outputs["heatmaps"]
    return found


def suppress(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    levels: torch.Tensor,
    *,
    score_above: float,
    best_of_a_level: int,
    overlap: float,
    detections: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a one-stage detector does with its predictions of an image, as detectron2 has it.

    Args:
        boxes: (A, 4) XYXY in pixels.
        scores: (A, K).
        levels: (A,) level of each box.
        score_above: lower scores are dropped.
        best_of_a_level: so many pairs of box and class go on.
        overlap: IoU above which the lower score of a class is suppressed.
        detections: so many are kept.

    Returns:
        (D, 4), (D,) and (D,) boxes, scores and classes by descending score.
    """
    parts = []
    for level in range(int(levels.max()) + 1):
        places = (levels == level).nonzero()[:, 0]
        above = scores[places] > score_above
        value, order = scores[places][above].sort(descending=True, stable=True)
        rows, classes = above.nonzero()[order[:best_of_a_level]].unbind(1)
        parts.append((boxes[places[rows]], value[:best_of_a_level], classes))
    boxes, scores, classes = (torch.cat(x) for x in zip(*parts, strict=True))
    keep = batched_nms(boxes, scores, classes, overlap)[:detections]
    return boxes[keep], scores[keep], classes[keep]
