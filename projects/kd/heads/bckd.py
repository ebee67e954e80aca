"""BCKD: classes as binary decisions, and boxes where the two nets disagree about them."""

from __future__ import annotations

from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import ConfigError
from ..functional.bckd import disagreement, giou_kd, qfl_kd
from ..functional.ranks import mean_over_ranks
from .base import IMITATION_HEAD_REGISTRY
from .dense_kd import DenseImitation, boxes, classes
from .output_kd import cell_masks


@register_config
def add_bckd_config(cfg) -> None:
    """Add KD.BCKD."""
    cfg.KD.BCKD = node = head_node(weight=1.0, mask_padding=True)
    # Weights of the terms on classes and on boxes, of the authors' GFL configs.
    node.CLS_WEIGHT = 1.0
    node.BOX_WEIGHT = 4.0


@IMITATION_HEAD_REGISTRY.register()
class BCKD(DenseImitation):
    """Binary classification distillation and IoU-based localisation distillation.

    Source: Yang et al., ICCV 2023; forms and weights as in the authors' code, which has them for
    GFL only. Terms: :func:`~projects.kd.functional.bckd.qfl_kd` over all anchors that count, and
    :func:`~projects.kd.functional.bckd.giou_kd` weighted by
    :func:`~projects.kd.functional.bckd.disagreement`. Both are divided by the number of positives,
    at least 1 an image, mean over processes.

    Where the code leaves out the terms of a level without positives on the GPU, all levels count
    here (ours: the paper has no such rule, and it would differ between processes).

    Args:
        cls_weight, box_weight: of the terms.
        **base: see :class:`DenseImitation`.
    """

    def __init__(self, *, cls_weight: float, box_weight: float, **base):
        super().__init__(**base)
        self.cls_weight = cls_weight
        self.box_weight = box_weight

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.BCKD."""
        node = cfg.KD.BCKD
        for name in ("CLS_WEIGHT", "BOX_WEIGHT"):
            if node[name] < 0:
                raise ConfigError(f"KD.BCKD.{name} is {node[name]}, it must be from 0 on")
        kwargs = super().from_config(cfg, student, teacher)
        return {**kwargs, "cls_weight": node.CLS_WEIGHT, "box_weight": node.BOX_WEIGHT}

    def forward(self, ctx: DistillContext):
        """``loss_kd_bckd_cls`` and ``loss_kd_bckd_box``."""
        predictor, _ = self.predictors(ctx)
        assigned = self.assign(ctx, predictor)
        student, masks = predictor.student(ctx), cell_masks(self, ctx)
        pairs = self.compared(ctx, predictor, student, assigned, masks=masks)
        positives = mean_over_ranks(predictor.positives(assigned, masks))
        weights = [disagreement(*logits) for logits in classes(pairs)]
        return {
            "loss_kd_bckd_cls": self.weight * self.cls_weight * qfl_kd(classes(pairs), positives),
            "loss_kd_bckd_box": self.weight
            * self.box_weight
            * giou_kd(boxes(pairs, weights), positives),
        }
