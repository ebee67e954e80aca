"""The towers of a dense head, cut after some of their convolutions: where CrossKD takes over.

A head of detectron2's RetinaNet, FCOS or of GFL has a tower for classes and one for boxes, each a
Sequential of convolutions, norms and ReLUs, and its predictors behind them. Depth k is after the
k-th convolution, its norm and its ReLU; depth 0 is the level's feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import CycleBatchNormList
from torch import nn

from ..errors import ConfigError
from ..taps import TapSpec
from .outputs import run_dense_head

# The tap of a branch to the module of its tower in the head.
TOWERS = {"tower_cls": "cls_subnet", "tower_box": "bbox_subnet"}

Maps = Sequence[torch.Tensor | None]


def activations(tower: nn.Sequential) -> list[int]:
    """Where in a tower its ReLUs stand: one after each convolution."""
    return [place for place, module in enumerate(tower) if isinstance(module, nn.ReLU)]


def tower_depth(head: nn.Module, side: str) -> int:
    """How many convolutions each of a head's two towers has.

    Args:
        head: of the detector.
        side: "student" or "teacher", for the message.

    Raises:
        ConfigError: the head has no such towers, or two of unequal depth.
    """
    towers = [getattr(head, name, None) for name in TOWERS.values()]
    if not all(isinstance(tower, nn.Sequential) for tower in towers):
        raise ConfigError(
            f"KD.HEADS: CrossKD needs a {side} head with the towers "
            f"{' and '.join(TOWERS.values())}, {type(head).__name__} has none"
        )
    depths = {len(activations(tower)) for tower in towers}
    if len(depths) != 1:
        raise ConfigError(f"KD.HEADS: CrossKD needs two towers of equal depth in the {side}'s head")
    return depths.pop()


def tower_width(head: nn.Module, depth: int) -> int:
    """Channels of the towers after ``depth`` convolutions."""
    tower = head.cls_subnet
    convolutions = [x for x in tower if isinstance(x, nn.Conv2d)]
    if depth:
        return convolutions[depth - 1].out_channels
    return (convolutions[0] if convolutions else head.cls_score).in_channels


def cycles(head: nn.Module) -> bool:
    """Whether a norm of the head counts its calls to know the level that it is called for."""
    return any(isinstance(x, CycleBatchNormList) for x in head.modules())


def tower_taps(head: nn.Module, depth: int, before_relu: bool = False) -> dict[str, TapSpec]:
    """Taps of both towers at a depth; {} at depth 0, which is the feature of the level.

    Args:
        head: ``model.head``.
        depth: from 0 to the number of convolutions.
        before_relu: what the ReLU reads in place of what it gives.
    """
    if not depth:
        return {}
    return {
        tap: TapSpec(
            f"head.{name}.{activations(getattr(head, name))[depth - 1]}",
            run=run_dense_head,
            every_call=True,
            take_input=before_relu,
        )
        for tap, name in TOWERS.items()
    }


class TowerRest(nn.Module):
    """What a head computes of its towers' maps at some depth. It shares the head's modules.

    Args:
        head: of detectron2's RetinaNet.
        depth: of the maps.
    """

    def __init__(self, head: nn.Module, depth: int):
        super().__init__()
        self.cls = nn.Sequential(*_rest(head.cls_subnet, depth), head.cls_score)
        self.box = nn.Sequential(*_rest(head.bbox_subnet, depth))
        self.bbox_pred = head.bbox_pred

    def forward(self, cls_maps: Maps, box_maps: Maps, places: Sequence[int]):
        """Outputs as the head returns them, a list of each kind.

        Args:
            cls_maps, box_maps: (N, C, H, W) in the order of the head's levels; None = left out, and
                None then stands in the outputs.
            places: of each map the place of its level among the head's levels.
        """
        outputs = [
            None if x is None else (self.cls(x), *self.boxes(self.box(y), place))
            for x, y, place in zip(cls_maps, box_maps, places, strict=True)
        ]
        kinds = max((len(x) for x in outputs if x is not None), default=2)
        return tuple([None if x is None else x[kind] for x in outputs] for kind in range(kinds))

    def boxes(self, tower: torch.Tensor, place: int) -> tuple[torch.Tensor, ...]:
        """The outputs of the branch of boxes from the end of its tower."""
        return (self.bbox_pred(tower),)


class PointRest(TowerRest):
    """Of FCOS: centre-ness comes from the branch of boxes too."""

    def __init__(self, head: nn.Module, depth: int):
        super().__init__(head, depth)
        self.ctrness = head.ctrness

    def boxes(self, tower, place):
        """Distances and centre-ness."""
        return self.bbox_pred(tower), self.ctrness(tower)


class BinRest(TowerRest):
    """Of GFL: each level has a factor."""

    def __init__(self, head: nn.Module, depth: int):
        super().__init__(head, depth)
        self.scales = head.scales

    def boxes(self, tower, place):
        """Logits of bins."""
        return (self.bbox_pred(tower) * self.scales[place],)


def _rest(tower: nn.Sequential, depth: int) -> list[nn.Module]:
    start = activations(tower)[depth - 1] + 1 if depth else 0
    return list(tower)[start:]
