"""DIST: correlations of class probabilities, of each cell or region and of each class."""

from __future__ import annotations

from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import ConfigError
from ..functional.dist import dense_relation_losses, relation_losses
from ..predict import predictor_for
from .base import IMITATION_HEAD_REGISTRY
from .dense_kd import DenseImitation, term_weights
from .region_logits import RegionLogits


@register_config
def add_dist_config(cfg) -> None:
    """Add KD.DIST."""
    cfg.KD.DIST = node = head_node(weight=1.0, mask_padding=False)
    # Weights of the correlation within a cell (over its classes) and within a class (over cells).
    node.INTER_WEIGHT = 1.0
    node.INTRA_WEIGHT = 1.0


@IMITATION_HEAD_REGISTRY.register()
class DIST(DenseImitation):
    """Correlation of class probabilities within cells or regions, and within classes.

    Source: Huang et al., NeurIPS 2022; the forms on detectors as in the authors' later repository.
    One-stage detectors: sigmoids, a row is a cell and a column a class of an anchor, levels summed
    (:func:`~projects.kd.functional.dist.dense_relation_losses`). Two-stage detectors: softmax, a
    row is one of the student's sampled proposals and a column a class or the background
    (:func:`~projects.kd.functional.dist.relation_losses`); of a cascade the mean over stages
    (ours), and a plain student learns from a cascade's first stage, as published. Statistics are
    those of the process's own batch, as published, where padding takes part too
    (KD.DIST.MASK_PADDING).

    Args:
        inter_weight, intra_weight: of the two terms.
        regions: reader of the logits of two-stage detectors; None = one-stage.
        **base: see :class:`DenseImitation`.
    """

    requires = frozenset({"features"})  # of the class; an object's are those of its detector
    supports = ()
    needs_boxes = False

    def __init__(
        self,
        *,
        inter_weight: float,
        intra_weight: float,
        regions: RegionLogits | None = None,
        **base,
    ):
        super().__init__(**base)
        self.inter_weight = inter_weight
        self.intra_weight = intra_weight
        self.regions = regions
        if regions is None:
            self.requires = DenseImitation.requires
        else:
            self.requires_student = regions.taps
            self.needs_boxes = True  # without them no proposal is sampled

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.DIST."""
        node = cfg.KD.DIST
        names = {"INTER_WEIGHT": 1.0, "INTRA_WEIGHT": 1.0}
        inter, intra = term_weights(node, "KD.DIST", names)
        weights = {"inter_weight": inter, "intra_weight": intra}
        if not predictor_for(student.model, "DIST").two_stage:
            return {**super().from_config(cfg, student, teacher), **weights}
        if node.MASK_PADDING:
            raise ConfigError("KD.DIST.MASK_PADDING: regions have no padding; set it to False")
        return {
            "levels": [],
            "weight": node.WEIGHT,
            "mask_padding": False,
            "match": {},
            "regions": RegionLogits.build(cfg, student, teacher, "DIST"),
            **weights,
        }

    def forward(self, ctx: DistillContext):
        """``loss_kd_dist_inter`` and ``loss_kd_dist_intra``."""
        inter, intra = self._dense(ctx) if self.regions is None else self._regions(ctx)
        return {
            "loss_kd_dist_inter": self.weight * self.inter_weight * inter,
            "loss_kd_dist_intra": self.weight * self.intra_weight * intra,
        }

    def _regions(self, ctx: DistillContext):
        stages = self.regions.read(ctx)
        terms = [relation_losses(s.softmax(1), t.softmax(1)) for s, t, _ in stages]
        return (sum(term) / len(stages) for term in zip(*terms, strict=True))

    def _dense(self, ctx: DistillContext):
        predictor, _ = self.predictors(ctx)
        student, target = predictor.student(ctx), ctx.teacher_outputs["dense"].float()
        inter = intra = 0.0
        for place, level in enumerate(predictor.levels):
            if level in self.levels:
                match = self.match[level]
                mask = None
                if self.mask_padding and ctx.has_padding(level):
                    mask = ctx.valid_mask(level)
                own = self.shared.of_anchors(student.logits[place])
                logits = own, match.select(target.logits[match.index])
                terms = dense_relation_losses(*logits, mask)
                inter, intra = inter + terms[0], intra + terms[1]
        return inter, intra
