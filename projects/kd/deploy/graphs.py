"""Detectors as graphs of tensors: an image batch in, named tensors out, nothing of detectron2 left.

A graph normalises and pads its input itself. What comes out lies in pixels of that input; resizing
the image, and bringing results back to it, stay outside (:mod:`.finish`).

====================  ===========================================================================
output                shape and meaning; D detections, N images, K classes, A boxes of all levels
====================  ===========================================================================
``boxes``             (D, 4) XYXY; (N, D, 4) of a set detector; (N, A, 4) without suppression
``scores``            (D,) by descending score; (N, D); (N, A, K) without suppression
``classes``           (D,) or (N, D), from 0
``levels``            (A,) level of each box, without suppression only
``masks``             (D, 1, M, M) probabilities on a grid over each box
``heatmaps``          (D, P, S, S) logits of each keypoint on a grid over each box
``sem_seg``           (N, K, H, W) logits of each pixel
====================  ===========================================================================
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
import torch.nn.functional as F
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.layers import ASPP, DeformConv, ModulatedDeformConv
from detectron2.layers.wrappers import shapes_to_tensor
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, RetinaNet, SemanticSegmentor
from detectron2.modeling.meta_arch import fcos
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList
from torch import nn

from ..errors import ConfigError
from ..functional.set_prediction import cxcywh_to_xyxy
from ..levels import square_side
from ..modeling.conditional_detr import ConditionalDETR, cells_of
from ..modeling.square_anchors import SquareAnchorDetector


class Graph(nn.Module):
    """Base: ``forward`` takes (N, 3, H, W) in 0 to 255, and gives a tuple of tensors.

    Args:
        model: a detector in evaluation mode.

    Attributes:
        outputs: names of the tensors that ``forward`` gives.
        batch: whether any number of images fits, or one only.
        multiples: of which an image's height and width have to be.
    """

    batch = True
    multiples = (1, 1)

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.outputs: tuple[str, ...] = ()
        self.eval()  # torch's exporter puts back the mode that it finds

    def images(self, image: torch.Tensor) -> ImageList:
        """Normalised and padded, with the sizes before padding: tensors while tracing."""
        model = self.model
        height, width = image.shape[-2:]
        tensor = (image - model.pixel_mean) / model.pixel_std
        divisor = model.backbone.size_divisibility
        if divisor > 1:
            tensor = F.pad(tensor, (0, -width % divisor, 0, -height % divisor))
        tracing = torch.jit.is_tracing()
        size = shapes_to_tensor([height, width]) if tracing else (height, width)
        return ImageList(tensor, [size])


def _of_instances(found, *more: str) -> tuple[torch.Tensor, ...]:
    return found.pred_boxes.tensor, found.scores, found.pred_classes, *map(found.get, more)


class DenseGraph(Graph):
    """A one-stage detector with its own suppression."""

    batch = False

    def __init__(self, model: DenseDetector):
        super().__init__(model)
        self.outputs = ("boxes", "scores", "classes")

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the module."""
        images = self.images(image)
        features = self.model.backbone(images.tensor)
        features = [features[name] for name in self.model.head_in_features]
        return _of_instances(
            self.model.forward_inference(images, features, self.model.head(features))[0]
        )


