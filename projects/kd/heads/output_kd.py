"""OutputKD: the teacher's class and box predictions as targets, the plain baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..config import head_node, register_config
from ..context import DistillContext, ModelInfo
from ..errors import ConfigError, require_one_of
from ..functional.output_kd import (
    box_weight,
    dense_box_loss,
    dense_class_loss,
    region_box_loss,
    region_class_loss,
)
from ..predict import AnchorMatch, Pairs, Predictor, predictor_for
from ..predict.base import step_precision
from ..shared_classes import ALL, SharedClasses
from .base import IMITATION_HEAD_REGISTRY, ImitationHead

# Weights of the class and the box term of one-stage and of two-stage detectors.
PRESETS = {
    # ScaleKD's beta and gamma, as another summary gives them; the reductions they were made for are
    # not public
    "paper": {False: (0.2, 0.05), True: (0.5, 0.2)},
    # ours: weighted means of at most about 1, beside task losses of about 1
    "balanced": {False: (1.0, 0.5), True: (1.0, 0.5)},
}
FROM_PRESET = -1.0


class PredictionWeights(NamedTuple):
    """Factors of the terms of :func:`prediction_losses`, and the temperature of region classes."""

    cls: float
    box: float
    rpn: float
    temperature: float = 1.0

    @classmethod
    def from_node(cls, node, key: str, two_stage: bool) -> PredictionWeights:
        """Read the keys of :func:`add_prediction_keys`; ConfigError names the wrong one."""
        require_one_of(f"{key}.PRESET", node.PRESET, PRESETS)
        if node.TEMPERATURE <= 0:
            raise ConfigError(f"{key}.TEMPERATURE is {node.TEMPERATURE}, it must be positive")
        table = PRESETS[node.PRESET]
        # the objectness of proposals weighs what classes of one-stage detectors do
        values = [*table[two_stage], table[False][0]]
        for place, name in enumerate(("CLS_WEIGHT", "BOX_WEIGHT", "RPN_WEIGHT")):
            if node[name] != FROM_PRESET:
                values[place] = node[name]
            if values[place] < 0:
                raise ConfigError(f"{key}.{name} is {values[place]}, it must not be negative")
        return cls(*values, node.TEMPERATURE)


def add_prediction_keys(node) -> None:
    """The keys of heads that compare predictions."""
    # Weights of the terms: "balanced" (ours), or "paper": ScaleKD's beta and gamma, which were made
    # for reductions that are not public.
    node.PRESET = "balanced"
    # Weights in place of the preset's: classes, boxes, objectness of region proposals. -1 = preset.
    node.CLS_WEIGHT = FROM_PRESET
    node.BOX_WEIGHT = FROM_PRESET
    node.RPN_WEIGHT = FROM_PRESET
    # Temperature of the softmax over the classes of a region (two-stage detectors).
    node.TEMPERATURE = 1.0


def prediction_losses(
    pairs: Pairs, name: str, weights: PredictionWeights, factor: float, *, confident: bool = True
) -> dict:
    """``loss_kd_<name>_cls``, ``_box`` and, with region proposals, ``_rpn``, weighted.

    Levels are summed before they are normalised; stages of a cascade are averaged.

    Args:
        pairs: predictions of both sides.
        name: of the head.
        weights: of the terms.
        factor: of all of them.
        confident: see :func:`~projects.kd.functional.output_kd.box_weight`.
    """
    losses = {}
    if pairs.dense:
        cls = dense_class_loss(_classes(pairs.dense))
        box = dense_box_loss(
            [
                (
                    p.student_boxes,
                    p.target_boxes,
                    box_weight(p.target_logits, p.counted, p.positive, confident),
                )
                for p in pairs.dense
            ]
        )
    else:
        stages = len(pairs.regions)
        cls = sum(
            region_class_loss(p.student_logits, p.target_logits, weights.temperature)
            for p in pairs.regions
        )
        box = sum(
            region_box_loss(p.student_deltas, p.target_deltas, p.foreground) for p in pairs.regions
        )
        cls, box = cls / stages, box / stages
    losses[f"loss_kd_{name}_cls"] = factor * weights.cls * cls
    losses[f"loss_kd_{name}_box"] = factor * weights.box * box
    if pairs.proposals:
        term = dense_class_loss(_classes(pairs.proposals))
        losses[f"loss_kd_{name}_rpn"] = factor * weights.rpn * term
    return losses


def _classes(pairs):
    return [(p.student_logits, p.target_logits, p.counted) for p in pairs]


def cell_masks(head: ImitationHead, ctx: DistillContext) -> dict[str, torch.Tensor | None]:
    """Valid cells of the head's levels: None without padding, or where padding takes part."""
    return {
        level: ctx.valid_mask(level) if head.mask_padding and ctx.has_padding(level) else None
        for level in head.levels
    }


def comparable(cfg, student: ModelInfo, teacher: ModelInfo, user: str, key: str):
    """The predictors of both sides, and where the teacher predicts for the student's anchors.

    Args:
        cfg: the student's config.
        student, teacher: as in :meth:`ImitationHead.from_config`.
        user: head that asks, for messages.
        key: its config key, for messages.

    Returns:
        Predictor of the student, of the teacher, and what :meth:`Predictor.match` gives.

    Raises:
        ConfigError: the two predict other things, or for other classes.
    """
    ours = predictor_for(student.model, user)
    theirs = predictor_for(teacher.model, user, "teacher")
    ours.check_student()
    check_numbers(ours, theirs, teacher, key)
    return ours, theirs, ours.match(theirs, cfg.KD.TEACHER.INPUT_SCALE, key)


