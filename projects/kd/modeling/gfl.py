"""GFL: a one-stage detector whose boxes are distributions and whose scores are box qualities."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.events import get_event_storage
from fvcore.nn import giou_loss
from torch import nn

from ..config import register_config
from ..detectors import register_detector
from ..functional.atss import Candidates, atss_assign, atss_candidates
from ..functional.gfl import (
    boxes_to_sides,
    distribution_focal_loss,
    integral,
    quality_focal_loss,
    sides_to_boxes,
)
from ..functional.ranks import mean_over_ranks
from ..predict.gfl import GFLPredictor
from ..predict.outputs import dense_tap
from .one_stage import one_stage_node, one_stage_parts, tower_options
from .square_anchors import SquareAnchorDetector, points_of

ANCHOR_SCALE = 8.0  # side of the one square anchor a location, in strides (ATSS)


@register_config
def add_gfl_config(cfg) -> None:
    """Add MODEL.GFL; values of the paper and (recalled) the authors' R-50 config."""
    cfg.MODEL.GFL = node = one_stage_node()
    # n: a side is a distribution over 0, 1, ..., n strides.
    node.REG_MAX = 16
    # ATSS: candidates a level.
    node.TOPK_ASSIGN = 9
    # Exponent of the quality focal loss.
    node.BETA = 2.0
    # Weights of the GIoU loss and of the distribution focal loss.
    node.GIOU_WEIGHT = 2.0
    node.DFL_WEIGHT = 0.25


class GFLHead(RetinaNetHead):
    """RetinaNet's two towers; a side is n + 1 logits, scaled by a learnt factor of its level.

    Args:
        reg_max: n.
        **kwargs: of RetinaNetHead, without ``num_anchors``.
    """

    def __init__(self, *, reg_max: int, conv_dims, **kwargs):
        super().__init__(num_anchors=1, conv_dims=conv_dims, **kwargs)
        self.bbox_pred = nn.Conv2d(conv_dims[-1], 4 * (reg_max + 1), 3, padding=1)
        nn.init.normal_(self.bbox_pred.weight, std=0.01)
        nn.init.zeros_(self.bbox_pred.bias)
        self.scales = nn.Parameter(torch.ones(self._num_features))

    def forward(self, features):
        """Lists over levels: (N, K, H, W) class logits, (N, 4 * (n + 1), H, W) logits of bins."""
        logits, bins = [], []
        for feature, scale in zip(features, self.scales, strict=True):
            logits.append(self.cls_score(self.cls_subnet(feature)))
            bins.append(self.bbox_pred(self.bbox_subnet(feature)) * scale)
        return logits, bins


