"""DSI: a level in the direction of a foundation model's map."""

from __future__ import annotations

import torch
from torch import nn

from ..adapters import ADAPTER_TYPES, build_adapter
from ..config import head_node, register_config
from ..context import DistillContext, ModelInfo
from ..detectors import tapped_module
from ..errors import ConfigError, require_one_of
from ..functional.dsi import cosine_loss
from .base import IMITATION_HEAD_REGISTRY, ImitationHead, adapt

_TARGETS = ("features", "bottom_up")
_LAST_STRIDE = 32  # of F5, the map that the paper aligns


@register_config
def add_dsi_config(cfg) -> None:
    """Add KD.DSI."""
    # that of RT-DETRv4-S and M; 15 for L, 20 for X
    cfg.KD.DSI = node = head_node(weight=5.0, mask_padding=True)
    # What of the student is aligned: "features" = levels of its pyramid; "bottom_up" = the stages
    # of its backbone of the same strides. KD.DSI.LEVELS () = the coarsest one up to stride 32.
    node.TARGET = "features"
    # The projector, one of KD.ADAPTER.TYPE. The published one is a linear layer: "conv1x1".
    node.ADAPTER = "conv1x1"


@IMITATION_HEAD_REGISTRY.register()
class DSI(ImitationHead):
    """1 - cosine of a student map and a transformer's (Liao et al., RT-DETRv4, 2025).

    ``weight * mean over levels of`` :func:`~projects.kd.functional.dsi.cosine_loss` between the
    student's map, projected, and the teacher's map on its grid. "Deep semantic injector" is the
    paper's name of it.

    Args:
        adapters: level to a module that maps student channels to teacher channels.
        stages: level to the stage of the student's backbone that is aligned in its place; {} = the
            levels themselves.
        **base: see :class:`ImitationHead`.
    """

    targets = _TARGETS

    def __init__(self, *, adapters: nn.ModuleDict, stages: dict[str, str], **base):
        super().__init__(**base)
        self.adapters = adapters
        self.stages = dict(stages)
        self.requires_student = frozenset({"bottom_up"} if stages else ())

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.DSI."""
        node = cfg.KD.DSI
        require_one_of("KD.DSI.TARGET", node.TARGET, _TARGETS)
        require_one_of("KD.DSI.ADAPTER", node.ADAPTER, ADAPTER_TYPES)
        kwargs = super().from_config(cfg, student, teacher)
        levels = kwargs["levels"]
        shapes, stages = {x: student.shapes[x] for x in levels}, {}
        if node.TARGET == "bottom_up":
            stages = _stages(student, levels)
            offered = tapped_module(student.model, "bottom_up").output_shape()
            shapes = {level: offered[stage] for level, stage in stages.items()}
        widths = {x: (shapes[x].channels, teacher.shapes[x].channels) for x in levels}
        adapters = {x: build_adapter(node.ADAPTER, *widths[x], "KD.DSI.ADAPTER") for x in levels}
        return {**kwargs, "adapters": nn.ModuleDict(adapters), "stages": stages}

    @classmethod
    def preferred(cls, levels, shapes):
        """The coarsest one up to stride 32."""
        upto = [level for level in levels if shapes[level].stride <= _LAST_STRIDE]
        return (upto or list(levels[:1]))[-1:]

    def acts_on(self, ctx: DistillContext) -> list[torch.Tensor]:
        """The maps that it aligns."""
        return [self._own(ctx, level) for level in self.levels]

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_dsi``."""
        total = 0.0
        for level in self.levels:
            maps = self._own(ctx, level), ctx.teacher_features[level]
            student, teacher, mask = self.align(ctx, level, *maps)
            total = total + cosine_loss(adapt(student, mask, self.adapters[level]), teacher, mask)
        return {"loss_kd_dsi": self.weight * total / len(self.levels)}

    def _own(self, ctx: DistillContext, level: str) -> torch.Tensor:
        if not self.stages:
            return ctx.student_features[level]
        return ctx.student_outputs["bottom_up"][self.stages[level]]


def _stages(student: ModelInfo, levels: list[str]) -> dict[str, str]:
    """Level to the last stage of the student's backbone that has its stride."""
    try:
        offered = dict(tapped_module(student.model, "bottom_up").output_shape())
    except (ConfigError, AttributeError) as error:
        raise ConfigError(
            f"KD.DSI.TARGET 'bottom_up': {student.arch} has a "
            f"{type(student.model.backbone).__name__} without stages below a pyramid; use "
            "'features'"
        ) from error
    by_stride = {shape.stride: stage for stage, shape in offered.items()}
    lacking = [level for level in levels if student.shapes[level].stride not in by_stride]
    if lacking:
        raise ConfigError(
            f"KD.DSI.LEVELS (or KD.LEVELS): the student's backbone has no stage of the stride of "
            f"{', '.join(lacking)}; it has strides {', '.join(map(str, by_stride))}"
        )
    return {level: by_stride[student.shapes[level].stride] for level in levels}