def check_numbers(ours: Predictor, theirs: Predictor, teacher: ModelInfo, key: str) -> None:
    """ConfigError unless the teacher predicts as many classes as it shares with the student."""
    if teacher.classes().number(ours.num_classes) != theirs.num_classes:
        raise ConfigError(
            f"{key}: the student has {ours.num_classes} classes and the teacher "
            f"{theirs.num_classes}; match them by KD.TEACHER.CLASS_MAP"
        )


def matched_levels(
    cfg, key: str, levels: Sequence[str], match: Mapping[str, AnchorMatch]
) -> list[str]:
    """Those of a head's levels for whose anchors the teacher predicts.

    Args:
        cfg: the student's config.
        key: the config node of the head.
        levels: as :func:`~projects.kd.heads.base.choose_levels` gave them.
        match: what :meth:`Predictor.match` gave.

    Raises:
        ConfigError: LEVELS names one for which it does not.
    """
    missing = [level for level in levels if level not in match]
    if missing and (cfg.KD[key.rsplit(".", 1)[1]].LEVELS or cfg.KD.LEVELS):
        raise ConfigError(
            f"{key}.LEVELS (or KD.LEVELS): the teacher predicts for the student's anchors on "
            f"{', '.join(match)}, not on {', '.join(missing)}"
        )
    return [level for level in levels if level in match]


@register_config
def add_output_kd_config(cfg) -> None:
    """Add KD.OUTPUTKD."""
    cfg.KD.OUTPUTKD = node = head_node(weight=1.0, mask_padding=True)
    add_prediction_keys(node)
    # Input pixels by which target boxes are moved along the diagonal, forward or back at random:
    # the published experiment on noisy boxes (6 and 12).
    node.BOX_JITTER = 0.0


@IMITATION_HEAD_REGISTRY.register()
class OutputKD(ImitationHead):
    """Class and box predictions of the teacher as targets (the baseline in ScaleKD, CVPR 2023).

    Both detectors are of one family and predict for the same classes on the same anchors (see
    :func:`~projects.kd.predict.dense.match_anchors` for teachers that see a larger image) or, with
    two stages, for the student's sampled proposals. Terms and their normalisers:
    :mod:`~projects.kd.functional.output_kd`. Normalisers are those of the process's own batch, as
    in detectron2's RetinaNet.

    Args:
        weights: of the terms.
        match: level to where the teacher predicts for the student's anchors.
        teacher_levels: the teacher's own name of a level to the student's.
        predictor: the student's.
        scale: KD.TEACHER.INPUT_SCALE.
        jitter: see :func:`~projects.kd.functional.output_kd.jitter_boxes`.
        shared: classes that the teacher predicts.
        **base: see :class:`ImitationHead`. ``levels`` are those predicted level by level; regions
            are compared whatever level they lie on.
    """

    needs_boxes = True
    compares = ("thing_classes",)

    def __init__(
        self,
        *,
        weights: PredictionWeights,
        match: dict[str, AnchorMatch],
        teacher_levels: dict[str, str],
        taps: frozenset[str],
        scale: float = 1.0,
        jitter: float = 0.0,
        shared: SharedClasses = ALL,
        **base,
    ):
        super().__init__(**base)
        self.shared = shared
        self.weights = weights
        self.match = match
        self.teacher_levels = teacher_levels
        self.requires_student = taps
        self.scale = scale
        self.jitter = jitter

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.OUTPUTKD."""
        node, key = cfg.KD.OUTPUTKD, "KD.OUTPUTKD"
        if node.BOX_JITTER < 0:
            raise ConfigError(f"{key}.BOX_JITTER is {node.BOX_JITTER}, it must not be negative")
        ours, theirs, match = comparable(cfg, student, teacher, "OutputKD", key)
        kwargs = super().from_config(cfg, student, teacher)
        kwargs["levels"] = matched_levels(cfg, key, kwargs["levels"], match)
        return {
            **kwargs,
            "weights": PredictionWeights.from_node(node, key, ours.two_stage),
            "match": match,
            "teacher_levels": teacher.paired_names(theirs.levels, key),
            "taps": ours.taps,
            "scale": cfg.KD.TEACHER.INPUT_SCALE,
            "jitter": node.BOX_JITTER,
            "shared": teacher.classes(),
        }

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_outputkd_cls``, ``_box`` and, with region proposals, ``_rpn``."""
        ours, theirs = predictor_for(ctx.student), predictor_for(ctx.teacher.model)
        assigned = ours.known(ours.assign(ctx), self.shared)
        student = ours.student(ctx)
        pairs = ours.pairs(
            student,
            self.targets(ctx, theirs, assigned),
            assigned,
            levels=self.levels,
            masks=cell_masks(self, ctx),
            match=self.match,
            jitter=self.jitter,
            shared=self.shared,
        )
        return prediction_losses(pairs, "outputkd", self.weights, self.weight)

    @torch.no_grad()
    def targets(self, ctx: DistillContext, teacher: Predictor, assigned):
        """The teacher's predictions from the features of the step."""
        features = {own: ctx.teacher_features[ours] for own, ours in self.teacher_levels.items()}
        with step_precision(next(iter(features.values()))):
            return teacher.predict(features, assigned, scale=self.scale, constant=False)
