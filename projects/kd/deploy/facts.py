"""What a program has to know that runs an exported detector: in the file, and beside it."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .graphs import Graph, RawDenseGraph

NAME = "kd.json"  # of the entry in a TorchScript or torch.export archive
KEY = "kd"  # of the entry in an ONNX file's metadata
_CLASSES = ("thing_classes", "stuff_classes", "keypoint_names")

_PIXELS = "boxes are XYXY in pixels of the input: times original side / input side, then clipped"
_SUPPRESSION = "of each level the best scores above the threshold, then suppression by class"
_AFTER = {
    "masks": "a box's mask: the M x M grid stretched over the box, a pixel is inside from 0.5 on",
    "heatmaps": "a keypoint: the highest of its S x S grid, stretched over the box (bicubic)",
    "sem_seg": "a pixel's class: resized bilinearly to the image, the highest logit",
}


def facts_of(cfg: CfgNode, graph: Graph) -> dict:
    """Everything about the input and the outputs, as JSON has it.

    Args:
        cfg: the student's config; INPUT, DATASETS and MODEL.PIXEL_* are read.
        graph: the student's.
    """
    model = graph.model
    return {
        "detector": cfg.MODEL.META_ARCHITECTURE,
        "input": {
            "name": "image",
            "shape": ["images" if graph.batch else 1, 3, "height", "width"],
            "type": "float32",
            "values": "0 to 255",
            "multiples_of": list(graph.multiples),
            "channels": cfg.INPUT.FORMAT,
            "resize": {
                "shortest_edge": cfg.INPUT.MIN_SIZE_TEST,
                "longest_edge": cfg.INPUT.MAX_SIZE_TEST,
                "method": "bilinear, as Pillow resizes; a shortest edge of 0 leaves images as are",
            },
            "in_the_graph": {
                "mean": model.pixel_mean.flatten().tolist(),
                "std": model.pixel_std.flatten().tolist(),
                "padded_to_multiples_of": max(model.backbone.size_divisibility, 1),
            },
        },
        "outputs": list(graph.outputs),
        "batch": graph.batch,
        "after": _after(graph),
        **_names(cfg),
        "made_by": {
            "torch": torch.__version__,
            "detectron2": detectron2.__version__,
            "python": platform.python_version(),
        },
    }


def _after(graph: Graph) -> dict:
    """What is left to do with the outputs, in words and in numbers."""
    model = graph.model
    steps = [] if graph.outputs == ("sem_seg",) else [_PIXELS]
    steps += [_AFTER[name] for name in graph.outputs if name in _AFTER]
    found: dict = {"steps": steps}
    if isinstance(graph, RawDenseGraph):
        found["suppression"] = {
            "score_above": model.test_score_thresh,
            "best_of_a_level": model.test_topk_candidates,
            "overlap": model.test_nms_thresh,
            "detections": model.max_detections_per_image,
        }
        steps.insert(0, _SUPPRESSION)
    if hasattr(model, "combine_overlap_thresh"):
        found["panoptic"] = {
            "overlap": model.combine_overlap_thresh,
            "stuff_area": model.combine_stuff_area_thresh,
            "score": model.combine_instances_score_thresh,
        }
    return found


def _names(cfg: CfgNode) -> Mapping[str, list[str]]:
    names = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    metadata = MetadataCatalog.get(names[0]) if names else {}
    return {key: list(metadata.get(key)) for key in _CLASSES if metadata.get(key)}
