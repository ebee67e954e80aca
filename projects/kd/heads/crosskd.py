"""CrossKD: the student's maps go through the rest of the teacher's head, and are compared there."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import nn

from ..adapters import build_adapter
from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import ConfigError, require_one_of
from ..functional.bckd import confidence, giou_kd, qfl_kd
from ..functional.crosskd import (
    LEAST_IOU,
    align_channels,
    bins_kd,
    channel_statistics,
    largest_gain,
    log_iou_kd,
)
from ..functional.ranks import mean_over_ranks
from ..predict import predictor_for
from ..predict.base import step_precision
from ..predict.towers import cycles, tower_depth, tower_width
from .base import IMITATION_HEAD_REGISTRY, adapt
from .dense_kd import DenseImitation, boxes, classes, term_weights
from .output_kd import cell_masks

logger = logging.getLogger(__name__)


class Family(NamedTuple):
    """Published for a detector: convolutions after the crossing, weights of the terms."""

    remaining: int
    cls: float
    box: float


# of four convolutions a tower, by the predictor's name
FAMILIES = {
    "RetinaNet": Family(1, 1.0, 1.0),
    "GFL": Family(1, 1.0, 4.0),
    "FCOS": Family(2, 0.4, 0.75),
}
SIDES = ("student", "teacher")
BRANCHES = {"cls": "tower_cls", "box": "tower_box"}
FROM_FAMILY = -1


@register_config
def add_crosskd_config(cfg) -> None:
    """Add KD.CROSSKD."""
    cfg.KD.CROSSKD = node = head_node(weight=1.0, mask_padding=False)
    # k: the student's maps after k convolutions of its towers enter the teacher's. -1 = as many
    # convolutions remain as published (RetinaNet and GFL: 1, k is 3 of 4; FCOS: 2); 0 = the levels.
    node.DEPTH = FROM_FAMILY
    # The same for the teacher's towers. -1 = as many remain as in the student's.
    node.TEACHER_DEPTH = FROM_FAMILY
    # Statistics of the maps after their ReLU ("post") or before it ("pre").
    node.ACTIVATION = "post"
    # Weights of the terms. -1 = those of the detector: RetinaNet 1 and 1, GFL 1 and 4, FCOS 0.4 and
    # 0.75.
    node.CLS_WEIGHT = -1.0
    node.BOX_WEIGHT = -1.0


class Source(NamedTuple):
    """Where statistics for a student's level come from: the teacher's level and its stride."""

    index: int
    feature: str
    stride: int


@IMITATION_HEAD_REGISTRY.register()
class CrossKD(DenseImitation):
    """Cross-head distillation (Wang et al., CVPR 2024), written from the mathematics.

    Of each level and branch the student's map after k convolutions gets the channel statistics of
    the teacher's (:func:`~projects.kd.functional.crosskd.align_channels`), passes a ReLU and the
    rest of the teacher's head as a fixed function. Its predictions are compared with the teacher's
    own: classes by :func:`~projects.kd.functional.bckd.qfl_kd`, boxes by the term of the family,
    weighted by the teacher's confidence. The student's own later convolutions and its predictors
    get no gradient from here.

    Normalisers (means over processes): positives, at least 1 an image; FCOS: the sum of their
    centre-ness targets, or where there is none in any process the number of images (ours; published
    1e-6, which would end a training); GFL's boxes: the sum of the weights.

    Args:
        depth, teacher_depth: convolutions before the crossing.
        before_relu: statistics of what the ReLU reads.
        family: what is published for the detector; ``cls`` and ``box`` are the weights in use.
        sources: level to where its statistics come from.
        all_levels: levels that are not compared pass the head too, whose norms count their calls.
        adapters: "cls" and "box" to a module that brings the student's maps to the teacher's width,
            before the statistics (ours: published for equal widths).
        taps: of both sides, see :class:`ImitationHead`.
        **base: see :class:`DenseImitation`.
    """

    def __init__(
        self,
        *,
        depth: int,
        teacher_depth: int,
        before_relu: bool,
        family: Family,
        sources: Mapping[str, Source],
        all_levels: bool,
        adapters: nn.ModuleDict,
        taps: Mapping[str, Mapping],
        **base,
    ):
        super().__init__(**base)
        self.depth, self.teacher_depth = depth, teacher_depth
        self.before_relu = before_relu
        self.family = family
        self.sources = dict(sources)
        self.all_levels = all_levels
        self.adapters = adapters
        self.extra_taps = taps

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.CROSSKD."""
        node, key = cfg.KD.CROSSKD, "KD.CROSSKD"
        require_one_of(f"{key}.ACTIVATION", node.ACTIVATION, ("post", "pre"))
        kwargs = super().from_config(cfg, student, teacher)
        ours, theirs = (predictor_for(x.model, "CrossKD") for x in (student, teacher))
        published = _family(ours)
        names = {"CLS_WEIGHT": published.cls, "BOX_WEIGHT": published.box}
        family = Family(published.remaining, *term_weights(node, key, names))
        heads = student.model.head, teacher.model.head
        depths = _depths(node, key, heads, published.remaining)
        before_relu = node.ACTIVATION == "pre"
        widths = [tower_width(head, depth) for head, depth in zip(heads, depths, strict=True)]
        if cycles(heads[1]):
            _check_cycles(cfg, key, ours, theirs, kwargs["match"])
        sources, shapes = {}, teacher.model.backbone.output_shape()
        needed = [theirs.levels[match.index] for match in kwargs["match"].values()]
        # the levels' own features are under the student's names in a step
        paired = teacher.paired_names(needed, key) if not depths[1] else {}
        for level, match in kwargs["match"].items():
            own = theirs.levels[match.index]
            sources[level] = Source(match.index, paired.get(own, own), shapes[own].stride)
        _warn_others(cfg)
        return {
            **kwargs,
            "depth": depths[0],
            "teacher_depth": depths[1],
            "before_relu": before_relu,
            "family": family,
            "sources": sources,
            "all_levels": cycles(heads[1]),
            "adapters": nn.ModuleDict(
                {branch: build_adapter(cfg.KD.ADAPTER.TYPE, *widths) for branch in BRANCHES}
            ),
            "taps": {
                side: predictor.tower_taps(depth, before_relu)
                for side, predictor, depth in zip(SIDES, (ours, theirs), depths, strict=True)
            },
        }

    def forward(self, ctx: DistillContext):
        """``loss_kd_crosskd_cls`` and ``loss_kd_crosskd_box``."""
        ours, theirs = self.predictors(ctx)
        assigned, masks = self.assign(ctx, ours), cell_masks(self, ctx)
        crossed = self.cross(ctx, ours, theirs, masks)
        bins = crossed.bins is not None
        pairs = self.compared(ctx, ours, crossed, assigned, masks=masks, decoded=not bins)
        divisor = self.normaliser(ours, assigned, masks, ctx.gt)
        weights = [confidence(p.target_logits, p.counted) for p in pairs]
        if bins:
            levels = zip(pairs, weights, strict=True)
            total, weight = bins_kd([(p.student_bins, p.target_bins, w[:, 0]) for p, w in levels])
            box = total / mean_over_ranks(weight).clamp(min=LEAST_IOU)
        else:
            compare = log_iou_kd if hasattr(ours, "centreness") else giou_kd
            box = compare(boxes(pairs, weights), divisor)
        return {
            "loss_kd_crosskd_cls": self.weight * self.family.cls * qfl_kd(classes(pairs), divisor),
            "loss_kd_crosskd_box": self.weight * self.family.box * box,
        }

    def normaliser(self, predictor, assigned, masks, gt: list[Instances]) -> torch.Tensor:
        """See the class."""
        if not hasattr(predictor, "centreness"):
            return mean_over_ranks(predictor.positives(assigned, masks))
        total = predictor.centreness(assigned, masks)
        total, images = mean_over_ranks(torch.stack([total, total.new_tensor(len(gt))]))
        return torch.where(total < LEAST_IOU, images, total)

    def cross(self, ctx: DistillContext, ours, theirs, masks):
        """The teacher's outputs for the student's maps, on the student's grids."""
        towers, places = self.entering(ctx, ours, masks)
        like = next(iter(ctx.student_features.values()))
        with step_precision(like):
            outputs = theirs.resume(towers, self.teacher_depth, places=places)
        # what is compared chooses the shared classes among the student's
        logits = [x if x is None else self.shared.of_all_anchors(x) for x in outputs.logits]
        return dataclasses.replace(outputs, logits=logits)

    def entering(self, ctx: DistillContext, ours, masks):
        """The student's maps as they enter the teacher's towers, and each level's place there.

        Returns:
            Tap name to a map (N, C_teacher, H, W), or None, for each of the student's levels; and
            the places, see :meth:`~projects.kd.predict.retinanet.RetinaNetPredictor.resume`.
        """
        towers, places = {tap: [] for tap in BRANCHES.values()}, []
        gains = []
        for place, level in enumerate(ours.levels):
            used = level in self.levels or self.all_levels
            places.append(self.sources[level].index if used else 0)
            for branch, tap in BRANCHES.items():
                maps = self.maps(ctx, place, level, tap) if used else None
                if maps is not None:
                    maps = self.align(ctx, *maps, level, branch, masks.get(level), gains)
                towers[tap].append(maps)
        if gains:
            ctx.put_scalar("kd/crosskd_gain", torch.stack(gains).amax())
        return towers, places

    def second_pass(self, ctx: DistillContext):
        """The rest of the teacher's head on the student's maps."""
        ours, theirs = self.predictors(ctx)
        with torch.no_grad():
            towers, places = self.entering(ctx, ours, cell_masks(self, ctx))
        inputs = {
            tap: [x if x is None else x.detach().requires_grad_() for x in maps]
            for tap, maps in towers.items()
        }
        return lambda: theirs.resume(inputs, self.teacher_depth, places=places), inputs

    def maps(self, ctx: DistillContext, place: int, level: str, tap: str):
        """The student's map of a level and a branch, and the teacher's."""
        source = self.sources[level]
        student = ctx.student_outputs[tap][place] if self.depth else ctx.student_features[level]
        teacher = (
            ctx.teacher_outputs[tap][source.index]
            if self.teacher_depth
            else ctx.teacher_features[source.feature]
        )
        return student.float(), teacher.detach().float()

    def align(self, ctx, student, teacher, level, branch, mask, gains):
        """The student's map with the teacher's statistics, as the rest of its head reads it."""
        student = adapt(student, mask, self.adapters[branch])
        stride = self.sources[level].stride
        theirs = ctx.padding_mask("teacher", teacher, stride) if self.mask_padding else None
        statistics = channel_statistics(teacher, theirs)
        if ctx.log_scalars:
            gains.append(largest_gain(student, statistics, mask))
        aligned = align_channels(student, statistics, mask)
        return aligned.relu() if self.teacher_depth else aligned


