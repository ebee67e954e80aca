"""How detectron2's GeneralizedRCNN predicts: a proposal network, then one box head or more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ..context import DistillContext
from ..errors import ConfigError
from ..functional.output_kd import jitter_boxes
from ..shared_classes import ALL
from .base import Pairs, Predictor, RegionPair, call_constant
from .dense import (
    check_transforms,
    flatten_cells,
    identity_matches,
    level_pair,
    match_anchors,
)
from .outputs import DenseOutputs, named


@dataclass(frozen=True)
class RegionLabels:
    """What ground truth says about a step.

    Attributes:
        anchors: of each level.
        labels, boxes: per image (A,) and (A, 4) of all anchors; -1 = not in the sample.
        regions: of each stage, the regions that the student's box head got, an entry an image.
    """

    anchors: list[Boxes]
    labels: list[torch.Tensor]
    boxes: list[torch.Tensor]
    regions: list[list[Instances]]


@dataclass(frozen=True)
class RegionPredictions:
    """Raw outputs.

    Attributes:
        proposals: of the proposal network.
        stages: of each box head the (R, K + 1) logits and the (R, K * 4) or (R, 4) deltas.
    """

    proposals: DenseOutputs
    stages: list[tuple[torch.Tensor, torch.Tensor]]


class RCNNPredictor(Predictor):
    """Objectness on anchors, classes and boxes of the student's sampled proposals.

    The same regions are pooled from every feature pyramid, so predictions are aligned.
    """

    name = "GeneralizedRCNN with StandardROIHeads"
    two_stage = True
    taps = frozenset({"rpn", "box", "sampled_proposals"})
    scores = "rpn"
    modules = ("proposal_generator.rpn_head", "roi_heads.box_head", "roi_heads.box_predictor")

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
    def box_heads(self) -> list[tuple[nn.Module, FastRCNNOutputLayers]]:
        """Box head and predictor of each stage."""
        return [(self.model.roi_heads.box_head, self.model.roi_heads.box_predictor)]

    @property
    def levels(self):
        """Those of the proposal network and of the box head."""
        names = (*self.model.proposal_generator.in_features, *self.model.roi_heads.box_in_features)
        return tuple(dict.fromkeys(names))

    @property
    def score_levels(self):
        """MODEL.RPN.IN_FEATURES."""
        return tuple(self.model.proposal_generator.in_features)

    @property
    def num_classes(self):
        """MODEL.ROI_HEADS.NUM_CLASSES."""
        return self.model.roi_heads.num_classes

    def check_student(self):
        """Softmax classes, and proposals that stay as the box head saw them."""
        if any(predictor.use_sigmoid_ce for _, predictor in self.box_heads):
            raise ConfigError(
                "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE: heads on predictions need softmax classes; "
                "set it to False"
            )
        if self.model.roi_heads.train_on_pred_boxes:
            raise ConfigError(
                "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES overwrites the proposals that heads on "
                "predictions read; set it to False"
            )

    def match(self, teacher, scale, key):
        """Anchors of the proposal networks; levels without a match take no part."""
        if type(teacher) is not type(self):
            raise self.other_family(teacher, key)
        teacher.check_student()
        stages = len(self.box_heads), len(teacher.box_heads)
        if stages[0] != stages[1]:
            raise ConfigError(
                f"{key}: the student has {stages[0]} box heads and the teacher {stages[1]} "
                "(MODEL.ROI_BOX_CASCADE_HEAD.IOUS); their predictions cannot be compared"
            )
        for (_, ours), (_, theirs) in zip(self.box_heads, teacher.box_heads, strict=True):
            check_transforms(ours.box2box_transform, theirs.box2box_transform, key)
        generators = (x.model.proposal_generator.anchor_generator for x in (self, teacher))
        names = self.model.proposal_generator.in_features
        return match_anchors(*generators, names, scale, key)

    def check_exchange(self, teacher, key):
        """A box head reads regions of one size."""
        ours, theirs = (tuple(x.model.roi_heads.box_pooler.output_size) for x in (self, teacher))
        if ours != theirs:
            raise ConfigError(
                f"{key}: the student pools regions to {ours} cells and the teacher to {theirs} "
                "(MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION)"
            )

    def assign(self, ctx):
        """Labels of a sample of the anchors; the student's own regions."""
        rpn = self.model.proposal_generator
        anchors = rpn.anchor_generator([ctx.student_features[f] for f in rpn.in_features])
        labels = rpn.label_and_sample_anchors(anchors, ctx.gt)
        return RegionLabels(anchors, *labels, self.regions(ctx))

    def regions(self, ctx: DistillContext) -> list[list[Instances]]:
        """Of each stage the regions that the student's box head got in this step."""
        return [ctx.student_outputs["sampled_proposals"]]

    def student(self, ctx):
        """From the taps."""
        stages = self.tapped(ctx)
        proposals = ctx.student_outputs["rpn"].float()
        return RegionPredictions(proposals, [(x.float(), y.float()) for x, y in stages])

    def tapped(self, ctx: DistillContext) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Logits and deltas of each stage, as the student gave them."""
        return [ctx.student_outputs["box"]]

    def predict(self, features, assigned, *, scale=1.0, constant=True):
        """Proposal network on its levels, box heads on the student's regions."""
        rpn = self.model.proposal_generator
        maps = [features[level] for level in rpn.in_features]
        outputs = call_constant(rpn.rpn_head, maps, constant=constant)
        proposals = named("logits", "boxes")(outputs).float()
        stages = self.predict_regions(features, assigned.regions, scale=scale, constant=constant)
        return RegionPredictions(proposals, stages)

    def predict_regions(
        self,
        features: Mapping[str, torch.Tensor],
        stages: Sequence[list[Instances]],
        *,
        scale: float = 1.0,
        constant: bool = True,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The box heads' logits and deltas, in fp32, as in :meth:`predict`.

        Args:
            features: level under the model's own name to (N, C, H, W).
            stages: regions of each stage, from the first; box heads of further stages do not run.
            scale, constant: as in :meth:`predict`.
        """
        maps = [features[level] for level in self.model.roi_heads.box_in_features]
        outputs = []
        for regions, modules in zip(stages, self.box_heads[: len(stages)], strict=True):
            boxes = [Boxes(x.proposal_boxes.tensor * scale) for x in regions]
            values = self.pool(maps, boxes)
            for module in modules:
                values = call_constant(module, values, constant=constant)
            outputs.append(tuple(x.float() for x in values))
        return outputs

    def pool(self, maps: list[torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        """What a box head reads of the regions, (R, C, h, w)."""
        return self.model.roi_heads.box_pooler(maps, boxes)

    def losses(self, predictions, assigned):
        """``loss_rpn_cls``, ``loss_rpn_loc``, and of each box head ``loss_cls`` and
        ``loss_box_reg``, with ``_stage<k>`` behind where there are several.
        """
        rpn = self.model.proposal_generator
        objectness = [x.flatten(1) for x in flatten_cells(predictions.proposals.logits, 1)]
        deltas = flatten_cells(predictions.proposals.boxes, 4)
        with get_event_storage().name_scope("assistant"):
            losses = rpn.losses(
                assigned.anchors, objectness, assigned.labels, deltas, assigned.boxes
            )
            stages = zip(self.box_heads, predictions.stages, assigned.regions, strict=True)
            for stage, ((_, predictor), outputs, regions) in enumerate(stages):
                suffix = f"_stage{stage}" if len(self.box_heads) > 1 else ""
                for name, loss in predictor.losses(outputs, regions).items():
                    losses[name + suffix] = loss
        return losses

    def pairs(
        self, student, target, assigned, *, levels, masks, match=None, jitter=0.0, shared=ALL
    ):
        """Objectness level by level, classes and boxes region by region."""
        names = self.model.proposal_generator.in_features
        match = identity_matches(names) if match is None else match
        proposals = [
            level_pair(*(student.proposals, target.proposals, place, match[level], 1, masks[level]))
            for place, level in enumerate(names)
            if level in levels and level in match
        ]
        stages = zip(self.box_heads, student.stages, target.stages, assigned.regions, strict=True)
        return Pairs(
            proposals=proposals,
            regions=[
                self._region_pair(
                    predictor.box2box_transform, ours, theirs, regions, jitter, shared
                )
                for (_, predictor), ours, theirs, regions in stages
            ],
        )

    def _region_pair(self, transform, student, target, regions, jitter, shared) -> RegionPair:
        (logits, deltas), (target_logits, target_deltas) = student, target
        boxes = torch.cat([x.proposal_boxes.tensor for x in regions])
        best = target_logits[:, :-1].detach().argmax(1)
        ours = _of_class(deltas, shared.own(best))
        theirs = _of_class(target_deltas.detach(), best)
        if jitter:
            moved = jitter_boxes(transform.apply_deltas(theirs, boxes), jitter)
            theirs = transform.get_deltas(boxes, moved)
        classes = torch.cat([x.gt_classes for x in regions])
        logits = shared.with_background(logits)
        classes, *values = shared.regions(classes, logits, target_logits, ours, theirs)
        return RegionPair(*values, classes)

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
