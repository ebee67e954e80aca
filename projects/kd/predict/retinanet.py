"""How detectron2's RetinaNet predicts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, ImageList
from detectron2.utils.events import get_event_storage
from torch import nn

from ..functional.atss import Candidates
from ..shared_classes import ALL
from ..taps import TapSpec
from .base import Pairs, Predictor, call_constant
from .dense import (
    check_transforms,
    flatten_cells,
    identity_matches,
    level_pair,
    match_anchors,
    unflatten_cells,
)
from .outputs import DenseOutputs, named
from .towers import TowerRest, tower_taps

Masks = Mapping[str, torch.Tensor | None]


@dataclass(frozen=True)
class AnchorLabels:
    """Anchors and (H, W) of each level, per image labels (R,) and boxes (R, 4) of all anchors.

    ``candidates``: per image, of detectors that assign by them.
    """

    anchors: list[Boxes]
    labels: list[torch.Tensor]
    boxes: list[torch.Tensor]
    grids: list[tuple[int, int]]
    candidates: Sequence[Candidates] = ()


class RetinaNetPredictor(Predictor):
    """Class logits and box deltas on the anchors of every level."""

    name = "RetinaNet"
    taps = frozenset({"dense"})
    scores = "dense"
    modules = ("head",)
    outputs = ("logits", "boxes")  # of the head, in order
    rest = TowerRest

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
        anchors, grids = self.anchors(ctx)
        return AnchorLabels(anchors, *self.model.label_anchors(anchors, ctx.gt), grids)

    def known(self, assigned, shared):
        """Anchors of classes that the teacher does not know are ignored."""
        if shared.known is None:
            return assigned
        labels = [x.masked_fill(shared.lacking(x), -1) for x in assigned.labels]
        return dataclasses.replace(assigned, labels=labels)

    def anchors(self, ctx) -> tuple[list[Boxes], list[tuple[int, int]]]:
        """Of each level the anchors and (H, W)."""
        features = [ctx.student_features[level] for level in self.levels]
        grids = [tuple(x.shape[-2:]) for x in features]
        return self.model.anchor_generator(features), grids

    def found(self, assigned: AnchorLabels, masks: Masks | None = None) -> torch.Tensor:
        """(N, R) bool of the anchors that are assigned to an object, outside of a mask none."""
        labels = torch.stack(assigned.labels)
        found = (labels >= 0) & (labels != self.num_classes)
        parts = found.split([len(x) for x in assigned.anchors], dim=1)
        for level, part in zip(self.levels, parts, strict=True):
            mask = (masks or {}).get(level)
            if mask is not None:
                part &= mask.flatten(1).repeat_interleave(part.shape[1] // mask[0].numel(), 1)
        return found

    def positives(self, assigned: AnchorLabels, masks: Masks | None = None) -> torch.Tensor:
        """Scalar: how many anchors are assigned to objects, at least 1 an image.

        The normaliser of losses between dense predictions, before its mean over processes.

        Args:
            assigned: what :meth:`assign` gave.
            masks: level to (N, 1, H, W) bool of the cells that count; None or left out = all.
        """
        return self.found(assigned, masks).sum(1).clamp(min=1).sum().float()

    def student(self, ctx):
        """From the ``dense`` tap."""
        return ctx.student_outputs["dense"].float()

    def predict(self, features, assigned, *, scale=1.0, constant=True):
        """The head on all levels."""
        del assigned, scale
        maps = [features[level] for level in self.levels]
        outputs = call_constant(self.model.head, maps, constant=constant)
        return named(*self.outputs)(outputs).float()

    def tower_taps(self, depth: int, before_relu: bool = False) -> dict[str, TapSpec]:
        """See :func:`~projects.kd.predict.towers.tower_taps`."""
        return tower_taps(self.model.head, depth, before_relu)

    def resume(
        self,
        towers: Mapping[str, Sequence[torch.Tensor | None]],
        depth: int,
        *,
        constant: bool = True,
        places: Sequence[int] | None = None,
    ) -> DenseOutputs:
        """What :meth:`predict` gives, from maps inside the head's towers.

        Args:
            towers: "tower_cls" and "tower_box" to maps (N, C, H, W) after ``depth`` convolutions,
                their norms and ReLUs, one for each level in order; None = left out, and None in the
                outputs. Heads whose norms count their calls
                (:func:`~projects.kd.predict.towers.cycles`) need all levels.
            depth: 0 = the levels' features.
            constant: as in :meth:`predict`.
            places: of each map the place of its level among the head's levels; None = in order.
        """
        maps = towers["tower_cls"], towers["tower_box"]
        places = range(len(maps[0])) if places is None else places
        rest = self.rest(self.model.head, depth)
        outputs = call_constant(rest, *maps, places, constant=constant)
        full = [[x if x is None else x.float() for x in kind] for kind in outputs]
        return named(*self.outputs)(full)

    def losses(self, predictions, assigned):
        """``loss_cls`` and ``loss_box_reg``, divided by the student's current normaliser."""
        logits = flatten_cells(predictions.logits, self.num_classes)
        deltas = flatten_cells(predictions.boxes, self.box_width)
        with normaliser_at_rest(self.model), get_event_storage().name_scope("assistant"):
            return self.model.losses(
                assigned.anchors, logits, assigned.labels, deltas, assigned.boxes
            )

    def pairs(
        self,
        student,
        target,
        assigned,
        *,
        levels,
        masks,
        match=None,
        jitter=0.0,
        shared=ALL,
        decoded=True,
    ):
        """One entry a level; anchors that the matcher ignores do not count.

        ``decoded``: also the boxes. Levels that are not compared may be None in the predictions.
        """
        match = identity_matches(self.levels) if match is None else match
        labels = unflatten_cells(torch.stack(assigned.labels), assigned.grids)
        dense = []
        for place, level in enumerate(self.levels):
            if level in levels and level in match:
                boxes = assigned.anchors[place], self.model.box2box_transform
                pair = level_pair(
                    *(student, target, place, match[level], self.num_classes, masks[level]),
                    labelled=labels[place],
                    boxes=boxes if decoded else None,
                    jitter=jitter,
                    shared=shared,
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
