"""RepPoints: a one-stage detector that represents an object by a set of points."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss_jit, smooth_l1_loss
from torch.nn import functional as F

from ..config import register_config
from ..detectors import register_detector
from ..errors import ConfigError
from ..functional.ranks import mean_over_ranks
from ..functional.reppoints import assign_by_iou, nearest_point
from ..predict.outputs import dense_tap
from .one_stage import one_stage_node, one_stage_parts
from .reppoints_head import PointBoxes, RepPointsHead
from .square_anchors import SquareAnchorDetector, points_of

BASE_SCALE = 4.0  # strides: side of a location's box, and where the sizes of a level start
SMOOTH_L1_BETA = 0.11


@register_config
def add_reppoints_config(cfg) -> None:
    """Add MODEL.REPPOINTS; values of the paper and (recalled) the authors' R-50 config."""
    cfg.MODEL.REPPOINTS = node = one_stage_node(num_convs=3, nms_thresh=0.5)
    node.NUM_POINTS = 9
    # Box of a point set: "moment" (mean and standard deviation) or "minmax".
    node.TRANSFORM = "moment"
    # Share of the gradient that passes from the deformable convolutions to the first points.
    node.GRADIENT_MUL = 0.1
    # IoU of the first boxes: background below, object from.
    node.IOU_THRESHOLDS = [0.4, 0.5]
    node.INIT_WEIGHT = 0.5
    node.REFINE_WEIGHT = 1.0
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0


@META_ARCH_REGISTRY.register()
class RepPoints(SquareAnchorDetector):
    """RepPoints (Yang et al., ICCV 2019), points starting from the centre of a location.

    Losses: smooth L1 of the first boxes (at each object's nearest location) and of the refined
    ones (where the first box has IoU >= 0.5), sides in units of 4 strides, summed over the four
    and divided by the number of positives; focal loss divided by the latter. Divisors are means
    over processes (ours; the authors' code divides by each process's own).

    As in detectron2's detectors, and unlike the authors' code: an image without positives adds
    nothing to their numbers (there it adds 1), and locations in the padding of a batch are
    background and candidates (there those beyond the image, padded to the pyramid's stride, have no
    part in it).

    Args:
        head: a :class:`RepPointsHead`.
        box2box_transform: a :class:`PointBoxes`.
        anchor_generator: one square of BASE_SCALE strides a location. Only its centre and size are
            used here; imitation masks (FGFI) take it as the location's box.
        iou_thresholds: see :func:`~projects.kd.functional.reppoints.assign_by_iou`.
        init_weight, refine_weight: of the box losses.
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
        iou_thresholds=(0.4, 0.5),
        init_weight: float = 0.5,
        refine_weight: float = 1.0,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        **inference,
    ):
        super().__init__(*(backbone, head, head_in_features), **inference)
        self.iou_thresholds = tuple(iou_thresholds)
        self.init_weight = init_weight
        self.refine_weight = refine_weight
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Read MODEL.REPPOINTS."""
        node = cfg.MODEL.REPPOINTS
        if len(node.IOU_THRESHOLDS) != 2 or node.IOU_THRESHOLDS[0] > node.IOU_THRESHOLDS[1]:
            raise ConfigError(
                f"MODEL.REPPOINTS.IOU_THRESHOLDS is {node.IOU_THRESHOLDS}: [background, object]"
            )

        def head(shapes):
            return RepPointsHead(
                channels=shapes[0].channels,
                num_classes=node.NUM_CLASSES,
                num_convs=node.NUM_CONVS,
                norm=node.NORM,
                num_points=node.NUM_POINTS,
                gradient_mul=node.GRADIENT_MUL,
                prior_prob=node.PRIOR_PROB,
            )

        return {
            **one_stage_parts(cfg, node, head, BASE_SCALE),
            "box2box_transform": PointBoxes(node.TRANSFORM, BASE_SCALE),
            "iou_thresholds": node.IOU_THRESHOLDS,
            "init_weight": node.INIT_WEIGHT,
            "refine_weight": node.REFINE_WEIGHT,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
        }

    def forward_training(self, images, features, predictions, gt_instances):
        """``loss_rep_cls``, ``loss_rep_init`` and ``loss_rep_refine``."""
        anchors = self.anchor_generator(features)
        logits, first, refined = self._flat(predictions)
        return self.losses(Boxes.cat(anchors).tensor, logits, first, refined, gt_instances)

    def losses(self, anchors, logits, first, refined, gt_instances) -> dict[str, torch.Tensor]:
        """The losses of the class docstring.

        Args:
            anchors: (A, 4) of all levels.
            logits: (N, A, K).
            first, refined: (N, A, 2 P) points in strides.
            gt_instances: per image, with ``gt_boxes`` and ``gt_classes``.
        """
        centres, strides = points_of(anchors, BASE_SCALE)
        sums = {"init": 0.0, "refine": 0.0}
        classes, counts = [], []
        for image, instances in enumerate(gt_instances):
            truth = instances.gt_boxes.tensor
            boxes = self.box2box_transform.apply_deltas(first[image], anchors)
            nearest = nearest_point(centres, strides, truth, BASE_SCALE)
            overlap = pairwise_iou(instances.gt_boxes, Boxes(boxes.detach()))
            second = assign_by_iou(overlap, *self.iou_thresholds)
            better = self.box2box_transform.apply_deltas(refined[image], anchors)
            for key, found, index in (("init", boxes, nearest), ("refine", better, second)):
                here = index >= 0
                unit = (BASE_SCALE * strides[here])[:, None]
                sums[key] = sums[key] + smooth_l1_loss(
                    found[here] / unit, truth[index[here]] / unit, SMOOTH_L1_BETA, reduction="sum"
                )
            label = torch.where(second == -2, -1, self.num_classes)
            label[second >= 0] = instances.gt_classes[second[second >= 0]]
            classes.append(label)
            counts.append(torch.stack([(nearest >= 0).sum(), (second >= 0).sum()]))
        counts = torch.stack(counts).sum(0).float()
        get_event_storage().put_scalar("num_pos_anchors", counts[1].item() / len(gt_instances))
        number = mean_over_ranks(counts).clamp(min=1.0)
        return {
            "loss_rep_cls": self._focal(logits, torch.stack(classes)) / number[1],
            "loss_rep_init": self.init_weight * sums["init"] / number[0],
            "loss_rep_refine": self.refine_weight * sums["refine"] / number[1],
        }

    def _focal(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        counted = labels >= 0
        target = F.one_hot(labels[counted], self.num_classes + 1)[:, :-1]
        logits = logits[counted].float()
        return sigmoid_focal_loss_jit(
            logits,
            target.to(logits.dtype),
            alpha=self.focal_loss_alpha,
            gamma=self.focal_loss_gamma,
            reduction="sum",
        )

    def _flat(self, predictions):
        _, first, _ = predictions
        points = first[0].shape[1]
        levels = self._transpose_dense_predictions(predictions, [self.num_classes, points, points])
        return [torch.cat(x, dim=1) for x in levels]

    def forward_inference(self, images, features, predictions):
        """Per image Instances with ``pred_boxes``, ``scores`` and ``pred_classes``."""
        logits, _, refined = predictions
        widths = [self.num_classes, refined[0].shape[1]]
        logits, refined = self._transpose_dense_predictions([logits, refined], widths)
        return self.detect(images, features, logits, refined)


register_detector(
    "RepPoints",
    taps={"dense": dense_tap("logits")},  # its points are read by nothing else
    class_key="MODEL.REPPOINTS.NUM_CLASSES",
    label_maps=False,
)
