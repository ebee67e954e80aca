"""What dense heads compute, with a name for each kind of output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from ..taps import TapSpec


@dataclass(frozen=True)
class DenseOutputs:
    """Raw outputs of a head that predicts at every cell, each a list over its levels.

    Shapes: N images, A predictions a cell (anchors, or 1), K classes, (H, W) cells of a level. A
    proposal network has K = 1.

    Attributes:
        logits: (N, A * K, H, W) of the classes.
        boxes: (N, A * 4, H, W), deltas of anchors, or distances to the sides in the detector's
            units.
        bins: (N, A * 4 * (n + 1), H, W), logits of distributions over the distances, of detectors
            that have those in place of ``boxes``.
        centreness: (N, A, H, W) logits.
    """

    logits: list[torch.Tensor]
    boxes: list[torch.Tensor] | None = None
    bins: list[torch.Tensor] | None = None
    centreness: list[torch.Tensor] | None = None

    @property
    def box_maps(self) -> list[torch.Tensor]:
        """What boxes are decoded from: ``bins`` of the detectors that have them, else ``boxes``."""
        return self.boxes if self.bins is None else self.bins

    def parts(self) -> dict[str, list[torch.Tensor]]:
        """Those that the head has, by their names."""
        found = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: maps for name, maps in found.items() if maps is not None}

    def float(self) -> DenseOutputs:
        """The same in fp32."""
        return type(self)(**{k: [x.float() for x in maps] for k, maps in self.parts().items()})


def named(*names: str) -> Callable[[Sequence], DenseOutputs]:
    """A function that takes what a head returns, and gives its first outputs these names."""
    return lambda outputs: DenseOutputs(**dict(zip(names, outputs, strict=False)))


def run_dense_head(model, features) -> None:
    """Run ``model.head`` on its levels."""
    model.head([features[level] for level in model.head_in_features])


def dense_tap(*names: str) -> TapSpec:
    """The tap of ``model.head``, of detectors that are detectron2's ``DenseDetector``.

    Args:
        *names: fields of :class:`DenseOutputs` in the order in which the head returns them.
    """
    return TapSpec("head", run=run_dense_head, channels=_class_channels, select=named(*names))


def _class_channels(model) -> int | None:
    """A * K, where the head's last layer has the name that detectron2's and ours have."""
    return getattr(getattr(model.head, "cls_score", None), "out_channels", None)
