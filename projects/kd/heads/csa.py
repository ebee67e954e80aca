"""CSA: the cross-scale assistant of ScaleKD, whose predictions teach the student."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..config import PROPORTIONAL, head_node, optimizer_node, register_config
from ..context import DistillContext
from ..errors import ConfigError, require_one_of
from ..functional.csa import default_rates
from ..predict import predictor_for
from ..predict.base import step_precision
from .base import IMITATION_HEAD_REGISTRY, ImitationHead, common_width
from .csa_attention import CrossScaleAttention
from .csa_heads import HEADS, AssistantHead, build_assistant_head
from .output_kd import PredictionWeights, add_prediction_keys, cell_masks, prediction_losses


@register_config
def add_csa_config(cfg) -> None:
    """Add KD.CSA."""
    cfg.KD.CSA = node = head_node(weight=1.0, mask_padding=True)
    add_prediction_keys(node)
    # From START_ITER on the assistant teaches the student, ramping in over WARMUP_ITERS; it trains
    # from the first iteration. -3: 1/3 and 1/90 of SOLVER.MAX_ITER (published: 30000 of 90000; the
    # ramp is ours).
    node.START_ITER = PROPORTIONAL
    node.WARMUP_ITERS = PROPORTIONAL
    # The detection head through which the assistant predicts: "student" = the student's, held
    # constant; "copy" = a copy of it that trains with the assistant; "average" = a moving average
    # of the student's; "teacher" = the teacher's, held constant, which reads the attention's output
    # in the teacher's width (needs a teacher of the same family, classes and anchors).
    node.HEAD = "student"
    # Share of the old value that "average" keeps in an iteration.
    node.HEAD_DECAY = 0.999
    # First iterations in which the assistant does not train: its optimizer does not step.
    node.IDLE_ITERS = 0
    # Width of queries, keys and values, and the attention heads that share it.
    node.DIM = 256
    node.HEADS = 8
    # [[level, rate, rate, ...], ...]: the teacher's cells are aggregated at these rates, one for
    # each group of attention heads. Levels that are not named: (r, r / 2) with r = 16, 8, 4, 2, 1
    # at strides 8 to 128 for a teacher of double resolution, half of that at equal resolution.
    node.RATES = []
    # Depth-wise 3x3 convolution on the values.
    node.LOCAL_ENHANCEMENT = True
    # Add sine encodings of the cells' positions to queries and keys (ours). Each query then attends
    # to its own position first, and the assistant learns several times faster. It needs some 32
    # channels an attention head.
    node.POSITIONS = False
    # The assistant's own optimizer.
    node.OPTIMIZER = optimizer_node("Adam", 3e-4, 35.0)


@IMITATION_HEAD_REGISTRY.register()
class CSA(ImitationHead):
    """Cross-scale assistant (ScaleKD, Zhu et al., CVPR 2023).

    At every level the assistant's features are the student's, detached, plus what
    :class:`CrossScaleAttention` reads from the teacher. A detection head predicts from them: by
    default the student's own, held constant (KD.CSA.HEAD, see :class:`AssistantHead`). These
    predictions

    - train the attention on ground truth with the detector's own losses (``loss_aux_csa_*``, in
      every iteration, by an optimizer of its own);
    - detached, teach the student (``loss_kd_csa_*``, see :func:`prediction_losses`). At the start
      W^O is 0: both predict the same, and these losses are 0.

    The teacher's head (HEAD "teacher") reads what the attention reads, in the teacher's width and
    without the student's features; on levels without an assistant the teacher's own features, on
    the student's grid. The student's head, live, closes a loop: its targets come from the very
    parameters that they train.

    ``kd/csa_gain`` in the log is the student's detection loss less the assistant's, on the same
    anchors and regions: an assistant without a gain has nothing to teach.

    Boxes of a one-stage student are taught where ground truth assigns an object only: elsewhere
    nothing holds the assistant's boxes, and the student would follow wherever they drift.

    One head pass serves both: the student's targets are those before the assistant's step. As the
    two kinds of losses reach disjoint parameters, one backward pass of their sum and a step of each
    optimizer do what the published alternation does.

    Public material has the student's head serve the assistant. Residual, forms and normalisers of
    the terms, rates and ramp are not told; these are ours.

    Args:
        attention: on the chosen levels.
        weights: of the terms.
        taps: of the student, that its predictor reads.
        head: through which the assistant predicts.
        idle_iters: iterations at the start in which the assistant does not train.
        **base: see :class:`ImitationHead`. ``levels`` are those with an assistant; the others'
            features are the student's (of HEAD "teacher" the teacher's). With ``mask_padding`` no
            key lies in padding, and padding takes no part in ``loss_kd_csa_*`` of dense
            predictions.
    """

    needs_boxes = True

    def __init__(
        self,
        *,
        attention: CrossScaleAttention,
        weights: PredictionWeights,
        taps: frozenset[str],
        head: AssistantHead,
        idle_iters: int = 0,
        **base,
    ):
        super().__init__(**base)
        self.attention = attention
        self.head = head
        self.weights = weights
        self.requires_student = taps
        if head.kind == "teacher":
            self.compares = ("thing_classes",)
        self.idle_iters = idle_iters

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.CSA."""
        node = cfg.KD.CSA
        predictor = predictor_for(student.model, "CSA")
        predictor.check_student()
        kwargs = super().from_config(cfg, student, teacher)
        unread = [level for level in kwargs["levels"] if level not in predictor.levels]
        if unread and (node.LEVELS or cfg.KD.LEVELS):
            raise ConfigError(
                f"KD.CSA.LEVELS (or KD.LEVELS): {', '.join(unread)} not among the levels that the "
                f"student predicts from: {', '.join(predictor.levels)}"
            )
        levels = [level for level in kwargs["levels"] if level not in unread]
        scale = cfg.KD.TEACHER.INPUT_SCALE
        strides = {level: student.shapes[level].stride for level in levels}
        rates = read_rates(node.RATES, strides, scale, cfg.INPUT.MAX_SIZE_TRAIN)
        _check_node(node, rates)
        head = build_assistant_head(cfg, student, teacher)
        why = "KD.CSA.LEVELS: one attention serves all levels"
        width = common_width("teacher", teacher, levels, why)
        attention = CrossScaleAttention(
            student_channels=common_width("student", student, levels, why),
            teacher_channels=width,
            rates=rates,
            dim=node.DIM,
            heads=node.HEADS,
            local_enhancement=node.LOCAL_ENHANCEMENT,
            positions=node.POSITIONS,
            output_channels=width if node.HEAD == "teacher" else None,
        )
        return {
            **kwargs,
            "levels": levels,
            "attention": attention,
            "weights": PredictionWeights.from_node(node, "KD.CSA", predictor.two_stage),
            "taps": predictor.taps,
            "head": head,
            "idle_iters": node.IDLE_ITERS,
        }

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_csa_cls``, ``_box`` (``_rpn``) and ``loss_aux_csa_<name>`` of the detector."""
        predictor = predictor_for(ctx.student)
        assigned = predictor.assign(ctx)
        student = predictor.student(ctx)
        trains = self.aux_active(ctx.iteration)
        if self.training:
            self.head.follow(ctx.student, ctx.iteration, trains)
        features = self.assist(ctx)
        with step_precision(ctx.student_features[self.levels[0]]):
            assistant = self.head.predict(ctx, features, assigned)
        losses = predictor.losses(assistant, assigned)
        self._log(ctx, predictor, student, assigned, losses)
        auxiliary = {
            f"loss_aux_csa_{name.removeprefix('loss_')}": loss if trains else loss * 0.0
            for name, loss in losses.items()
        }
        options = {"levels": self.levels, "masks": cell_masks(self, ctx)}
        pairs = predictor.pairs(student, assistant, assigned, **options)
        scheduled = prediction_losses(pairs, "csa", self.weights, self.weight, confident=False)
        return {**scheduled, **auxiliary}

    def second_pass(self, ctx: DistillContext):
        """The student's detection head, held constant."""
        predictor, features = predictor_for(ctx.student), dict(ctx.student_features)
        with torch.no_grad():
            assigned = predictor.assign(ctx)
        return lambda: predictor.predict(features, assigned), features

    @torch.no_grad()
    def _log(self, ctx, predictor, student, assigned, losses) -> None:
        """``kd/csa_gain``: by how much its detection losses are below the student's own."""
        if ctx.log_scalars:
            own = predictor.losses(student, assigned)
            ctx.put_scalar("kd/csa_gain", sum(own.values()) - sum(losses.values()))

    def assist(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """The assistant's features, all of the student's levels, (N, C, H, W) in fp32.

        In the teacher's width, on the levels that are paired, where its head reads them.
        """
        own = {level: x.detach().float() for level, x in ctx.student_features.items()}
        teacher_head = self.head.kind == "teacher"
        features = self._teacher_features(ctx) if teacher_head else dict(own)
        for level in self.levels:
            teacher = ctx.teacher_features[level].detach().float()
            read = self.attention(level, own[level], teacher, self.teacher_mask(ctx, level))
            features[level] = read if teacher_head else own[level] + read
        return features

    def _teacher_features(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """On the student's grid, of the levels without an assistant."""
        return {
            level: self.align(ctx, level, ctx.student_features[level], x)[1]
            for level, x in ctx.teacher_features.items()
            if level not in self.levels
        }

    def teacher_mask(self, ctx: DistillContext, level: str) -> torch.Tensor | None:
        """(N, 1, Ht, Wt) bool of the teacher's valid cells; None without padding."""
        if not self.mask_padding or not ctx.teacher_has_padding(level):
            return None
        return ctx.teacher_valid_mask(level)

    def aux_parameters(self) -> Iterable[nn.Parameter]:
        """The whole assistant, a copied head included."""
        return self.parameters()

    def aux_active(self, iteration: int) -> bool:
        """Whether the assistant's optimizer steps: Adam with weight decay moves idle weights."""
        return iteration >= self.idle_iters


def read_rates(
    given: list, strides: Mapping[str, int], scale: float, max_size: float = math.inf
) -> dict[str, tuple[int, ...]]:
    """Rates of every level: those of KD.CSA.RATES, and the table's for the rest.

    Args:
        given: KD.CSA.RATES.
        strides: level to stride, of the levels with an assistant.
        scale: side of the teacher's input over that of the student's.
        max_size: the longest side of a training image.

    Raises:
        ConfigError: a level without an assistant, or rates that are no positive integers.
    """
    rates = {level: default_rates(stride, scale) for level, stride in strides.items()}
    for entry in given:
        level, *values = entry if isinstance(entry, (list, tuple)) and entry else (entry,)
        if level not in rates:
            raise ConfigError(
                f"KD.CSA.RATES: {entry} is not for one of the assistant's levels: "
                f"{', '.join(rates)}; write [[level, rate, rate], ...]"
            )
        if not values or any(type(x) is not int or x < 1 for x in values):
            raise ConfigError(f"KD.CSA.RATES: the rates of {entry} must be integers from 1 on")
        cells = max_size * max(scale, 1) / strides[level]
        if max(values) > max(cells, 1):
            raise ConfigError(
                f"KD.CSA.RATES: {max(values)} of {entry} is more cells than {level} has along the "
                f"longest side of an image, {cells:.0f} (INPUT.MAX_SIZE_TRAIN)"
            )
        rates[level] = tuple(values)
    return rates


def _check_node(node, rates: Mapping[str, tuple[int, ...]]) -> None:
    require_one_of("KD.CSA.HEAD", node.HEAD, HEADS)
    if not 0 <= node.HEAD_DECAY < 1:
        raise ConfigError(f"KD.CSA.HEAD_DECAY is {node.HEAD_DECAY}, it must lie in [0, 1)")
    for level, groups in rates.items():
        if node.HEADS < 1 or node.HEADS % len(groups):
            raise ConfigError(
                f"KD.CSA.HEADS is {node.HEADS}: it must be a multiple of the number of "
                f"rates, and {level} has {len(groups)} (KD.CSA.RATES)"
            )
    unit = node.HEADS * (4 if node.POSITIONS else 1)
    if node.DIM < 1 or node.DIM % unit:
        what = "4 * HEADS, with POSITIONS" if node.POSITIONS else "HEADS"
        raise ConfigError(f"KD.CSA.DIM is {node.DIM}, it must be a multiple of {what} = {unit}")
    if node.IDLE_ITERS < 0:
        raise ConfigError(f"KD.CSA.IDLE_ITERS is {node.IDLE_ITERS}, it must not be negative")
