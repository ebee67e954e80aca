"""FGD: focal and global distillation of features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..config import head_node, register_config
from ..context import DistillContext, ModelInfo
from ..detectors import class_names_of
from ..errors import ConfigError
from ..functional.fgd import background_scales, box_scales, fgd_terms
from .area import AreaReference, add_area_key
from .base import IMITATION_HEAD_REGISTRY, ImitationHead, build_adapters

OF_FAMILY = -1.0
LEAST_CHANNELS = 2  # the context block halves them


class FGDValues(NamedTuple):
    """Factors of the terms in the order of :class:`FGDTerms`, and the attentions' temperature."""

    alpha: float
    beta: float
    gamma: float
    lambda_: float
    temperature: float = 0.5


# The published configs by the student's meta-arch. The paper's text has twice RetinaNet's GAMMA and
# ten times FCOS's.
VALUES = {
    "RetinaNet": FGDValues(1e-3, 5e-4, 5e-4, 5e-6),
    "GFL": FGDValues(1e-3, 5e-4, 5e-4, 5e-6),
    "RepPoints": FGDValues(1.6e-3, 8e-4, 8e-4, 8e-6),
    "FCOS": FGDValues(1.6e-3, 8e-4, 8e-4, 8e-6, 0.8),
    "GeneralizedRCNN": FGDValues(5e-5, 2.5e-5, 5e-5, 5e-7),
}
KEYS = dict(
    zip(FGDValues._fields, ("ALPHA", "BETA", "GAMMA", "LAMBDA", "TEMPERATURE"), strict=True)
)


@register_config
def add_fgd_config(cfg) -> None:
    """Add KD.FGD."""
    # WEIGHT is a factor of all four terms
    cfg.KD.FGD = node = head_node(weight=1.0, mask_padding=False)
    # Factors of the terms: cells in boxes, the other cells, attention, context. -1 = the published
    # ones of the student's detector (RetinaNet's for detectors that have none).
    node.ALPHA = OF_FAMILY
    node.BETA = OF_FAMILY
    node.GAMMA = OF_FAMILY
    node.LAMBDA = OF_FAMILY
    # Temperature of the attentions' softmax; -1 = the published one of the student's detector.
    node.TEMPERATURE = OF_FAMILY
    # Of the terms of attention and context; the others do not grow with the image.
    add_area_key(node)


