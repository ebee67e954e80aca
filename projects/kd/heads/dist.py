"""DIST: correlations of class probabilities, of each cell and of each class."""

from __future__ import annotations

from ..config import head_node, register_config
from ..context import DistillContext
from ..functional.dist import dense_relation_losses
from .base import IMITATION_HEAD_REGISTRY
from .dense_kd import DenseImitation, term_weights


@register_config
def add_dist_config(cfg) -> None:
    """Add KD.DIST."""
    cfg.KD.DIST = node = head_node(weight=1.0, mask_padding=False)
    # Weights of the correlation within a cell (over its classes) and within a class (over cells).
    node.INTER_WEIGHT = 1.0
    node.INTRA_WEIGHT = 1.0


@IMITATION_HEAD_REGISTRY.register()
class DIST(DenseImitation):
    """Correlation of sigmoid probabilities within cells and within classes, levels summed.

    Source: Huang et al., NeurIPS 2022; the form on dense detectors as in the authors' later
    repository. Terms: :func:`~projects.kd.functional.dist.dense_relation_losses`; a row is a cell,
    a column a class of an anchor. Statistics are those of the process's own batch, as published,
    where padding takes part too (KD.DIST.MASK_PADDING).

    Args:
        inter_weight, intra_weight: of the two terms.
        **base: see :class:`DenseImitation`.
    """

    needs_boxes = False

    def __init__(self, *, inter_weight: float, intra_weight: float, **base):
        super().__init__(**base)
        self.inter_weight = inter_weight
        self.intra_weight = intra_weight

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.DIST."""
        names = {"INTER_WEIGHT": 1.0, "INTRA_WEIGHT": 1.0}
        inter, intra = term_weights(cfg.KD.DIST, "KD.DIST", names)
        kwargs = super().from_config(cfg, student, teacher)
        return {**kwargs, "inter_weight": inter, "intra_weight": intra}

    def forward(self, ctx: DistillContext):
        """``loss_kd_dist_inter`` and ``loss_kd_dist_intra``."""
        predictor, _ = self.predictors(ctx)
        student, target = predictor.student(ctx), ctx.teacher_outputs["dense"].float()
        inter = intra = 0.0
        for place, level in enumerate(predictor.levels):
            if level in self.levels:
                match = self.match[level]
                mask = None
                if self.mask_padding and ctx.has_padding(level):
                    mask = ctx.valid_mask(level)
                logits = student.logits[place], match.select(target.logits[match.index])
                terms = dense_relation_losses(*logits, mask)
                inter, intra = inter + terms[0], intra + terms[1]
        return {
            "loss_kd_dist_inter": self.weight * self.inter_weight * inter,
            "loss_kd_dist_intra": self.weight * self.intra_weight * intra,
        }
