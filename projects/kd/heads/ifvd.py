"""IFVD: intra-class feature variation."""

from __future__ import annotations

import torch

from ..config import head_node, register_config
from ..context import DistillContext, ModelInfo
from ..detectors import configured_classes
from ..errors import ConfigError, DataError, require_one_of
from ..functional.ifvd import box_labels, ifvd_loss, resize_labels
from .base import IMITATION_HEAD_REGISTRY
from .targets import MapImitation

LABELS = ("auto", "sem_seg", "boxes")


@register_config
def add_ifvd_config(cfg) -> None:
    """Add KD.IFVD."""
    cfg.KD.IFVD = node = head_node(weight=200.0, mask_padding=False)
    # "features" = backbone outputs; "decoder" = what a segmentation head's last layer reads.
    node.TARGET = "features"
    # Where a cell's class comes from: "sem_seg" = the label map; "boxes" = the smallest box over
    # the cell, or background; "auto" = label maps for students that segment, else boxes.
    node.LABELS = "auto"


@IMITATION_HEAD_REGISTRY.register()
class IFVD(MapImitation):
    """Similarity of cells to their class's prototype, summed over levels (Wang et al., ECCV 2020).

    Needs no adapters: similarities have no channels. With boxes (ours, the paper segments) every
    level sees every box, and background is a class of its own.

    Args:
        labels: "sem_seg" or "boxes".
        num_classes: classes of the labels, background not counted.
        ignore: label of pixels without a class.
        **base: see :class:`MapImitation`.
    """

    targets = ("features", "decoder")

    def __init__(self, *, labels: str, num_classes: int, ignore: int = 255, **base):
        super().__init__(**base)
        self.labels = labels
        self.num_classes = num_classes
        self.ignore = ignore
        self.needs_boxes = labels == "boxes"
        self.needs_label_maps = labels == "sem_seg"

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.IFVD."""
        labels = cfg.KD.IFVD.LABELS
        require_one_of("KD.IFVD.LABELS", labels, LABELS)
        if labels == "auto":
            labels = "sem_seg" if "sem_seg" in student.taps else "boxes"
        kwargs = super().from_config(cfg, student, teacher)
        if labels == "boxes" and kwargs["target"] != "features":
            raise ConfigError("KD.IFVD.LABELS: 'boxes' needs KD.IFVD.TARGET 'features'")
        head = cfg.MODEL.SEM_SEG_HEAD
        number = head.NUM_CLASSES if labels == "sem_seg" else _box_classes(cfg, student)
        kwargs.update(labels=labels, num_classes=number, ignore=head.IGNORE_VALUE)
        return kwargs

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_ifvd``: weight * sum over levels."""
        total = 0.0
        names = self.levels or (None,)
        for level, (student, teacher, mask) in zip(names, self.maps(ctx), strict=True):
            size = tuple(student.shape[-2:])
            if self.labels == "sem_seg":
                labels = resize_labels(self._label_maps(ctx), size)
                total = total + ifvd_loss(student, teacher, labels, self.num_classes, mask)
            else:
                labels = self._box_labels(ctx, level, size)
                total = total + ifvd_loss(student, teacher, labels, self.num_classes + 1, mask)
        return {"loss_kd_ifvd": self.weight * total}

    def _label_maps(self, ctx: DistillContext) -> torch.Tensor:
        try:
            return ctx.label_maps(self.ignore)
        except DataError as error:
            raise DataError(
                f"KD.IFVD.LABELS 'sem_seg' needs label maps: {error}; 'boxes' makes them of boxes"
            ) from error

    def _box_labels(self, ctx: DistillContext, level: str, size: tuple[int, int]):
        stride, rest = ctx.stride(level), self.num_classes
        return torch.stack(
            [
                box_labels(image.gt_boxes.tensor, image.gt_classes, size, stride, rest)
                for image in ctx.gt
            ]
        )


def _box_classes(cfg, student: ModelInfo) -> int:
    number = configured_classes(cfg, type(student.model))
    if number is not None:
        return number
    raise ConfigError(
        f"KD.IFVD.LABELS: the number of classes of {student.arch} is not known; "
        "call register_detector beside the meta-arch"
    )
