"""torchvision's detectors as teachers: ``torchvision://fasterrcnn_resnet50_fpn`` and the like.

Features are those of the model's FPN under detectron2's names; detections are its own, with its own
resizing. Its heads' raw outputs are not offered: they count "background" as class 0, RetinaNet's
anchors are rounded and in another order, and FCOS' points lie in the corners of the cells, so they
are not the outputs of a detectron2 student of the same name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from ..detectors import ClassLayer, register_detector
from ..errors import ConfigError, did_you_mean, one_line
from ..weights.files import modules_in
from ..weights.loading import load_weights
from .base import (
    KEY,
    ForeignBackbone,
    ForeignDetector,
    TeacherRequest,
    register_teacher,
    run_on_meta,
)

# of these, torchvision's own builder computes the published weights with norms without epsilon
_WITHOUT_EPSILON = {
    f"{x}_resnet50_fpn" for x in ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet")
}
_COCO_LABELS = 91  # "background", the 80 classes by their COCO ids, and ids without a class


class TorchvisionBackbone(ForeignBackbone):
    """The FPN of a torchvision detector, p2..p6 or p3..p7 by stride."""

    def __init__(self, model: nn.Module, shapes):
        super().__init__(model, shapes, model.transform.size_divisible)
        self.top_block.num_levels = len(shapes) - len(model.backbone.fpn.layer_blocks)

    @property
    def top_block(self) -> nn.Module:
        """What makes the coarsest levels; its class has the name of detectron2's of that kind."""
        return self.model.backbone.fpn.extra_blocks

    def maps(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """Outputs of the model's ``backbone``."""
        return list(self.model.backbone(images).values())


class TorchvisionDetector(ForeignDetector):
    """A torchvision detector, which also detects.

    Args:
        class_of: (labels,) index of the class of each of the model's labels, -1 = none.
        **kwargs: see :class:`ForeignDetector`.
    """

    predicts = resizes = True

    def __init__(self, backbone: TorchvisionBackbone, *, class_of: Sequence[int], **kwargs):
        super().__init__(backbone, **kwargs)
        self.register_buffer("class_of", torch.tensor(list(class_of)), persistent=False)
        model = backbone.model
        roi_heads = getattr(model, "roi_heads", None)
        masks = roi_heads is not None and roi_heads.has_mask()
        keypoints = roi_heads is not None and roi_heads.has_keypoint()
        per_image = getattr(model, "detections_per_img", None) or roi_heads.detections_per_img
        self.evaluated_with = {
            "INPUT.MIN_SIZE_TEST": 0,  # the image as it is: the model resizes by itself
            "MODEL.MASK_ON": masks,
            "MODEL.KEYPOINT_ON": keypoints,
            "TEST.DETECTIONS_PER_IMAGE": per_image,
        }

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Detections of torchvision's own inference, image by image.

        Args:
            batched_inputs: ``image`` (3, H, W) RGB in 0..255, and ``height`` and ``width`` of the
                original, to which results are scaled.

        Returns:
            Per image ``instances``: boxes XYXY in pixels of the original, scores, classes by index
            (labels of no class are left out), masks (R, height, width) bool, keypoints (R, K, 3)
            as x, y and score.
        """
        return [{"instances": self._detect(x)} for x in batched_inputs]

    def _detect(self, x: dict) -> Instances:
        image = x["image"].to(self.device).float() / 255
        size = tuple(image.shape[-2:])
        wanted = (x.get("height", size[0]), x.get("width", size[1]))
        transform = self.backbone.model.transform
        own = transform.min_size, transform.max_size
        if not self.resizes:
            transform.min_size, transform.max_size = (min(size),), max(size)
        try:
            (found,) = self.backbone.model([image])
        finally:
            transform.min_size, transform.max_size = own
        classes = self.class_of[found["labels"]]
        kept = classes >= 0
        scale = torch.tensor([wanted[1] / size[1], wanted[0] / size[0]], device=self.device)
        result = Instances(wanted)
        result.pred_boxes = Boxes(found["boxes"][kept] * scale.repeat(2))
        result.scores = found["scores"][kept]
        result.pred_classes = classes[kept]
        if "masks" in found:
            masks = found["masks"][kept]
            if size != wanted and len(masks):
                masks = F.interpolate(masks, size=wanted, mode="bilinear", align_corners=False)
            result.pred_masks = (
                masks[:, 0] > 0.5 if len(masks) else masks.new_zeros((0, *wanted)) > 0
            )
        if "keypoints" in found:
            points = found["keypoints"][kept][..., :2] * scale
            scores = found["keypoints_scores"][kept][..., None]
            result.pred_keypoints = torch.cat((points, scores), dim=2)
        return result


register_detector(
    "TorchvisionDetector",
    class_layers={
        "backbone.model.roi_heads.box_predictor.cls_score": ClassLayer(labels="class_of"),
        "backbone.model.roi_heads.box_predictor.bbox_pred": ClassLayer(inner=4, labels="class_of"),
        "backbone.model.roi_heads.mask_predictor.mask_fcn_logits": ClassLayer(labels="class_of"),
        "backbone.model.head.classification_head.cls_logits": ClassLayer(labels="class_of"),
    },
)


@register_teacher("torchvision")
def build(request: TeacherRequest) -> TorchvisionDetector:
    """A detector of torchvision by the name of its builder.

    Options: ``CLASSES``, names of the labels from 1 on, of a model that was not trained on COCO (or
    ``NUM_CLASSES`` with "background", where the names do not matter); ``NORM_EPS``, epsilon of the
    backbone's norms, of a model that was trained from weights for which torchvision sets it to 0.
    """
    options = request.read_options(CLASSES=(), NUM_CLASSES=0, NORM_EPS=-1.0)
    name, names = request.name, models.list_models()
    if name not in names:
        near = models.list_models(module=detection)
        raise ConfigError(
            f"{KEY}: torchvision has no model '{name}'; its detectors are {', '.join(near)}"
            f"{did_you_mean(name, near)}"
        )
    published = _published(name)
    classes = list(options["CLASSES"])
    labels = len(classes) + 1 if classes else options["NUM_CLASSES"] or _labels(published)
    try:
        model = models.get_model(name, weights=None, weights_backbone=None, num_classes=labels)
    except Exception as error:  # a classifier, or labels that it does not take
        raise ConfigError(
            f"{KEY}: torchvision cannot build the detector {name} with {labels} labels: "
            f"{one_line(error)}"
        ) from error
    if not isinstance(getattr(model, "backbone", None), detection.backbone_utils.BackboneWithFPN):
        raise ConfigError(f"{KEY}: torchvision's {name} has no FPN whose levels could be distilled")
    weights = "" if request.random else request.weights or _own_file(name, published)
    epsilon = norm_epsilon(name, weights, published, options["NORM_EPS"])
    if epsilon is not None:
        _set_epsilon(model.backbone, epsilon)
    if weights:
        loaded = load_weights(model, weights, "KD.TEACHER.WEIGHTS", request.allow_pickle)
        if loaded.missing:
            raise ConfigError(
                f"KD.TEACHER.WEIGHTS: '{weights}' lacks {len(loaded.missing)} of the parameters of "
                f"torchvision's {name} with {labels} labels: {modules_in(loaded.missing)}; "
                f"{loaded} (KD.TEACHER.OPTS CLASSES names the classes of a model of your own)"
            )
    known, class_of = _meaning(name, classes, labels)
    transform = model.transform
    return TorchvisionDetector(
        TorchvisionBackbone(model, _shapes(name, model.eval())),
        class_of=class_of,
        pixel_mean=[255 * x for x in transform.image_mean],
        pixel_std=[255 * x for x in transform.image_std],
        names=known,
        weights=weights,
    )


def _published(name: str) -> list:
    """The weights that torchvision has for a model, the best first."""
    try:
        weights = models.get_model_weights(name)
    except ValueError:  # a model that you registered
        return []
    return [weights.DEFAULT, *(x for x in weights if x is not weights.DEFAULT)]


def _labels(published) -> int:
    return len(published[0].meta["categories"]) if published else _COCO_LABELS


def _own_file(name: str, published) -> str:
    """The best published weights: the file in torch's cache if it is there, else the address."""
    if not published:
        raise ConfigError(f"KD.TEACHER.WEIGHTS is empty, and torchvision has no weights for {name}")
    url = published[0].url
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    return path if os.path.isfile(path) else url


def norm_epsilon(name: str, weights: str, published, asked: float) -> float | None:
    """Epsilon of the backbone's norms, None = as it is built.

    Args:
        name: of the builder.
        weights: file or address; torchvision's own are known by the name of the file, as their
            builder sets the epsilon of some to 0.
        published: those that torchvision has.
        asked: the option, below 0 = not given.
    """
    if asked >= 0:
        return float(asked)
    file = os.path.basename(weights)
    own = any(x.name == "COCO_V1" and os.path.basename(x.url) == file for x in published)
    return 0.0 if own and name in _WITHOUT_EPSILON else None


def _set_epsilon(backbone: nn.Module, value: float) -> None:
    for module in backbone.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            # torch computes none without; beside any variance the smallest number is none
            module.eps = value or torch.finfo(torch.float32).tiny


def _shapes(name: str, model: nn.Module) -> dict[str, ShapeSpec]:
    """Levels by stride."""
    side, shapes = 256, {}
    for found in run_on_meta(model.backbone, (side, side)).values():
        stride = side // found.shape[-1]
        level = f"p{stride.bit_length() - 1}"
        if level in shapes:
            raise ConfigError(
                f"{KEY}: torchvision's {name} has several maps of stride {stride}, they are no "
                "pyramid; use one of its other detectors"
            )
        shapes[level] = ShapeSpec(channels=found.shape[1], stride=stride)
    return shapes


def _meaning(name: str, classes: list[str], labels: int) -> tuple[dict[str, list[str]], list[int]]:
    """Names by kind, and the class of each label (label 0 is "background")."""
    if classes:
        return {"thing_classes": classes}, [-1, *range(labels - 1)]
    if name.startswith("keypointrcnn") and labels == 2:
        metadata = MetadataCatalog.get("keypoints_coco_2017_train")
        kinds = ("thing_classes", "keypoint_names")
        return {kind: list(metadata.get(kind)) for kind in kinds}, [-1, 0]
    if labels == _COCO_LABELS:
        metadata = MetadataCatalog.get("coco_2017_train")
        index = metadata.thing_dataset_id_to_contiguous_id
        names = {"thing_classes": list(metadata.thing_classes)}
        return names, [index.get(label, -1) for label in range(labels)]
    return {}, [-1, *range(labels - 1)]
