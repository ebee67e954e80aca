"""How FCOS predicts: as RetinaNet does, on one point a cell, and centre-ness beside it."""

from __future__ import annotations

import torch
from detectron2.utils.events import get_event_storage

from ..errors import ConfigError
from .dense import flatten_cells, match_anchors
from .retinanet import RetinaNetPredictor, normaliser_at_rest
from .towers import PointRest


class FCOSPredictor(RetinaNetPredictor):
    """Class logits and distances to the sides of a box, at every location.

    Centre-ness takes part in the ground-truth loss only.
    """

    name = "FCOS"
    outputs = ("logits", "boxes", "centreness")
    rest = PointRest

    def match(self, teacher, scale, key):
        """See :func:`match_anchors`; a location counts as an anchor of one stride."""
        if not isinstance(teacher, FCOSPredictor):
            raise self.other_family(teacher, key)
        ours, theirs = (x.model.box2box_transform.normalize_by_size for x in (self, teacher))
        if ours != theirs:
            raise ConfigError(f"{key}: student and teacher regress boxes in other units")
        generators = self.model.anchor_generator, teacher.model.anchor_generator
        return match_anchors(*generators, self.levels, scale, key)

    def centreness(self, assigned, masks=None) -> torch.Tensor:
        """Scalar: sum of the centre-ness targets at the locations that are assigned to objects.

        Arguments as of :meth:`positives`.
        """
        targets = self.model.compute_ctrness_targets(assigned.anchors, assigned.boxes)
        return targets[self.found(assigned, masks)].sum().float()

    def losses(self, predictions, assigned):
        """``loss_fcos_cls``, ``_loc`` and ``_ctr``, by the student's current normaliser."""
        logits = flatten_cells(predictions.logits, self.num_classes)
        deltas = flatten_cells(predictions.boxes, 4)
        centreness = flatten_cells(predictions.centreness, 1)
        with normaliser_at_rest(self.model), get_event_storage().name_scope("assistant"):
            return self.model.losses(
                assigned.anchors, logits, assigned.labels, deltas, assigned.boxes, centreness
            )
