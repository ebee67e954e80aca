"""Conditional DETR (Meng et al., ICCV 2021) as a detectron2 meta-arch on torch.nn.

``MODEL.META_ARCHITECTURE: "ConditionalDETR"``. Parameters have the names of the authors' code but
for the backbone, which is detectron2's ResNet or a timm model without a pyramid; weights of the
authors, Hugging Face and detrex are converted by :mod:`.conditional_detr_weights`.

Shapes: L decoder layers, N images, Q queries, K classes; boxes (centre x, centre y, width, height)
as shares of the unpadded image.
"""

from __future__ import annotations

import math

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from ..config import register_config
from ..detectors import ClassLayer, register_detector
from ..errors import ConfigError, DataError
from ..functional.decoded import Decoded, Memory
from ..functional.set_prediction import cxcywh_to_xyxy
from ..functional.set_targets import Targets
from ..taps import TapSpec
from .conditional_detr_transformer import MLP, Transformer
from .set_criterion import SetCriterion, named


@register_config
def add_conditional_detr_config(cfg) -> None:
    """Add MODEL.CONDITIONAL_DETR."""
    cfg.MODEL.CONDITIONAL_DETR = node = CfgNode()
    node.NUM_CLASSES = 80
    # The one backbone level that is encoded (C5; with MODEL.RESNETS.RES5_DILATION 2, DC5).
    node.IN_FEATURE = "res5"
    node.NUM_QUERIES = 300
    # Width; a multiple of 4 and of NHEADS.
    node.HIDDEN_DIM = 256
    node.NHEADS = 8
    node.DIM_FEEDFORWARD = 2048
    node.DROPOUT = 0.1
    node.ENC_LAYERS = 6
    node.DEC_LAYERS = 6
    # Weights in the matching cost and in the loss.
    node.CLS_WEIGHT = 2.0
    node.L1_WEIGHT = 5.0
    node.GIOU_WEIGHT = 2.0


@META_ARCH_REGISTRY.register()
class ConditionalDETR(nn.Module):
    """The detector.

    Args:
        backbone: gives a dict of feature maps.
        in_feature: the map that is encoded.
        num_classes, num_queries: K and Q.
        transformer: encoder and decoder.
        criterion: matching and losses of training.
        pixel_mean, pixel_std: per channel.
        detections: at most so many detections an image.
        input_format: "BGR" or "RGB", the order of the loader's images.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_feature: str,
        num_classes: int,
        num_queries: int,
        transformer: Transformer,
        criterion: SetCriterion,
        pixel_mean,
        pixel_std,
        detections: int = 100,
        input_format: str = "RGB",
    ):
        super().__init__()
        self.backbone = backbone
        self.in_feature = in_feature
        self.num_classes = num_classes
        self.transformer = transformer
        self.criterion = criterion
        self.detections = detections
        self.input_format = input_format
        dim = transformer.dim
        self.input_proj = nn.Conv2d(backbone.output_shape()[in_feature].channels, dim, 1)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.class_embed = nn.Linear(dim, num_classes)
        self.bbox_embed = MLP(dim, dim, 4, 3)
        # each class starts at a probability of 1 %
        nn.init.constant_(self.class_embed.bias, -math.log(99))
        nn.init.zeros_(self.bbox_embed.layers[-1].weight)
        nn.init.zeros_(self.bbox_embed.layers[-1].bias)
        self.decoded = nn.Identity()  # passes a Decoded: the place that the tap "decoded" names
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Read MODEL.CONDITIONAL_DETR."""
        node = cfg.MODEL.CONDITIONAL_DETR
        _check_node(node)
        backbone = build_backbone(cfg)
        _check_backbone(backbone, node.IN_FEATURE)
        return {
            "backbone": backbone,
            "in_feature": node.IN_FEATURE,
            "num_classes": node.NUM_CLASSES,
            "num_queries": node.NUM_QUERIES,
            "transformer": Transformer(
                dim=node.HIDDEN_DIM,
                heads=node.NHEADS,
                encoder_layers=node.ENC_LAYERS,
                decoder_layers=node.DEC_LAYERS,
                ffn_dim=node.DIM_FEEDFORWARD,
                dropout=node.DROPOUT,
            ),
            "criterion": SetCriterion(node.CLS_WEIGHT, node.L1_WEIGHT, node.GIOU_WEIGHT),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]):
        """Losses in training, ``[{"instances": Instances}, ...]`` in evaluation.

        Args:
            batched_inputs: detectron2's format: ``image`` (3, H, W); in training ``instances``
                with ``gt_boxes`` (XYXY in pixels of that image) and ``gt_classes``.

        Returns:
            Training: ``loss_class``, ``loss_l1`` and ``loss_giou`` of the last decoder layer, and
            ``loss_*_<k>`` of the others.
        """
        images = self.preprocess_image(batched_inputs)
        memory = self.encode(self.backbone(images.tensor), images)
        if not self.training:
            return self.inference(self.decode(memory), images, batched_inputs)
        if any("instances" not in x for x in batched_inputs):
            raise DataError("DATASETS.TRAIN: ConditionalDETR needs boxes, here are none")
        decoded = self.decoded(self.decode(memory, keep_attention=True))
        targets = Targets.of([x["instances"] for x in batched_inputs], self.device)
        return named(self.criterion(decoded.logits, decoded.boxes, targets))

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalised images, padded to the largest sides with zeros."""
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        return ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )

    def encode(self, features: dict[str, torch.Tensor], images: ImageList) -> Memory:
        """Run the encoder on the backbone's features; padding is masked in it and later."""
        feature = self.input_proj(features[self.in_feature])
        canvas, grid = images.tensor.shape[-2:], feature.shape[-2:]
        sides = torch.tensor(images.image_sizes).to(feature.device, non_blocking=True)
        rows, columns = (
            cells_of(sides[:, axis, None], grid[axis], canvas[axis]) for axis in range(2)
        )
        padded = any(
            side * cells <= (cells - 1) * total
            for size in images.image_sizes
            for side, cells, total in zip(size, grid, canvas, strict=True)
        )
        return self.transformer.encode(feature, rows[:, :, None] & columns[:, None], padded)

    def decode(
        self,
        memory: Memory,
        queries: torch.Tensor | None = None,
        keep_attention: bool = False,
    ) -> Decoded:
        """Predictions of one group of queries; groups of different calls do not interact.

        Args:
            memory: of :meth:`encode`; shared by all groups.
            queries: (Q, D) query embeddings; None = the detector's own.
            keep_attention: give the attentions of all layers as well.
        """
        queries = self.query_embed.weight if queries is None else queries
        states = self.transformer.decoder(queries, memory, keep_attention)
        logits = self.class_embed(states.hidden)
        offsets = self.bbox_embed(states.hidden).float()
        # the sigmoid's inverse stops at 1e-5 from its ends, as in the authors' code
        centre = states.reference.float().sigmoid().clamp(1e-5, 1 - 1e-5).logit()
        boxes = torch.cat([offsets[..., :2] + centre, offsets[..., 2:]], dim=-1).sigmoid()
        kind = self.device.type
        return Decoded(
            logits,
            boxes,
            memory,
            states.self_attention,
            states.cross_attention,
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        )

    def inference(self, decoded: Decoded, images: ImageList, batched_inputs: list[dict]):
        """The highest scores over all queries and classes of the last layer, without NMS."""
        scores = decoded.logits[-1].float().sigmoid().flatten(1)
        scores, places = scores.topk(min(self.detections, scores.shape[1]))
        queries = torch.div(places, self.num_classes, rounding_mode="floor")
        boxes = cxcywh_to_xyxy(decoded.boxes[-1])
        results = []
        for image, (height, width) in enumerate(images.image_sizes):
            found = Instances((height, width))
            size = boxes.new_tensor([width, height, width, height])
            found.pred_boxes = Boxes(boxes[image, queries[image]] * size)
            found.scores = scores[image]
            found.pred_classes = places[image] % self.num_classes
            asked = batched_inputs[image]
            size = asked.get("height", height), asked.get("width", width)
            results.append({"instances": detector_postprocess(found, *size)})
        return results


