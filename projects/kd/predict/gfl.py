"""How GFL predicts: as RetinaNet does, on one square a cell, a side being a distribution."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage

from ..errors import ConfigError
from ..functional.atss import Candidates
from ..functional.ld import valuable_region
from ..shared_classes import ALL, SharedClasses
from .dense import flatten_cells, match_anchors, unflatten_cells
from .retinanet import AnchorLabels, RetinaNetPredictor
from .towers import BinRest


class GFLPredictor(RetinaNetPredictor):
    """Class logits (of the quality of a box) and logits of the sides' bins.

    Boxes are compared after the integral, so student and teacher may have other numbers of bins.
    """

    name = "GFL"
    outputs = ("logits", "bins")
    rest = BinRest

    @property
    def box_width(self):
        """4 * (n + 1), n of MODEL.GFL.REG_MAX."""
        return 4 * (self.model.reg_max + 1)

    def match(self, teacher, scale, key):
        """See :func:`match_anchors`; a location counts as its square of 8 strides."""
        if not isinstance(teacher, GFLPredictor):
            raise self.other_family(teacher, key)
        generators = self.model.anchor_generator, teacher.model.anchor_generator
        return match_anchors(*generators, self.levels, scale, key)

    def assign(self, ctx):
        """The anchors' labels, and the candidates that they were chosen from."""
        anchors, grids = self.anchors(ctx)
        candidates = self.model.candidates(anchors, ctx.gt)
        labels = self.model.label_anchors(anchors, ctx.gt, candidates)
        return AnchorLabels(anchors, *labels, grids, candidates)

    def valuable_region(
        self, assigned: AnchorLabels, gt, distance: str, shared: SharedClasses = ALL
    ) -> list[torch.Tensor]:
        """Weights (N, 1, H, W) of each level in LD's region.

        Args:
            assigned: what :meth:`assign` gave.
            gt: ``ctx.gt``.
            distance: see :func:`~projects.kd.functional.ld.valuable_region`.
            shared: boxes of other classes have no region.
        """
        every = Boxes.cat(assigned.anchors).tensor
        weights = []
        for instances, candidates in zip(gt, assigned.candidates, strict=True):
            found = shared.regions(instances.gt_classes, instances.gt_boxes.tensor, *candidates)
            weights.append(valuable_region(every, found[1], Candidates(*found[2:]), distance))
        return unflatten_cells(torch.stack(weights), assigned.grids)

    def check_exchange(self, teacher, key):
        """The losses read the student's number of bins."""
        if teacher.box_width != self.box_width:
            raise ConfigError(
                f"{key}: the student's sides have {self.model.reg_max + 1} bins and the teacher's "
                f"{teacher.model.reg_max + 1} (MODEL.GFL.REG_MAX)"
            )

    def losses(self, predictions, assigned):
        """``loss_gfl_cls``, ``_box`` and ``_dfl``."""
        logits = flatten_cells(predictions.logits, self.num_classes)
        bins = flatten_cells(predictions.bins, self.box_width)
        with get_event_storage().name_scope("assistant"):
            return self.model.losses(
                assigned.anchors, logits, bins, assigned.labels, assigned.boxes
            )