class RawDenseGraph(Graph):
    """A one-stage detector's boxes and scores of all locations, without suppression."""

    def __init__(self, model: DenseDetector):
        super().__init__(model)
        self.outputs = ("boxes", "scores", "levels")

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the module."""
        model, images = self.model, self.images(image)
        features = model.backbone(images.tensor)
        features = [features[name] for name in model.head_in_features]
        logits, *boxes = model.head(features)
        # FCOS's last is the centre-ness; RepPoints' boxes come twice, the second are refined
        centres = boxes.pop() if isinstance(model, fcos.FCOS) else None
        deltas = boxes[-1]
        anchors = model.anchor_generator(features)
        own, scores, levels = [], [], []
        for level, (one, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
            score = permute_to_N_HWA_K(one, model.num_classes).sigmoid()
            if centres is not None:
                score = (score * permute_to_N_HWA_K(centres[level], 1).sigmoid()).sqrt()
            scores.append(score)
            count = one.shape[1] // model.num_classes  # anchors of a location
            own.append(permute_to_N_HWA_K(delta, delta.shape[1] // count))
            levels.append(torch.full_like(anchor.tensor[:, 0], level))
        delta, anchor = torch.cat(own, 1), Boxes.cat(anchors).tensor
        rows = anchor[None].expand(delta.shape[0], -1, -1)
        boxes = model.box2box_transform.apply_deltas(delta.flatten(0, 1), rows.flatten(0, 1))
        return boxes.view_as(rows), torch.cat(scores, 1), torch.cat(levels)


class RCNNGraph(Graph):
    """An R-CNN of any kind, with its suppressions."""

    batch = False

    def __init__(self, model: GeneralizedRCNN):
        super().__init__(model)
        if not isinstance(model.proposal_generator, RPN):
            raise ConfigError(
                f"MODEL.PROPOSAL_GENERATOR.NAME: {type(model.proposal_generator).__name__} cannot "
                "be exported, an R-CNN needs RPN, which makes its proposals in the graph"
            )
        heads = model.roi_heads
        self.outputs = ("boxes", "scores", "classes")
        self.outputs += ("masks",) if getattr(heads, "mask_on", False) else ()
        self.outputs += ("heatmaps",) if getattr(heads, "keypoint_on", False) else ()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the module."""
        images = self.images(image)
        return self.regions(images, self.model.backbone(images.tensor))

    def regions(self, images: ImageList, features) -> tuple[torch.Tensor, ...]:
        """Detections on the backbone's features."""
        model = self.model
        with _traceable():
            proposals, _ = model.proposal_generator(images, features, None)
            found, _ = model.roi_heads(images, features, proposals, None)
        more = {"masks": "pred_masks", "heatmaps": "pred_keypoint_heatmaps"}
        return _of_instances(found[0], *(more[name] for name in self.outputs[3:]))


@contextlib.contextmanager
def _traceable():
    """Without what a trace cannot hold: lengths as numbers, and a loop over keypoints."""

    def heatmaps_only(logits, instances):
        (instances[0].pred_keypoint_heatmaps,) = [logits]

    name = "detectron2.modeling.roi_heads.keypoint_head.keypoint_rcnn_inference"
    with mock.patch(name, heatmaps_only), patch_builtin_len():
        yield


class SegmentationGraph(Graph):
    """Pixel classes. DeepLab pools over windows as large as the crops that it was trained on."""

    def __init__(self, model: SemanticSegmentor):
        super().__init__(model)
        self.outputs = ("sem_seg",)
        for module in model.modules():
            if isinstance(module, ASPP) and module.pool_kernel_size is not None:
                level = model.sem_seg_head.in_features[-1]
                stride = model.backbone.output_shape()[level].stride
                self.multiples = tuple(cells * stride for cells in module.pool_kernel_size)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the module."""
        tensor = self.images(image).tensor
        with mock.patch("torch.nn.functional.adaptive_avg_pool2d", _averages):
            logits, _ = self.model.sem_seg_head(self.model.backbone(tensor), None)
        return (logits[..., : image.shape[-2], : image.shape[-1]],)


def _averages(x: torch.Tensor, size: int) -> torch.Tensor:
    """Adaptive average pooling to (size, size) as two products, for maps of any size in ONNX."""

    def weights(length):
        cells = torch.arange(size, device=x.device)[:, None]
        places = torch.arange(length, device=x.device)[None]
        start = torch.div(cells * length, size, rounding_mode="floor")
        end = torch.div((cells + 1) * length + size - 1, size, rounding_mode="floor")
        return ((places >= start) & (places < end)).to(x.dtype) / (end - start)

    return weights(x.shape[-2]) @ x @ weights(x.shape[-1]).transpose(0, 1)


class PanopticGraph(RCNNGraph):
    """Pixel classes and instances, to be combined outside."""

    def __init__(self, model: PanopticFPN):
        super().__init__(model)
        self.outputs = (*self.outputs, "sem_seg")

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the module."""
        images = self.images(image)
        features = self.model.backbone(images.tensor)
        logits, _ = self.model.sem_seg_head(features, None)
        found = self.regions(images, features)
        return *found, logits[..., : image.shape[-2], : image.shape[-1]]

    def regions(self, images: ImageList, features) -> tuple[torch.Tensor, ...]:
        """Without the pixel classes."""
        outputs, self.outputs = self.outputs, self.outputs[:-1]
        try:
            return super().regions(images, features)
        finally:
            self.outputs = outputs