def cells_of(sides: torch.Tensor, cells: int, total: int) -> torch.Tensor:
    """Which cells of a padded axis look at the image.

    Cell r of R looks at pixel floor(r T / R), as nearest-neighbour resizing of a mask does.

    Args:
        sides: (N, 1) or a scalar, integers: pixels of the image along the axis.
        cells: R.
        total: T, pixels of the padded image along the axis.

    Returns:
        (N, R) or (R,) bool.
    """
    return torch.arange(cells, device=sides.device) * total < sides * cells


def _run_decoder(model: ConditionalDETR, features, images: ImageList) -> None:
    model.decoded(model.decode(model.encode(features, images), keep_attention=True))


register_detector(
    "ConditionalDETR",
    taps={
        "features": TapSpec("backbone"),
        "decoded": TapSpec("decoded", run=_run_decoder, with_images=True),
    },
    class_key="MODEL.CONDITIONAL_DETR.NUM_CLASSES",
    label_maps=False,
    class_layers={"class_embed": ClassLayer()},
)


@BACKBONE_REGISTRY.register()
def build_detr_resnet_backbone(cfg, input_shape) -> Backbone:
    """detectron2's ResNet, with DC5 as torchvision has it.

    MODEL.RESNETS.RES5_DILATION 2 keeps stride 16 and dilates the 3x3 convolutions of res5 but for
    its first block; detectron2's own builder dilates all three, which trained weights do not fit.
    """
    node = cfg.MODEL.RESNETS
    if node.RES5_DILATION not in (1, 2) or (node.RES5_DILATION == 2 and node.DEPTH < 50):
        raise ConfigError(
            f"MODEL.RESNETS.RES5_DILATION is {node.RES5_DILATION} with DEPTH {node.DEPTH}; it can "
            "be 1, or 2 with ResNet-50 and deeper (DC5)"
        )
    backbone = build_resnet_backbone(cfg, input_shape)
    if node.RES5_DILATION == 2 and "res5" in backbone.stage_names:
        first = backbone.res5[0].conv2
        first.dilation = first.padding = (1, 1)
    return backbone


def _check_node(node) -> None:
    if node.HIDDEN_DIM % 4 or node.NHEADS < 1 or node.HIDDEN_DIM % node.NHEADS:
        raise ConfigError(
            f"MODEL.CONDITIONAL_DETR.HIDDEN_DIM {node.HIDDEN_DIM} must be a multiple of 4 and of "
            f"NHEADS {node.NHEADS}"
        )
    least = {"NUM_CLASSES": 1, "NUM_QUERIES": 1, "DIM_FEEDFORWARD": 1, "ENC_LAYERS": 0}
    for key, value in {**least, "DEC_LAYERS": 1}.items():
        if node[key] < value:
            raise ConfigError(f"MODEL.CONDITIONAL_DETR.{key} is {node[key]}, below {value}")
    if not 0 <= node.DROPOUT < 1:
        raise ConfigError(f"MODEL.CONDITIONAL_DETR.DROPOUT is {node.DROPOUT}, it must be in [0, 1)")


def _check_backbone(backbone: Backbone, level: str) -> None:
    shapes = backbone.output_shape()
    if level not in shapes:
        raise ConfigError(
            f"MODEL.CONDITIONAL_DETR.IN_FEATURE: the backbone gives no '{level}', it gives "
            f"{', '.join(shapes)}"
        )
