"""Class logits of both sides for the regions that the student's box heads got in a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..context import DistillContext, ModelInfo
from ..errors import ConfigError
from ..predict import predictor_for
from ..predict.base import step_precision
from ..shared_classes import ALL, SharedClasses
from .output_kd import check_numbers


@dataclass(frozen=True)
class RegionLogits:
    """Reads the class logits of two-stage detectors, stage by stage.

    The student's are those of its own training step. The teacher's box heads run once more on the
    same regions, pooled from its own features; its proposal network does not run.

    Attributes:
        teacher_levels: levels that the teacher pools from, its own name to the student's.
        scale: side of the teacher's images in parts of the student's.
        shared: classes that the teacher predicts.
    """

    teacher_levels: dict[str, str]
    scale: float = 1.0
    shared: SharedClasses = ALL
    taps = frozenset({"box", "sampled_proposals"})

    @classmethod
    def build(cls, cfg, student: ModelInfo, teacher: ModelInfo, user: str) -> RegionLogits:
        """Check both sides and the common keys of the head's node.

        Args:
            cfg: the student's config.
            student, teacher: as in :meth:`ImitationHead.from_config`.
            user: the head.

        Raises:
            ConfigError: a side without box heads of softmax classes, other numbers of classes or
                stages, a teacher that pools from levels which are not paired, or keys of maps.
        """
        key = f"KD.{user.upper()}"
        sides = []
        for side, info in (("student", student), ("teacher", teacher)):
            predictor = predictor_for(info.model, user, side)
            if not predictor.two_stage:
                raise ConfigError(
                    f"KD.HEADS: {user} compares the classes of regions; the {side} {info.arch} has "
                    "no box head (Faster, Mask, Keypoint and Cascade R-CNN have)"
                )
            predictor.check_student()
            sides.append(predictor)
        ours, theirs = sides
        check_numbers(ours, theirs, teacher, key)
        stages = len(ours.box_heads), len(theirs.box_heads)
        if stages[0] not in (1, stages[1]):  # of a cascade the first stage sees plain proposals
            raise ConfigError(
                f"{key}: the student has {stages[0]} box heads and the teacher {stages[1]} "
                "(MODEL.ROI_BOX_CASCADE_HEAD.IOUS); their predictions cannot be compared"
            )
        _check_keys(cfg.KD[user.upper()], key)
        needed = theirs.model.roi_heads.box_in_features
        levels = teacher.paired_names(needed, key)
        return cls(levels, cfg.KD.TEACHER.INPUT_SCALE, teacher.classes())

    def read(self, ctx: DistillContext) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per stage: student and teacher logits (R, K + 1) in fp32, and classes (R,) int64.

        K = background. A teacher with more stages than the student gives its first. Where it does
        not know all classes, K counts those it knows, and regions of the others are left out.
        """
        ours, theirs = predictor_for(ctx.student), predictor_for(ctx.teacher.model)
        stages = ours.regions(ctx)
        features = {own: ctx.teacher_features[x] for own, x in self.teacher_levels.items()}
        with torch.no_grad(), step_precision(next(iter(features.values()))):
            targets = theirs.predict_regions(features, stages, scale=self.scale, constant=False)
        result = []
        for (logits, _), (target, _), regions in zip(
            ours.tapped(ctx), targets, stages, strict=True
        ):
            logits = self.shared.with_background(logits.float())
            classes = torch.cat([x.gt_classes for x in regions])
            classes, *values = self.shared.regions(classes, logits, target)
            result.append((*values, classes))
        return result


def _check_keys(node, key: str) -> None:
    if node.LEVELS:
        raise ConfigError(f"{key}.LEVELS: regions are compared whatever their level; set it to ()")
