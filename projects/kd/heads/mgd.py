"""MGD: masked generative distillation."""

from __future__ import annotations

import torch
from torch import nn

from ..config import head_node, register_config
from ..context import DistillContext, ModelInfo
from ..errors import ConfigError
from ..functional.mgd import mgd_loss, random_cells
from ..predict.base import step_precision
from .area import AreaReference, add_area_key
from .base import IMITATION_HEAD_REGISTRY
from .targets import MapImitation, channels_of


@register_config
def add_mgd_config(cfg) -> None:
    """Add KD.MGD."""
    # alpha of one-stage detectors; of two-stage ones 5e-7
    cfg.KD.MGD = node = head_node(weight=2e-5, mask_padding=False)
    # lambda: the share of the student's cells that are hidden from the generator. Published: 0.65
    # for one-stage detectors, 0.45 for two-stage ones. 0 hides none.
    node.MASK_RATIO = 0.65
    # "features" = backbone outputs; "decoder" = what a segmentation head's last layer reads.
    node.TARGET = "features"
    add_area_key(node)


@IMITATION_HEAD_REGISTRY.register()
class MGD(MapImitation):
    """The teacher's map, generated from the student's with cells hidden (Yang et al., ECCV 2022).

    ``weight * sum over levels of`` :func:`~projects.kd.functional.mgd.mgd_loss`, times the factor
    of AREA_REF (ours; the published sum grows with the image). Each level has a generator of its
    own, two 3x3 convolutions with a ReLU between, which trains with the student and is not part of
    it. It runs in the precision of the step, the loss in fp32.

    Args:
        generators: level (or "decoder") to a module from the teacher's channels to these.
        mask_ratio: probability that a cell is hidden.
        area: what scales the sums over cells.
        **base: see :class:`MapImitation`.
    """

    targets = ("features", "decoder")
    by_channel = True

    def __init__(
        self, *, generators: nn.ModuleDict, mask_ratio: float, area: AreaReference, **base
    ):
        super().__init__(**base)
        self.generators = generators
        self.mask_ratio = mask_ratio
        self.area = area

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.MGD."""
        node = cfg.KD.MGD
        if not 0 <= node.MASK_RATIO <= 1:
            raise ConfigError(f"KD.MGD.MASK_RATIO is {node.MASK_RATIO:g}, it must be from 0 to 1")
        kwargs = super().from_config(cfg, student, teacher)
        levels = kwargs["levels"]
        return {
            **kwargs,
            "generators": nn.ModuleDict(_generators(node.TARGET, levels, teacher)),
            "mask_ratio": float(node.MASK_RATIO),
            "area": AreaReference.from_node(node, "KD.MGD", student, levels),
        }

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_mgd``; every cell counts, hidden or not."""
        total = 0.0
        for name, (student, teacher, mask) in zip(self.generators, self.maps(ctx), strict=True):
            shown = random_cells(student, self.mask_ratio)
            if mask is not None:
                shown = shown & mask
            with step_precision(self._precision(ctx)):
                generated = self.generators[name](torch.where(shown, student, 0.0))
            total = total + mgd_loss(generated, teacher, mask)
        if self.levels:
            factor = self.area.of_levels(ctx, self.levels)
        else:
            factor = self.area.of_map(ctx, student)
        return {"loss_kd_mgd": self.weight * factor * total}

    def _precision(self, ctx: DistillContext) -> torch.Tensor:
        """A tensor of the type that the student computed in."""
        return next(iter(ctx.student_features.values()))


def _generators(target: str, levels, teacher: ModelInfo) -> dict[str, nn.Module]:
    if target == "features":
        return {level: _generator(teacher.shapes[level].channels) for level in levels}
    return {target: _generator(channels_of(teacher, target))}


def _generator(channels: int) -> nn.Sequential:
    first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second)
