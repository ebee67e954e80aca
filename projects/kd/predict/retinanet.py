"""How detectron2's RetinaNet predicts."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, ImageList
from detectron2.utils.events import get_event_storage
from torch import nn

from .base import Pairs, Predictor, call_constant
from .dense import (
    check_transforms,
    flatten_cells,
    identity_matches,
    level_pair,
    match_anchors,
    unflatten_cells,
)
from .outputs import named


@dataclass(frozen=True)
class AnchorLabels:
    """Anchors of each level, and per image labels (R,) and boxes (R, 4) of all of them."""

    anchors: list[Boxes]
    labels: list[torch.Tensor]
    boxes: list[torch.Tensor]


class RetinaNetPredictor(Predictor):
    """Class logits and box deltas on the anchors of every level."""

    name = "RetinaNet"
    taps = frozenset({"dense"})
    scores = "dense"
    modules = ("head",)
    outputs = ("logits", "boxes")  # of the head, in order

    @property
    def levels(self):
        """MODEL.RETINANET.IN_FEATURES."""
        return tuple(self.model.head_in_features)

    @property
    def num_classes(self):
        """MODEL.RETINANET.NUM_CLASSES."""
        return self.model.num_classes

    @property
    def box_width(self) -> int:
        """Numbers of an anchor in ``boxes`` or ``bins``."""
        return 4

    def match(self, teacher, scale, key):
        """See :func:`match_anchors`."""
        if type(teacher) is not RetinaNetPredictor:
            raise self.other_family(teacher, key)
        check_transforms(self.model.box2box_transform, teacher.model.box2box_transform, key)
        generators = self.model.anchor_generator, teacher.model.anchor_generator
        return match_anchors(*generators, self.levels, scale, key)

    def assign(self, ctx):
        """The anchors' labels, as in the student's own loss."""
        features = [ctx.student_features[level] for level in self.levels]
        anchors = self.model.anchor_generator(features)
        return AnchorLabels(anchors, *self.model.label_anchors(anchors, ctx.gt))

    def student(self, ctx):
        """From the ``dense`` tap."""
        return ctx.student_outputs["dense"].float()

    def predict(self, features, assigned, *, scale=1.0, constant=True):
        """The head on all levels."""
        del assigned, scale
        maps = [features[level] for level in self.levels]
        outputs = call_constant(self.model.head, maps, constant=constant)
        return named(*self.outputs)(outputs).float()

    def losses(self, predictions, assigned):
        """``loss_cls`` and ``loss_box_reg``, divided by the student's current normaliser."""
        logits = flatten_cells(predictions.logits, self.num_classes)
        deltas = flatten_cells(predictions.boxes, self.box_width)
        with normaliser_at_rest(self.model), get_event_storage().name_scope("assistant"):
            return self.model.losses(
                assigned.anchors, logits, assigned.labels, deltas, assigned.boxes
            )

    def pairs(self, student, target, assigned, *, levels, masks, match=None, jitter=0.0):
        """One entry a level; anchors that the matcher ignores do not count."""
        match = identity_matches(self.levels) if match is None else match
        labels = unflatten_cells(torch.stack(assigned.labels), student.logits, self.num_classes)
        dense = []
        for place, level in enumerate(self.levels):
            if level in levels and level in match:
                boxes = assigned.anchors[place], self.model.box2box_transform
                pair = level_pair(
                    *(student, target, place, match[level], self.num_classes, masks[level]),
                    labelled=labels[place],
                    boxes=boxes,
                    jitter=jitter,
                )
                dense.append(pair)
        return Pairs(dense=dense)

    def infer(self, features, image_sizes):
        """detectron2's own inference."""
        maps = [features[level] for level in self.levels]
        images = ImageList(maps[0], list(image_sizes))
        return self.model.forward_inference(images, maps, self.model.head(maps))


@contextlib.contextmanager
def normaliser_at_rest(model: nn.Module):
    """Inside, ``model.losses`` divides by its running counts as they are.

    Otherwise a second loss in a step would move the counts of the student's own loss.
    """

    def keep(name, value, initial_value, momentum=0.9):
        return getattr(model, name, initial_value)

    model._ema_update = keep
    try:
        yield
    finally:
        del model._ema_update
