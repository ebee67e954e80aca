"""How detectron2's Cascade R-CNN predicts: box heads one after another, each on refined regions."""

from __future__ import annotations

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.modeling.roi_heads.cascade_rcnn import _ScaleGradient
from detectron2.utils.events import get_event_storage

from .rcnn import RCNNPredictor


class CascadePredictor(RCNNPredictor):
    """Objectness on anchors; classes and boxes of each stage on the regions that the student's got.

    The regions of a later stage are what the student's stage before made of its own. They are
    computed here once more, by detectron2's own functions, so that assistant and teacher predict
    for the very regions that the student's head saw. A stage may have none.
    """

    name = "GeneralizedRCNN with CascadeROIHeads"

    @classmethod
    def fits(cls, model):
        """Any cascade behind detectron2's proposal network."""
        return isinstance(model.proposal_generator, RPN) and isinstance(
            model.roi_heads, CascadeROIHeads
        )

    @property
    def box_heads(self):
        """Box head and predictor of each stage."""
        heads = self.model.roi_heads
        return list(zip(heads.box_head, heads.box_predictor, strict=True))

    @torch.no_grad()
    def regions(self, ctx):
        """The sampled proposals, and those that each stage's boxes became."""
        heads, outputs = self.model.roi_heads, self.tapped(ctx)
        stages = [ctx.student_outputs["sampled_proposals"]]
        sizes = [x.image_size for x in stages[0]]
        with get_event_storage().name_scope("assistant"):
            for stage in range(1, len(self.box_heads)):
                before = heads.box_predictor[stage - 1]
                boxes = before.predict_boxes(outputs[stage - 1], stages[-1])
                regions = heads._create_proposals_from_boxes(boxes, sizes)
                stages.append(heads._match_and_label_boxes(regions, stage, ctx.gt))
        return stages

    def tapped(self, ctx):
        """Logits and deltas of each stage, as the student gave them."""
        return ctx.student_outputs["box"]

    def pool(self, maps, boxes):
        """As in detectron2, features get the mean of the stages' gradients."""
        return _ScaleGradient.apply(super().pool(maps, boxes), 1.0 / len(self.box_heads))