def _family(predictor) -> Family:
    """That of the predictor's class or of the nearest base class."""
    return next(FAMILIES[x.name] for x in type(predictor).__mro__ if x.name in FAMILIES)


def _depths(node, key: str, heads, remaining: int) -> tuple[int, int]:
    """Convolutions before the crossing on both sides, checked."""
    convolutions = [tower_depth(x, side) for x, side in zip(heads, SIDES, strict=True)]
    depth = node.DEPTH
    if depth == FROM_FAMILY:
        depth = max(convolutions[0] - remaining, 0)
    if not 0 <= depth <= convolutions[0]:
        raise ConfigError(
            f"{key}.DEPTH is {node.DEPTH}; the student's towers have {convolutions[0]} "
            f"convolutions, it must be from 0 to {convolutions[0]}, or -1"
        )
    theirs = node.TEACHER_DEPTH
    if theirs == FROM_FAMILY:
        theirs = convolutions[1] - (convolutions[0] - depth)
        if theirs < 0:
            raise ConfigError(
                f"{key}.DEPTH: after {depth} of its {convolutions[0]} convolutions the student has "
                f"{convolutions[0] - depth} to go, and the teacher has {convolutions[1]} in all; "
                f"set DEPTH to {convolutions[0] - convolutions[1]} or more, or {key}.TEACHER_DEPTH"
            )
    if not 0 <= theirs <= convolutions[1]:
        raise ConfigError(
            f"{key}.TEACHER_DEPTH is {node.TEACHER_DEPTH}; the teacher's towers have "
            f"{convolutions[1]} convolutions, it must be from 0 to {convolutions[1]}, or -1"
        )
    return depth, theirs


def _check_cycles(cfg, key: str, ours, theirs, match) -> None:
    """The teacher's norms count their calls: all its levels have to be crossed in order."""
    places = [match[level].index if level in match else None for level in ours.levels]
    if cfg.KD.TEACHER.INPUT_SCALE != 1 or places != list(range(len(theirs.levels))):
        raise ConfigError(
            f"{key}: the norms of the teacher's head (MODEL.RETINANET.NORM) count their calls to "
            "know the level, so that student and teacher need the same levels and "
            "KD.TEACHER.INPUT_SCALE 1.0"
        )


def _warn_others(cfg) -> None:
    others = [name for name in cfg.KD.HEADS if name in ("BCKD", "OutputKD")]
    if others:
        logger.warning(
            "KD.HEADS: CrossKD keeps the teacher out of the student's predictions, which %s pulls "
            "towards it; published together they were worse than CrossKD alone",
            " and ".join(others),
        )