class IntegralBoxes:
    """Bins to boxes, with the method that detectron2's dense detectors decode by."""

    def apply_deltas(self, bins: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """(R, 4 * (n + 1)) logits at (R, 4) anchors to (R, 4) boxes."""
        centres, strides = points_of(anchors, ANCHOR_SCALE)
        return sides_to_boxes(centres, integral(bins.float()) * strides[:, None])


@META_ARCH_REGISTRY.register()
class GFL(SquareAnchorDetector):
    """Generalised focal loss (Li et al., NeurIPS 2020) with ATSS assignment.

    Losses: quality focal loss over all locations / number of positives; GIoU and distribution
    focal loss (mean of a box's sides) at positives, each weighted by the location's best class
    score and divided by the sum of these weights. Both divisors are means over processes.

    As in detectron2's detectors, and unlike the authors' code: an image without positives adds
    nothing to their number (there it adds 1), and locations in the padding of a batch are
    background and candidates (there those beyond the image, padded to the pyramid's stride, have no
    part in it).

    Args:
        anchor_generator: one square of ANCHOR_SCALE strides a location.
        topk_assign: see :func:`~projects.kd.functional.atss.atss_assign`.
        beta: exponent of the quality focal loss.
        giou_weight, dfl_weight: of the box losses.
        **inference: of :class:`SquareAnchorDetector`, and the pixel statistics.
        others: as in detectron2's RetinaNet.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone,
        head,
        head_in_features,
        anchor_generator,
        num_classes: int,
        topk_assign: int = 9,
        beta: float = 2.0,
        giou_weight: float = 2.0,
        dfl_weight: float = 0.25,
        **inference,
    ):
        super().__init__(
            *(backbone, head, head_in_features),
            anchor_generator=anchor_generator,
            box2box_transform=IntegralBoxes(),
            num_classes=num_classes,
            **inference,
        )
        self.topk_assign = topk_assign
        self.beta = beta
        self.giou_weight = giou_weight
        self.dfl_weight = dfl_weight

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Read MODEL.GFL."""
        node = cfg.MODEL.GFL

        def head(shapes):
            return GFLHead(reg_max=node.REG_MAX, **tower_options(node, shapes))

        return {
            **one_stage_parts(cfg, node, head, ANCHOR_SCALE),
            "topk_assign": node.TOPK_ASSIGN,
            "beta": node.BETA,
            "giou_weight": node.GIOU_WEIGHT,
            "dfl_weight": node.DFL_WEIGHT,
        }

    @property
    def reg_max(self) -> int:
        """n, the longest side in strides."""
        return self.head.bbox_pred.out_channels // 4 - 1

    def forward_training(self, images, features, predictions, gt_instances):
        """``loss_gfl_cls``, ``loss_gfl_box`` and ``loss_gfl_dfl``."""
        logits, bins = self._transpose_dense_predictions(
            predictions, [self.num_classes, 4 * (self.reg_max + 1)]
        )
        anchors = self.anchor_generator(features)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, bins, labels, boxes)

    @torch.no_grad()
    def label_anchors(self, anchors, gt_instances, candidates=None):
        """Per image (A,) classes (K = background) and (A, 4) boxes (0 for background).

        ``candidates``: those of each image, where :meth:`candidates` was called already.
        """
        labels, boxes = [], []
        levels = [x.tensor for x in anchors]
        candidates = candidates or [None] * len(gt_instances)
        for instances, near in zip(gt_instances, candidates, strict=True):
            truth = instances.gt_boxes.tensor
            index = atss_assign(levels, truth, self.topk_assign, near)
            found = index >= 0
            label = torch.full_like(index, self.num_classes)
            label[found] = instances.gt_classes[index[found]]
            box = truth.new_zeros(len(index), 4)
            box[found] = truth[index[found]]
            labels.append(label)
            boxes.append(box)
        return labels, boxes

    def candidates(self, anchors, gt_instances) -> list[Candidates]:
        """Per image the anchors that the assignment looks at."""
        levels = [x.tensor for x in anchors]
        truth = (instances.gt_boxes.tensor for instances in gt_instances)
        return [atss_candidates(levels, boxes, self.topk_assign) for boxes in truth]

    def losses(self, anchors, logits, bins, labels, boxes) -> dict[str, torch.Tensor]:
        """The losses of the class docstring.

        Args:
            anchors: a level's Boxes.
            logits, bins: a level's (N, A_l, K) and (N, A_l, 4 * (n + 1)).
            labels, boxes: see :meth:`label_anchors`.
        """
        logits = torch.cat(logits, dim=1).flatten(0, 1).float()
        bins = torch.cat(bins, dim=1).flatten(0, 1).float()
        labels, boxes = torch.cat(labels), torch.cat(boxes)
        where = (labels < self.num_classes).nonzero().squeeze(1)
        everything = Boxes.cat(anchors).tensor
        near, truth, found = everything[where % len(everything)], boxes[where], bins[where]
        predicted = self.box2box_transform.apply_deltas(found, near)
        quality = logits.new_zeros(len(logits))
        quality[where] = matched_pairwise_iou(Boxes(predicted.detach()), Boxes(truth)).to(quality)
        weight = logits.detach()[where].sigmoid().amax(1) if len(where) else quality[:0]
        centres, strides = points_of(near, ANCHOR_SCALE)
        sides = boxes_to_sides(centres, truth) / strides[:, None]
        dfl = distribution_focal_loss(found.view(-1, self.reg_max + 1), sides.flatten())
        positives, total = mean_over_ranks(
            torch.stack([weight.new_tensor(len(where)), weight.sum()])
        )
        storage = get_event_storage()
        storage.put_scalar("num_pos_anchors", len(where) * len(everything) / len(labels))
        total = total.clamp(min=1.0)
        return {
            "loss_gfl_cls": quality_focal_loss(logits, labels, quality, self.beta).sum()
            / positives.clamp(min=1.0),
            "loss_gfl_box": self.giou_weight
            * (giou_loss(predicted, truth, reduction="none") * weight).sum()
            / total,
            "loss_gfl_dfl": self.dfl_weight * (dfl.view(-1, 4).mean(1) * weight).sum() / total,
        }

    def forward_inference(self, images, features, predictions):
        """Per image Instances with ``pred_boxes``, ``scores`` and ``pred_classes``."""
        logits, bins = self._transpose_dense_predictions(
            predictions, [self.num_classes, 4 * (self.reg_max + 1)]
        )
        return self.detect(images, features, logits, bins)


register_detector(
    "GFL",
    taps={"dense": dense_tap("logits", "bins")},
    class_key="MODEL.GFL.NUM_CLASSES",
    predictor=GFLPredictor,
    label_maps=False,
)
