"""CWD: channel-wise distillation of features or classification logits."""

from __future__ import annotations

import torch
from torch import nn

from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import ConfigError
from ..functional.cwd import cwd_loss
from ..taps import architectures_with
from .base import IMITATION_HEAD_REGISTRY, ImitationHead, build_adapters
from .roi_maps import ROI_TARGETS, RoiMaps

TARGETS = ("features", "dense", *ROI_TARGETS)


@register_config
def add_cwd_config(cfg) -> None:
    """Add KD.CWD."""
    cfg.KD.CWD = node = head_node(weight=10.0, mask_padding=False)
    # Temperature of the softmax over positions.
    node.TAU = 1.0
    # "features" = FPN outputs; "dense" = classification logits of a one-stage head; "masks",
    # "keypoints" = mask logits and keypoint heatmaps of the student's foreground proposals.
    node.TARGET = "features"


@IMITATION_HEAD_REGISTRY.register()
class CWD(ImitationHead):
    """Channel-wise KL divergence, summed over levels (Shu et al., ICCV 2021).

    The weight is per level, as published.

    Args:
        adapters: level to a module that maps student channels to teacher channels (ours is linear;
            the published one for segmentation adds a norm and ReLU). Empty for ``dense``.
        tau: temperature.
        target: "features" (FPN outputs) or "dense": the classification logits of a one-stage head,
            (N, A * K, H, W) a level, before the sigmoid. Both detectors need the same anchors and
            classes in the same order; of these only A * K can be checked.
            "masks" or "keypoints": see :class:`RoiMaps`. With ``tau`` 1 the latter compares the
            distributions that Keypoint R-CNN's own loss is about.
        dense_index: level to the place of its logits in the student's and the teacher's list.
        roi: reader of masks or keypoints.
        **base: see :class:`ImitationHead`.
    """

    targets = TARGETS

    def __init__(
        self,
        *,
        adapters: nn.ModuleDict,
        tau: float = 1.0,
        target: str = "features",
        dense_index: dict[str, tuple[int, int]] | None = None,
        roi: RoiMaps | None = None,
        **base,
    ):
        super().__init__(**base)
        self.adapters = adapters
        self.tau = tau
        self.target = target
        self.dense_index = dense_index
        self.roi = roi
        self.needs_boxes = roi is not None
        if target == "dense":
            self.requires = frozenset({"dense"})
        if roi is not None:
            self.requires_student = roi.taps

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.CWD."""
        node = cfg.KD.CWD
        if node.TARGET not in TARGETS:
            raise ConfigError(f"KD.CWD.TARGET: '{node.TARGET}' is not one of {', '.join(TARGETS)}")
        if node.TAU <= 0:
            raise ConfigError(f"KD.CWD.TAU is {node.TAU}, it must be positive")
        kwargs = super().from_config(cfg, student, teacher)
        kwargs.update(tau=node.TAU, target=node.TARGET, adapters=nn.ModuleDict())
        if node.TARGET == "features":
            kwargs["adapters"] = build_adapters(
                cfg.KD.ADAPTER.TYPE, kwargs["levels"], student, teacher
            )
            return kwargs
        if node.TARGET in ROI_TARGETS:
            if node.LEVELS:
                raise ConfigError(f"KD.CWD.LEVELS: TARGET '{node.TARGET}' has no levels; use ()")
            scale = cfg.KD.TEACHER.INPUT_SCALE
            roi = RoiMaps.build(node.TARGET, student, teacher, "KD.CWD.TARGET", scale)
            return {**kwargs, "roi": roi, "levels": []}
        for side, info in (("student", student), ("teacher", teacher)):
            if "dense" not in info.taps:
                raise ConfigError(
                    f"KD.CWD.TARGET: 'dense' needs a one-stage {side}, {info.arch} is none; "
                    f"detectors that offer it: {', '.join(architectures_with({'dense'}))}"
                )
        kwargs["dense_index"] = _dense_index(kwargs["levels"], student, teacher)
        return kwargs

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_cwd``: weight * sum over levels (or mean over regions) of the divergence."""
        if self.roi is not None:
            student, teacher = self.roi.read(ctx)
            # without regions the mean is one over nothing
            loss = cwd_loss(student, teacher, self.tau) if len(student) else student.sum()
            return {"loss_kd_cwd": self.weight * loss}
        read = self._logits if self.target == "dense" else self._features
        return {
            "loss_kd_cwd": self.weight
            * sum(
                cwd_loss(student, teacher, self.tau, mask)
                for student, teacher, mask in (read(ctx, level) for level in self.levels)
            )
        }

    def _features(self, ctx: DistillContext, level: str):
        return self.pair(ctx, level, self.adapters[level])

    def _logits(self, ctx: DistillContext, level: str):
        ours, theirs = self.dense_index[level]
        student = ctx.student_outputs["dense"][0][ours]
        teacher = ctx.teacher_outputs["dense"][0][theirs]
        if student.shape[1] != teacher.shape[1]:
            raise ConfigError(
                f"KD.CWD.TARGET: 'dense' compares anchors x classes one by one, but at {level} the "
                f"student has {student.shape[1]} of them and the teacher {teacher.shape[1]}; "
                "use 'features'"
            )
        return self.align(ctx, level, student, teacher)


def _dense_index(levels, student, teacher) -> dict[str, tuple[int, int]]:
    """Level to the places of its logits, found by stride on the teacher's side."""
    ours = list(student.model.head_in_features)
    shapes = teacher.model.backbone.output_shape()
    theirs = [shapes[name].stride for name in teacher.model.head_in_features]
    missing = [x for x in levels if x not in ours or teacher.shapes[x].stride not in theirs]
    if missing:
        raise ConfigError(
            f"KD.CWD.LEVELS (or KD.LEVELS): both one-stage heads must read {', '.join(missing)} "
            "for KD.CWD.TARGET 'dense'"
        )
    return {x: (ours.index(x), theirs.index(teacher.shapes[x].stride)) for x in levels}
