"""Mask logits and keypoint heatmaps of both sides on the student's foreground proposals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.modeling.roi_heads.roi_heads import (
    select_foreground_proposals,
    select_proposals_with_visible_keypoints,
)
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from ..adapters import align_spatial
from ..context import DistillContext, ModelInfo
from ..errors import ConfigError
from ..shared_classes import ALL, SharedClasses

ROI_TARGETS = ("masks", "keypoints")
_PARTS = {"masks": "mask", "keypoints": "keypoint"}


@dataclass(frozen=True)
class RoiMaps:
    """Reads the maps of a step.

    The student's are those of its own training step. The teacher pools the same regions from its
    own features. Detectors without such a branch, or with one that has no pooler of its own (C4),
    are refused when this is built.

    Attributes:
        kind: "masks" or "keypoints".
        teacher_levels: levels that the teacher pools from, its own name to the student's.
        scale: side of the teacher's images in parts of the student's.
        shared: classes that the teacher predicts; regions of others are left out.
    """

    kind: str
    teacher_levels: dict[str, str]
    scale: float = 1.0
    shared: SharedClasses = ALL

    @classmethod
    def build(cls, kind: str, student: ModelInfo, teacher: ModelInfo, key: str, scale: float = 1.0):
        """Check both sides.

        Raises:
            ConfigError: a side without the branch, different classes or keypoints, or a teacher
                that pools from levels which are not paired.
        """
        for side, info in (("student", student), ("teacher", teacher)):
            if not offers(info.model, kind):
                raise ConfigError(
                    f"{key}: '{kind}' needs a {side} with RoI heads that predict {kind} from a "
                    f"pooler of their own (Mask or Keypoint R-CNN with FPN); {info.arch} has none"
                )
        ours = _outputs(student.model, kind, teacher.classes())
        theirs = _outputs(teacher.model, kind)
        if ours != theirs:
            raise ConfigError(
                f"{key}: '{kind}' compares them one by one, but the student predicts {ours} and "
                f"the teacher {theirs}"
            )
        needed = getattr(teacher.model.roi_heads, f"{_PARTS[kind]}_in_features")
        levels = teacher.paired_names(needed, f"{key} '{kind}'")
        return cls(kind, levels, scale, teacher.classes())

    @property
    def compares(self) -> tuple[str, ...]:
        """See :class:`~projects.kd.heads.base.ImitationHead`."""
        return ("keypoint_names",) if self.kind == "keypoints" else ("thing_classes",)

    @property
    def taps(self) -> frozenset[str]:
        """Taps of the student."""
        return frozenset({"sampled_proposals", f"{_PARTS[self.kind]}_logits"})

    def read(self, ctx: DistillContext) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, C, h, w) of the student and of the teacher, fp32, on the student's grid.

        R counts the student's foreground proposals of all images (for keypoints those with a
        visible one), C is 1 for masks: the proposal's own class, the only one that is trained.
        """
        regions = self.regions(ctx)
        part = _PARTS[self.kind]
        student = ctx.student_outputs[f"{part}_logits"].float()
        if self.kind == "keypoints":
            # the tap lies before the interpolation that ends detectron2's head
            factor = getattr(ctx.student.roi_heads.keypoint_head, "up_scale", 1.0)
            student = nn.functional.interpolate(
                student, scale_factor=factor, mode="bilinear", align_corners=False
            )
        teacher = self._teacher(ctx, regions)
        classes = torch.cat([x.gt_classes for x in regions])
        if self.kind == "masks" and student.shape[1] > 1:
            student = student[range(len(student)), classes][:, None]
            own = self.shared.places(classes)
            teacher = teacher[range(len(teacher)), own][:, None]
        _, student, teacher = self.shared.regions(classes, student, teacher)
        return student, align_spatial(teacher, student)

    def regions(self, ctx: DistillContext):
        """Per image the proposals that the student's branch was run on, in its order."""
        proposals = ctx.student_outputs["sampled_proposals"]
        found, _ = select_foreground_proposals(proposals, ctx.student.roi_heads.num_classes)
        if self.kind != "keypoints":
            return found
        with EventStorage():  # it logs, as it has done for the student already
            return select_proposals_with_visible_keypoints(found)

    @torch.no_grad()
    def _teacher(self, ctx: DistillContext, regions) -> torch.Tensor:
        heads, part = ctx.teacher.model.roi_heads, _PARTS[self.kind]
        maps = [
            ctx.teacher_features[self.teacher_levels[level]].float()
            for level in getattr(heads, f"{part}_in_features")
        ]
        boxes = [Boxes(x.proposal_boxes.tensor * self.scale) for x in regions]
        pooled = getattr(heads, f"{part}_pooler")(maps, boxes)
        return getattr(heads, f"{part}_head").layers(pooled).float()


def offers(model: nn.Module, kind: str) -> bool:
    """Whether a detector predicts "masks" or "keypoints" for regions that are pooled for it."""
    heads, part = getattr(model, "roi_heads", None), _PARTS[kind]
    return (
        getattr(heads, f"{part}_on", False)
        and getattr(heads, f"{part}_pooler", None) is not None
        and hasattr(getattr(heads, f"{part}_head"), "layers")
    )


def _outputs(model: nn.Module, kind: str, shared: SharedClasses = ALL) -> str:
    heads = model.roi_heads
    if kind == "keypoints":
        return f"{heads.keypoint_head.num_keypoints} keypoints"
    predictor = getattr(heads.mask_head, "predictor", None)
    number = getattr(predictor, "out_channels", heads.num_classes)
    return f"masks of {number if number == 1 else shared.number(number)} classes"
