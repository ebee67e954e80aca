"""CWD: channel-wise distillation of features or classification logits."""

from __future__ import annotations

import torch

from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import ConfigError
from ..functional.cwd import cwd_loss
from .base import IMITATION_HEAD_REGISTRY
from .roi_maps import ROI_TARGETS, RoiMaps
from .targets import TARGETS, MapImitation


@register_config
def add_cwd_config(cfg) -> None:
    """Add KD.CWD."""
    cfg.KD.CWD = node = head_node(weight=10.0, mask_padding=False)
    # Temperature of the softmax over positions.
    node.TAU = 1.0
    # True: channels of both sides get zero mean and unit deviation over the valid cells of the
    # batch before the softmax (ours), for maps without a norm such as "decoder" of Semantic FPN.
    node.STANDARDIZE = False
    # "features" = backbone outputs; "dense" = classification logits of a one-stage head;
    # "sem_seg" = class logits of a segmentation head; "decoder" = what their last layer reads;
    # "masks", "keypoints" = mask logits and keypoint heatmaps of the student's foreground
    # proposals; or a map that your own detectors register (TapSpec with channels).
    node.TARGET = "features"


@IMITATION_HEAD_REGISTRY.register()
class CWD(MapImitation):
    """Channel-wise KL divergence, summed over levels (Shu et al., ICCV 2021).

    The weight is per level, as published.

    On logits both sides need the same classes in the same order (of a one-stage head also the same
    anchors); of these only the numbers can be checked.

    Args:
        tau: temperature.
        standardize: of :func:`~projects.kd.functional.cwd.cwd_loss`; False as published.
        roi: reader of "masks" or "keypoints", see :class:`RoiMaps`. With ``tau`` 1 the latter
            compares the distributions that Keypoint R-CNN's own loss is about.
        **base: see :class:`MapImitation`. Adapters are linear by default (ours); the published one
            for segmentation is KD.ADAPTER.TYPE "conv1x1_bn_relu".
    """

    targets = (*TARGETS, *ROI_TARGETS)
    by_channel = True

    def __init__(
        self,
        *,
        tau: float = 1.0,
        standardize: bool = False,
        roi: RoiMaps | None = None,
        **base,
    ):
        super().__init__(**base)
        self.tau = tau
        self.standardize = standardize
        self.roi = roi
        self.needs_boxes = roi is not None
        if roi is not None:
            self.requires = frozenset({"features"})  # the teacher pools the regions from them
            self.requires_student = roi.taps
            self.compares = roi.compares

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.CWD."""
        node = cfg.KD.CWD
        if node.TAU <= 0:
            raise ConfigError(f"KD.CWD.TAU is {node.TAU}, it must be positive")
        own = {"tau": node.TAU, "standardize": node.STANDARDIZE}
        if node.TARGET not in ROI_TARGETS:
            return {**super().from_config(cfg, student, teacher), **own}
        scale = cfg.KD.TEACHER.INPUT_SCALE
        roi = RoiMaps.build(node.TARGET, student, teacher, "KD.CWD.TARGET", scale)
        if node.LEVELS:
            raise ConfigError(f"KD.CWD.LEVELS: TARGET '{node.TARGET}' has no levels; use ()")
        return {
            "levels": [],
            "weight": node.WEIGHT,
            "mask_padding": node.MASK_PADDING,
            "target": node.TARGET,
            **own,
            "roi": roi,
        }

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_cwd``: weight * sum over levels (or mean over regions) of the divergence."""
        if self.roi is not None:
            student, teacher = self.roi.read(ctx)
            # without regions the mean is one over nothing
            loss = self._divergence(student, teacher) if len(student) else student.sum()
            return {"loss_kd_cwd": self.weight * loss}
        return {"loss_kd_cwd": self.weight * sum(self._divergence(*x) for x in self.maps(ctx))}

    def _divergence(self, student, teacher, mask=None) -> torch.Tensor:
        return cwd_loss(student, teacher, self.tau, mask, self.standardize)