class ContextBlock(nn.Module):
    """What a map's global context adds to each of its cells (GCNet's block, Cao et al., 2019).

    ``u = W2 ReLU(LN(W1 ctx)), ctx = sum_x softmax_x(w . F_x) F_x``. W2 starts at 0, so that the
    block adds nothing at first. The published w has a bias, which a softmax does not see.

    Args:
        channels: C; the hidden layer has C // 2.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.key = nn.Conv2d(channels, 1, 1, bias=False)
        nn.init.kaiming_normal_(self.key.weight)
        last = nn.Linear(channels // 2, channels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = nn.Linear(channels, channels // 2)
        self.transform = nn.Sequential(first, nn.LayerNorm(channels // 2), nn.ReLU(), last)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """u (N, C) of features (N, C, H, W), which are 0 outside of the mask (N, 1, H, W)."""
        logits = self.key(features)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        weights = logits.flatten(2).softmax(2)
        context = features.flatten(2) @ weights.transpose(1, 2)
        return self.transform(context[:, :, 0])


@IMITATION_HEAD_REGISTRY.register()
class FGD(ImitationHead):
    """Focal and global distillation (Yang et al., CVPR 2022), summed over levels.

    ``loss_kd_fgd_fg``, ``_bg``, ``_att`` and ``_glob`` are the terms of
    :func:`~projects.kd.functional.fgd.fgd_terms` times ALPHA, BETA, GAMMA and LAMBDA, the
    latter two also times the factor of AREA_REF (ours: they grow with the image, the others do
    not). The first is a sum over boxes: crowded images weigh more.

    Args:
        adapters: level to a module that maps student channels to teacher channels.
        channels: level to the teacher's channels, the width of its two context blocks.
        values: factors and temperature.
        area: what scales the sums over cells.
        **base: see :class:`ImitationHead`.
    """

    needs_boxes = True

    def __init__(
        self,
        *,
        adapters: nn.ModuleDict,
        channels: dict[str, int],
        values: FGDValues,
        area: AreaReference,
        **base,
    ):
        super().__init__(**base)
        self.adapters = adapters
        self.values = values
        self.area = area
        # both are trained, that of the teacher's side as well, as published
        self.student_context, self.teacher_context = (
            nn.ModuleDict({level: ContextBlock(width) for level, width in channels.items()})
            for _ in range(2)
        )

    def reads_of_teacher(self) -> tuple[str, ...]:
        """See the base class."""
        return self.levels

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.FGD."""
        kwargs = super().from_config(cfg, student, teacher)
        if class_names_of(student.arch) == "stuff_classes":
            raise ConfigError(
                f"KD.HEADS: FGD weighs cells by boxes, and {student.arch} is trained without boxes"
            )
        channels = {level: teacher.shapes[level].channels for level in kwargs["levels"]}
        for level, width in channels.items():
            if width < LEAST_CHANNELS:
                raise ConfigError(
                    f"KD.FGD.LEVELS (or KD.LEVELS): the teacher's {level} has {width} channel, FGD "
                    f"needs at least {LEAST_CHANNELS}"
                )
        node = cfg.KD.FGD
        return {
            **kwargs,
            "adapters": build_adapters(cfg.KD.ADAPTER.TYPE, kwargs["levels"], student, teacher),
            "channels": channels,
            "values": _values(node, student),
            "area": AreaReference.from_node(node, "KD.FGD", student, kwargs["levels"]),
        }

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """The four losses; without boxes the first is 0."""
        boxes = ctx.boxes_on_cpu()
        each = [self._terms(ctx, level, boxes) for level in self.levels]
        factor = self.area.of_levels(ctx, self.levels)
        totals = [sum(terms) for terms in zip(*each, strict=True)]
        names = zip(("fg", "bg", "att", "glob"), totals, self.values[:4], strict=True)
        losses = {name: self.weight * weight * total for name, total, weight in names}
        for name in ("att", "glob"):
            losses[name] = losses[name] * factor
        return {f"loss_kd_fgd_{name}": loss for name, loss in losses.items()}

    def _terms(self, ctx: DistillContext, level: str, boxes):
        student, teacher, mask = self.pair(ctx, level, self.adapters[level])
        size = tuple(student.shape[-2:])
        foreground = box_scales(boxes, size, ctx.stride(level))
        foreground = foreground.to(student.device, non_blocking=True)
        if mask is not None:
            # the adapter's bias, or what the maps hold there
            student, teacher = (torch.where(mask, x, 0.0) for x in (student, teacher))
            foreground = foreground * mask[:, 0]
        return fgd_terms(
            student,
            teacher,
            self.student_context[level](student, mask),
            self.teacher_context[level](teacher, mask),
            foreground,
            background_scales(foreground, mask),
            self.values.temperature,
            mask,
        )

    def extra_repr(self) -> str:
        """Also the values in use."""
        return f"{super().extra_repr()}, {self.values}"


def _values(node, student: ModelInfo) -> FGDValues:
    names = [base.__name__ for base in type(student.model).__mro__]
    published = next((VALUES[x] for x in names if x in VALUES), VALUES["RetinaNet"])
    chosen = {x: node[key] for x, key in KEYS.items() if node[key] != OF_FAMILY}
    for field, value in chosen.items():
        if value < 0 or (field == "temperature" and value == 0):
            kind = "positive" if field == "temperature" else "a number from 0 on"
            raise ConfigError(f"KD.FGD.{KEYS[field]} is {value:g}, it must be {kind}, or -1")
    return published._replace(**chosen)