class SetGraph(Graph):
    """Conditional DETR: a fixed number of detections an image, nothing to suppress."""

    def __init__(self, model: ConditionalDETR):
        super().__init__(model)
        self.outputs = ("boxes", "scores", "classes")

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the module."""
        model = self.model
        height, width = image.shape[-2:]
        tensor = self.images(image).tensor
        feature = model.input_proj(model.backbone(tensor)[model.in_feature])
        sides = shapes_to_tensor([height, width])
        rows, columns = map(cells_of, sides, feature.shape[-2:], tensor.shape[-2:])
        valid = (rows[:, None] & columns).expand(feature.shape[0], -1, -1)
        padded = model.backbone.size_divisibility > 1
        decoded = model.decode(model.transformer.encode(feature, valid, padded))
        scores = decoded.logits[-1].float().sigmoid().flatten(1)
        scores, places = scores.topk(min(model.detections, scores.shape[1]))
        queries = torch.div(places, model.num_classes, rounding_mode="floor")
        boxes = cxcywh_to_xyxy(decoded.boxes[-1])
        boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        sides = image.new_ones(4) * shapes_to_tensor([width, height, width, height])
        return boxes * sides, scores, places % model.num_classes


def graph_of(model: nn.Module, suppress: bool = True) -> Graph:
    """The graph of a detector.

    Args:
        model: the detector, put into evaluation mode.
        suppress: with non-maximum suppression inside. False leaves it outside for one-stage
            detectors, whose graph then takes batches.

    Raises:
        ConfigError: a detector that has no graph, and why.
    """
    square = square_side(getattr(model, "backbone", model))
    if square:
        raise ConfigError(
            f"MODEL.BACKBONE.NAME: the backbone takes squares of {square} pixels only, which "
            "cannot be exported with a free size"
        )
    for name, module in model.named_modules():
        if isinstance(module, (DeformConv, ModulatedDeformConv)):
            raise ConfigError(
                f"MODEL.RESNETS.DEFORM_ON_PER_STAGE: {name} is a deformable convolution of "
                "detectron2, which no format can hold"
            )
    if isinstance(model, (RetinaNet, fcos.FCOS, SquareAnchorDetector)):
        return DenseGraph(model) if suppress else RawDenseGraph(model)
    if not suppress:
        between = isinstance(model, GeneralizedRCNN)
        reason = "suppresses between its stages" if between else "suppresses nothing"
        raise ConfigError(
            f"--no-nms: {type(model).__name__} {reason}, it is for one-stage detectors"
        )
    for kind, graph in (
        (PanopticFPN, PanopticGraph),
        (GeneralizedRCNN, RCNNGraph),
        (SemanticSegmentor, SegmentationGraph),
        (ConditionalDETR, SetGraph),
    ):
        if isinstance(model, kind):
            return graph(model)
    raise ConfigError(
        f"MODEL.META_ARCHITECTURE: {type(model).__name__} cannot be exported: RetinaNet, FCOS, "
        "GFL, RepPoints, GeneralizedRCNN, PanopticFPN, SemanticSegmentor and ConditionalDETR can"
    )
