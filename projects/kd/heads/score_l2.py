"""ScoreL2: features where the teacher is sure of an object."""

from __future__ import annotations

import torch
from torch import nn

from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import ConfigError
from ..functional.score_l2 import score_l2_loss
from ..predict import predictor_for
from .base import IMITATION_HEAD_REGISTRY, ImitationHead


@register_config
def add_score_l2_config(cfg) -> None:
    """Add KD.SCOREL2."""
    cfg.KD.SCOREL2 = head_node(weight=6.0, mask_padding=True)


@IMITATION_HEAD_REGISTRY.register()
class ScoreL2(ImitationHead):
    """Squared feature difference weighted by the teacher's confidence (a feature of Ultralytics).

    ``weight * sum over levels of`` :func:`~projects.kd.functional.score_l2.score_l2_loss`. The
    weight of a cell is the teacher's largest class probability there, or objectness with region
    proposals; the student's features pass two 1x1 convolutions with a ReLU between. Parts and
    weight are public, the reduction is ours.

    Args:
        adapters: level to the convolutions.
        own_names: level to the name by which the teacher's predictor knows it.
        scores: tap of the teacher that its confidence is read from.
        **base: see :class:`ImitationHead`.
    """

    def __init__(self, *, adapters: nn.ModuleDict, own_names: dict[str, str], scores: str, **base):
        super().__init__(**base)
        self.adapters = adapters
        self.own_names = own_names
        self.scores = scores
        self.requires = frozenset({"features", scores})

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.SCOREL2."""
        node = cfg.KD.SCOREL2
        kwargs = super().from_config(cfg, student, teacher)
        predictor = predictor_for(teacher.model, "ScoreL2", "teacher")
        scored = predictor.score_levels
        own = {level: teacher.own_names.get(level, level) for level in kwargs["levels"]}
        missing = [level for level in own if own[level] not in scored]
        if missing and (node.LEVELS or cfg.KD.LEVELS or len(missing) == len(own)):
            raise ConfigError(
                f"KD.SCOREL2.LEVELS (or KD.LEVELS): the teacher scores objects on "
                f"{', '.join(scored)}, not on {', '.join(missing)}"
            )
        kwargs["levels"] = [level for level in own if level not in missing]
        widths = {x: (student.shapes[x].channels, teacher.shapes[x].channels) for x in own}
        return {
            **kwargs,
            "adapters": nn.ModuleDict({x: _adapter(*widths[x]) for x in kwargs["levels"]}),
            "own_names": own,
            "scores": predictor.scores,
        }

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_scorel2``."""
        teacher = predictor_for(ctx.teacher.model)
        scores = teacher.confidence(ctx.teacher_outputs[self.scores])
        total = 0.0
        for level in self.levels:
            own = scores[self.own_names[level]]
            _, weight, mask = self.align(ctx, level, ctx.student_features[level], own)
            if mask is not None:
                weight = weight.masked_fill(~mask, 0.0)
            student, target, _ = self.pair(ctx, level, self.adapters[level])
            total = total + score_l2_loss(student, target, weight)
        return {"loss_kd_scorel2": self.weight * total}


def _adapter(student_channels: int, teacher_channels: int) -> nn.Sequential:
    first = nn.Conv2d(student_channels, teacher_channels, 1)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(teacher_channels, teacher_channels, 1))
