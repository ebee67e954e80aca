"""FGFI: imitation of FPN features near objects."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import nn

from ..adapters import build_adapter
from ..config import head_node, register_config
from ..context import DistillContext, ModelInfo
from ..detectors import pseudo_anchors
from ..errors import ConfigError, DataError, require_one_of
from ..functional.fgfi import (
    AnchorGrid,
    anchor_masks,
    conv3x3_at,
    gather_cells,
    grid_masks,
    imitation_error,
)
from ..functional.ranks import mean_over_ranks
from .base import IMITATION_HEAD_REGISTRY, ImitationHead, choose_levels

SCOPES = ("joint", "per_level")
ADAPTERS = ("conv3x3", "conv1x1", "none")
# Up to this share of a level's cells the 3x3 adapter runs on the masked cells alone. Measured on a
# CPU: at 0.1 it takes a fifth of the dense time, at 0.5 three fifths, but it copies 9 neighbours.
SPARSE_SHARE = 0.4


@register_config
def add_fgfi_config(cfg) -> None:
    """Add KD.FGFI."""
    cfg.KD.FGFI = node = head_node(weight=0.01, mask_padding=True)
    # psi: a cell is imitated where an anchor's IoU with a box exceeds psi * that box's maximum.
    node.THRESH_FACTOR = 0.5
    # "joint" = the maximum over all levels; "per_level" = each level its own.
    node.ASSIGN = "joint"
    # Anchors of the mask. [] = the student's MODEL.ANCHOR_GENERATOR.
    node.ANCHOR_SIZES = []
    node.ANCHOR_RATIOS = []
    # "conv3x3", "conv1x1" or "none" (none needs equal channels).
    node.ADAPTER = "conv3x3"


@IMITATION_HEAD_REGISTRY.register()
class FGFI(ImitationHead):
    """Squared error where the student's anchors meet objects (Wang et al., CVPR 2019).

    ``weight / (2 N_p) * sum over levels, images, masked cells and channels of (f(s) - t)^2``;
    N_p counts the masked cells of all levels of the whole batch, over all processes. Departures for
    pyramids: joint maximum over levels, no ReLU after f (FPN outputs are signed), one f a level,
    bias 0.

    Args:
        adapters: level to f; 3x3 convolutions with padding 1 are evaluated at masked cells where
            that is cheaper, anything else must work on single cells.
        anchors: a detectron2 anchor generator, one entry for each of ``anchor_levels``.
        anchor_levels: student levels that have anchors; the joint maximum is taken over all of
            them, whether distilled or not.
        psi: a cell is imitated where an anchor's IoU exceeds psi times the box's best.
        per_level: the best within each level.
        **base: see :class:`ImitationHead`.
    """

    needs_boxes = True

    def __init__(
        self,
        *,
        adapters: nn.ModuleDict,
        anchors: nn.Module,
        anchor_levels: Sequence[str],
        psi: float = 0.5,
        per_level: bool = False,
        **base,
    ):
        super().__init__(**base)
        self.adapters = adapters
        self.anchor_levels = tuple(anchor_levels)
        self.psi = psi
        self.per_level = per_level
        # A generator of another class stays the student's submodule, so it is hidden in a tuple.
        regular = type(anchors) is DefaultAnchorGenerator
        self.grid_anchors = copy.deepcopy(anchors) if regular else None
        self._other_anchors = () if regular else (anchors,)

    def reads_of_teacher(self) -> tuple[str, ...]:
        """See the base class."""
        return self.levels

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.FGFI."""
        node = cfg.KD.FGFI
        require_one_of("KD.FGFI.ASSIGN", node.ASSIGN, SCOPES)
        require_one_of("KD.FGFI.ADAPTER", node.ADAPTER, ADAPTERS)
        if not 0 <= node.THRESH_FACTOR < 1:
            raise ConfigError(
                f"KD.FGFI.THRESH_FACTOR is {node.THRESH_FACTOR}, it must be in [0, 1)"
            )
        kwargs = super().from_config(cfg, student, teacher)
        anchors, anchor_levels = student_anchors(cfg, student, kwargs["levels"])
        if not (node.LEVELS or cfg.KD.LEVELS):
            with_anchors = [level for level in kwargs["levels"] if level in anchor_levels]
            kwargs["levels"] = choose_levels(with_anchors, student, teacher, cls)
        without = [level for level in kwargs["levels"] if level not in anchor_levels]
        if without:
            raise ConfigError(
                f"KD.FGFI.LEVELS (or KD.LEVELS): the student has no anchors on "
                f"{', '.join(without)}; levels with anchors: {', '.join(anchor_levels)}"
            )
        kwargs.update(
            adapters=build_fgfi_adapters(node.ADAPTER, kwargs["levels"], student, teacher),
            anchors=anchors,
            anchor_levels=anchor_levels,
            psi=node.THRESH_FACTOR,
            per_level=node.ASSIGN == "per_level",
        )
        return kwargs

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_fgfi``; 0 with gradient 0 when no cell is selected."""
        masks = self.masks(ctx)
        counts = torch.stack([mask.sum() for mask in masks.values()])
        selected = dict(zip(masks, counts.tolist(), strict=True))
        error = sum(self._error(ctx, level, masks[level], selected[level]) for level in self.levels)
        normaliser = mean_over_ranks(counts.sum().to(error.dtype))
        ctx.put_scalar("kd/fgfi_cells", sum(selected.values()))
        return {"loss_kd_fgfi": self.weight * error / (2 * normaliser.clamp(min=1e-6))}

    @torch.no_grad()
    def masks(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """Level to (N, H, W) bool, the cells to imitate."""
        if ctx.gt is None:
            raise DataError("KD.HEADS: FGFI needs boxes, and this batch has no annotations")
        boxes = [instances.gt_boxes.tensor for instances in ctx.gt]
        features = [ctx.student_features[level] for level in self.anchor_levels]
        sizes = [tuple(feature.shape[-2:]) for feature in features]
        if self.grid_anchors is not None:
            grid = self.grid_anchors
            grids = [
                AnchorGrid(*one, offset=grid.offset)
                for one in zip(grid.cell_anchors, grid.strides, sizes, strict=True)
            ]
            found = grid_masks(boxes, grids, self.psi, self.per_level)
        else:
            anchors = [level.tensor for level in self._other_anchors[0](features)]
            found = anchor_masks(boxes, anchors, sizes, self.psi, self.per_level)
        by_level = dict(zip(self.anchor_levels, found, strict=True))
        masks = {level: by_level[level] for level in self.levels}
        for level in self.levels if self.mask_padding else ():
            masks[level] &= ctx.valid_mask(level)[:, 0]
        return masks

    def _error(self, ctx, level: str, mask: torch.Tensor, selected: int) -> torch.Tensor:
        student, teacher, valid = self.pair(ctx, level)
        adapter = self.adapters[level]
        if not _is_conv3x3(adapter):
            rows = adapter(gather_cells(student, mask)[:, :, None, None]).flatten(1)
        elif selected <= SPARSE_SHARE * mask.numel():
            inside = None if valid is None else valid[:, 0]
            rows = conv3x3_at(student, adapter.weight, adapter.bias, mask, inside)
        else:
            student = student if valid is None else torch.where(valid, student, 0.0)
            rows = gather_cells(adapter(student), mask)
        return imitation_error(rows, gather_cells(teacher, mask))


def _is_conv3x3(adapter: nn.Module) -> bool:
    return isinstance(adapter, nn.Conv2d) and adapter.kernel_size == (3, 3)


def build_fgfi_adapters(
    kind: str, levels: Sequence[str], student: ModelInfo, teacher: ModelInfo
) -> nn.ModuleDict:
    """One adapter a level; convolutions start near 0: N(0, 1e-4) cut at two deviations, bias 0."""
    adapters = nn.ModuleDict()
    for level in levels:
        channels = student.shapes[level].channels, teacher.shapes[level].channels
        adapters[level] = build_adapter(kind, *channels, key="KD.FGFI.ADAPTER")
    for module in adapters.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=1e-4, a=-2e-4, b=2e-4)
            nn.init.zeros_(module.bias)
    return adapters


def student_anchors(
    cfg, student: ModelInfo, levels: Sequence[str]
) -> tuple[nn.Module, tuple[str, ...]]:
    """The anchor generator of the imitation mask, and the student levels it serves.

    KD.FGFI.ANCHOR_SIZES and ANCHOR_RATIOS (each like its namesake in MODEL.ANCHOR_GENERATOR, which
    is taken for the one not given) make anchors for the mask only. Else it is the student's own:
    RetinaNet's, or the proposal network's. A detector that registered pseudo-anchors (FCOS) gets
    those.

    Args:
        cfg: the student's config.
        student: its side.
        levels: those a student without anchors gets them on.

    Raises:
        ConfigError: no anchors, rotated ones, or as many lists as no levels.
    """
    node, own = cfg.KD.FGFI, cfg.MODEL.ANCHOR_GENERATOR
    generator, anchor_levels = _own_anchors(student.model)
    anchor_levels = anchor_levels or tuple(levels)
    shapes = student.model.backbone.output_shape()
    strides = [shapes[level].stride for level in anchor_levels]
    offset = getattr(generator, "offset", own.OFFSET)
    sizes = list(node.ANCHOR_SIZES) or own.SIZES
    ratios = list(node.ANCHOR_RATIOS) or own.ASPECT_RATIOS
    if not (node.ANCHOR_SIZES or node.ANCHOR_RATIOS):
        factor = pseudo_anchors(student.model)
        if factor is not None:
            sizes, ratios = [[factor * stride] for stride in strides], [[1.0]]
        elif generator is None:
            raise ConfigError(
                f"KD.FGFI.ANCHOR_SIZES: {student.arch} has no anchors; give sizes (and "
                "ANCHOR_RATIOS) for the imitation mask, e.g. [[64], [128], ...] a level"
            )
        elif getattr(generator, "box_dim", 4) != 4:
            raise ConfigError(
                f"MODEL.ANCHOR_GENERATOR.NAME: FGFI cannot use {type(generator).__name__}'s "
                "anchors; set KD.FGFI.ANCHOR_SIZES and ANCHOR_RATIOS"
            )
        else:
            return generator, anchor_levels
    try:
        anchors = DefaultAnchorGenerator(
            sizes=sizes, aspect_ratios=ratios, strides=strides, offset=offset
        )
    except (AssertionError, TypeError) as error:
        raise ConfigError(
            f"KD.FGFI.ANCHOR_SIZES {sizes}, ANCHOR_RATIOS {ratios}: one list for all of "
            f"{', '.join(anchor_levels)} or one for each is needed: {error}"
        ) from error
    return anchors, anchor_levels


def _own_anchors(model: nn.Module) -> tuple[nn.Module | None, tuple[str, ...]]:
    network = getattr(model, "proposal_generator", None)
    if getattr(network, "anchor_generator", None) is not None:
        return network.anchor_generator, tuple(network.in_features)
    if getattr(model, "anchor_generator", None) is not None:
        return model.anchor_generator, tuple(model.head_in_features)
    return None, tuple(getattr(model, "head_in_features", ()))
