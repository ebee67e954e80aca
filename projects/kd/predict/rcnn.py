"""How detectron2's GeneralizedRCNN with a region proposal network and one box head predicts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage

from ..errors import ConfigError
from ..functional.output_kd import jitter_boxes
from .base import Pairs, Predictor, RegionPair, call_constant
from .dense import (
    DensePredictions,
    check_transforms,
    flatten_cells,
    identity_matches,
    level_pair,
    match_anchors,
)


@dataclass(frozen=True)
class RegionLabels:
    """What ground truth says about a step.

    Attributes:
        anchors: of each level.
        labels, boxes: per image (A,) and (A, 4) of all anchors; -1 = not in the sample.
        regions: the student's sampled proposals, as its box head got them.
    """

    anchors: list[Boxes]
    labels: list[torch.Tensor]
    boxes: list[torch.Tensor]
    regions: list[Instances]


@dataclass(frozen=True)
class RegionPredictions:
    """Raw outputs: of the proposal network; (R, K + 1) logits, (R, K * 4) or (R, 4) deltas."""

    proposals: DensePredictions
    logits: torch.Tensor
    deltas: torch.Tensor


class RCNNPredictor(Predictor):
    """Objectness on anchors, classes and boxes of the student's sampled proposals.

    The same regions are pooled from every feature pyramid, so predictions are aligned.
    """

    name = "GeneralizedRCNN with StandardROIHeads"
    two_stage = True
    taps = frozenset({"rpn", "box", "sampled_proposals"})

    @classmethod
    def fits(cls, model):
        """A cascade has a list of box predictors, a C4 head no pooler of its own."""
        heads = model.roi_heads
        return (
            isinstance(model.proposal_generator, RPN)
            and isinstance(heads, StandardROIHeads)
            and isinstance(getattr(heads, "box_predictor", None), FastRCNNOutputLayers)
        )

    @property
    def levels(self):
        """Those of the proposal network and of the box head."""
        names = (*self.model.proposal_generator.in_features, *self.model.roi_heads.box_in_features)
        return tuple(dict.fromkeys(names))

    @property
    def num_classes(self):
        """MODEL.ROI_HEADS.NUM_CLASSES."""
        return self.model.roi_heads.num_classes

    def check_student(self):
        """Softmax classes, and proposals that stay as the box head saw them."""
        heads = self.model.roi_heads
        if heads.box_predictor.use_sigmoid_ce:
            raise ConfigError(
                "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE: heads on predictions need softmax classes; "
                "set it to False"
            )
        if heads.train_on_pred_boxes:
            raise ConfigError(
                "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES overwrites the proposals that heads on "
                "predictions read; set it to False"
            )

    def match(self, teacher, scale, key):
        """Anchors of the proposal networks; levels without a match take no part."""
        if not isinstance(teacher, RCNNPredictor):
            raise self.other_family(teacher, key)
        teacher.check_student()
        ours, theirs = (x.model.roi_heads.box_predictor for x in (self, teacher))
        check_transforms(ours.box2box_transform, theirs.box2box_transform, key)
        generators = (x.model.proposal_generator.anchor_generator for x in (self, teacher))
        names = self.model.proposal_generator.in_features
        return match_anchors(*generators, names, scale, key)

    def assign(self, ctx):
        """Labels of a sample of the anchors; the student's own sample of proposals."""
        rpn = self.model.proposal_generator
        anchors = rpn.anchor_generator([ctx.student_features[f] for f in rpn.in_features])
        labels = rpn.label_and_sample_anchors(anchors, ctx.gt)
        return RegionLabels(anchors, *labels, ctx.student_outputs["sampled_proposals"])

    def student(self, ctx):
        """From the taps."""
        logits, deltas = ctx.student_outputs["box"]
        proposals = DensePredictions.of(ctx.student_outputs["rpn"])
        return RegionPredictions(proposals, logits.float(), deltas.float())

    def predict(self, features, assigned, *, scale=1.0, constant=True):
        """Proposal network on its levels, box head on the student's regions."""
        rpn, heads = self.model.proposal_generator, self.model.roi_heads
        maps = [features[level] for level in rpn.in_features]
        proposals = DensePredictions.of(call_constant(rpn.rpn_head, maps, constant=constant))
        boxes = [Boxes(x.proposal_boxes.tensor * scale) for x in assigned.regions]
        pooled = heads.box_pooler([features[level] for level in heads.box_in_features], boxes)
        pooled = call_constant(heads.box_head, pooled, constant=constant)
        logits, deltas = call_constant(heads.box_predictor, pooled, constant=constant)
        return RegionPredictions(proposals, logits.float(), deltas.float())

    def losses(self, predictions, assigned):
        """``loss_rpn_cls``, ``loss_rpn_loc``, ``loss_cls`` and ``loss_box_reg``."""
        rpn = self.model.proposal_generator
        objectness = [x.flatten(1) for x in flatten_cells(predictions.proposals.logits, 1)]
        deltas = flatten_cells(predictions.proposals.deltas, 4)
        outputs = predictions.logits, predictions.deltas
        with get_event_storage().name_scope("assistant"):
            losses = rpn.losses(
                assigned.anchors, objectness, assigned.labels, deltas, assigned.boxes
            )
            losses |= self.model.roi_heads.box_predictor.losses(outputs, assigned.regions)
        return losses

    def pairs(self, student, target, assigned, *, levels, masks, match=None, jitter=0.0):
        """Objectness level by level, classes and boxes region by region."""
        names = self.model.proposal_generator.in_features
        match = identity_matches(names) if match is None else match
        proposals = [
            level_pair(*(student.proposals, target.proposals, place, match[level], 1, masks[level]))
            for place, level in enumerate(names)
            if level in levels and level in match
        ]
        return Pairs(
            proposals=proposals, regions=[self._regions(student, target, assigned, jitter)]
        )

    def _regions(self, student, target, assigned, jitter) -> RegionPair:
        transform = self.model.roi_heads.box_predictor.box2box_transform
        regions = torch.cat([x.proposal_boxes.tensor for x in assigned.regions])
        classes = torch.cat([x.gt_classes for x in assigned.regions])
        best = target.logits[:, :-1].detach().argmax(1)
        ours, theirs = _of_class(student.deltas, best), _of_class(target.deltas.detach(), best)
        if jitter:
            boxes = jitter_boxes(transform.apply_deltas(theirs, regions), jitter)
            theirs = transform.get_deltas(regions, boxes)
        return RegionPair(
            student_logits=student.logits,
            target_logits=target.logits,
            student_deltas=ours,
            target_deltas=theirs,
            foreground=(classes >= 0) & (classes < self.num_classes),
        )

    def infer(self, features, image_sizes):
        """detectron2's own inference."""
        images = ImageList(next(iter(features.values())), list(image_sizes))
        proposals, _ = self.model.proposal_generator(images, features, None)
        results, _ = self.model.roi_heads(images, features, proposals, None)
        return results


def _of_class(deltas: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """(R, 4) of class-specific (R, K * 4) deltas; class-agnostic ones are those of all classes."""
    if deltas.shape[1] == 4:
        return deltas
    return deltas.unflatten(1, (-1, 4))[torch.arange(len(deltas), device=deltas.device), classes]
