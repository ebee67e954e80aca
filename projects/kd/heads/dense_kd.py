"""What heads share that compare a one-stage detector's predictions with those of a teacher."""

from __future__ import annotations

import torch

from ..context import DistillContext, ModelInfo
from ..errors import ConfigError
from ..predict import AnchorMatch, DensePair, Predictor, predictor_for
from ..shared_classes import ALL, SharedClasses
from .base import ImitationHead, head_name
from .output_kd import comparable, matched_levels


class DenseImitation(ImitationHead):
    """A head on the dense predictions of two one-stage detectors of one family.

    Targets are the teacher's ``dense`` tap, so that several such heads share one pass of its head.

    Args:
        match: level to where the teacher predicts for the student's anchors.
        shared: classes that the teacher predicts; anchors that ground truth assigns to another are
            ignored, and are no positives.
        **base: see :class:`ImitationHead`; ``levels`` are among those of ``match``.
    """

    requires = frozenset({"features", "dense"})
    supports = ("RetinaNet", "FCOS", "GFL")
    needs_boxes = True
    compares = ("thing_classes",)

    def __init__(self, *, match: dict[str, AnchorMatch], shared: SharedClasses = ALL, **base):
        super().__init__(**base)
        self.match = match
        self.shared = shared

    @classmethod
    def from_config(cls, cfg, student: ModelInfo, teacher: ModelInfo) -> dict:
        """Read what is common to all heads, and compare the detectors.

        Raises:
            ConfigError: the two predict other things, or not for the same anchors on a level that
                LEVELS names.
        """
        name = head_name(cls)
        key = f"KD.{name.upper()}"
        *_, match = comparable(cfg, student, teacher, name, key)
        kwargs = super().from_config(cfg, student, teacher)
        levels = matched_levels(cfg, key, kwargs["levels"], match)
        return {**kwargs, "match": match, "levels": levels, "shared": teacher.classes()}

    def predictors(self, ctx: DistillContext) -> tuple[Predictor, Predictor]:
        """Of the student and of the teacher."""
        return predictor_for(ctx.student), predictor_for(ctx.teacher.model)

    def assign(self, ctx: DistillContext, predictor: Predictor):
        """What ground truth says about the anchors, as far as the teacher knows the classes."""
        return predictor.known(predictor.assign(ctx), self.shared)

    def compared(
        self, ctx: DistillContext, predictor: Predictor, student, assigned, **options
    ) -> list[DensePair]:
        """Both sides' predictions, one :class:`DensePair` a level of the head.

        Args:
            ctx: of the step.
            predictor: the student's.
            student: :class:`DenseOutputs` that take the student's place.
            assigned: what :meth:`assign` gave.
            **options: of its ``pairs``: ``masks`` and others.
        """
        target = ctx.teacher_outputs["dense"].float()
        options = {"levels": self.levels, "match": self.match, "shared": self.shared, **options}
        return predictor.pairs(student, target, assigned, **options).dense


def classes(pairs: list[DensePair]) -> list[tuple]:
    """Logits of both sides and what counts, as the losses of classes read them."""
    return [(p.student_logits, p.target_logits, p.counted) for p in pairs]


def boxes(pairs: list[DensePair], weights: list[torch.Tensor]) -> list[tuple]:
    """Boxes of both sides and weights, as the losses of boxes read them."""
    return [(p.student_boxes, p.target_boxes, w) for p, w in zip(pairs, weights, strict=True)]


def term_weights(node, key: str, names: dict[str, float]) -> list[float]:
    """Factors of a head's terms.

    Args:
        node: KD.<HEAD>.
        key: its name, for messages.
        names: of the keys to what -1 stands for.

    Raises:
        ConfigError: a weight that is negative and not -1.
    """
    found = []
    for name, default in names.items():
        value = default if node[name] == -1 else node[name]
        if value < 0:
            raise ConfigError(f"{key}.{name} is {node[name]}, it must be from 0 on (-1 = default)")
        found.append(float(value))
    return found
