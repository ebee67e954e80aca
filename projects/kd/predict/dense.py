"""Predictions on anchors: what RetinaNet and region proposal networks share.

Shapes as in :mod:`~projects.kd.predict.base`; channel ``a * K + k`` is class k of anchor a.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from detectron2.structures import Boxes

from ..errors import ConfigError
from ..functional.output_kd import jitter_boxes
from ..shared_classes import ALL, SharedClasses
from .base import AnchorMatch, DensePair
from .outputs import DenseOutputs


def match_anchors(student, teacher, names: Sequence[str], scale: float, key: str):
    """For each of the student's levels the teacher's predictions for the same anchors.

    A teacher that sees the image enlarged by ``scale`` predicts for its anchors divided by it. They
    are the student's where sizes and shapes agree and centres do on every ``step``-th cell. With
    scale 2 and anchors that double from level to level that is the teacher's next coarser level;
    with anchors twice the student's on the same level, every second cell. Resampling the features
    instead would show the teacher's head objects at a stride that it was not trained for (ours).

    Args:
        student, teacher: their DefaultAnchorGenerator.
        names: the student's levels in the order of its generator.
        scale: side of the teacher's input over that of the student's.
        key: config node, for messages.

    Returns:
        Level to :class:`AnchorMatch`; levels without such predictions are left out.

    Raises:
        ConfigError: not one level has them.
    """
    found = {}
    for place, level in enumerate(names):
        for index in range(len(teacher.strides)):
            match = _match(student, place, teacher, index, scale)
            if match is not None:
                found.setdefault(level, match)
    if not found:
        raise ConfigError(
            f"{key}: the teacher predicts for none of the student's anchors, so their predictions "
            f"cannot be compared one by one; student: {_describe(student)}; teacher, seen at "
            f"1/{scale:g} of its size: {_describe(teacher, scale)} (MODEL.ANCHOR_GENERATOR)"
        )
    return found


def _match(student, place, teacher, index, scale) -> AnchorMatch | None:
    ours, theirs = list(student.cell_anchors)[place], list(teacher.cell_anchors)[index] / scale
    if ours.shape != theirs.shape:
        return None
    # an outline on the meta device has no values to compare
    if not ours.is_meta and not torch.allclose(ours, theirs.to(ours), rtol=1e-4, atol=1e-3):
        return None
    step = student.strides[place] * scale / teacher.strides[index]
    start = student.offset * step - teacher.offset
    if step < 1 or step % 1 or start < 0 or start % 1:
        return None
    return AnchorMatch(index, int(step), int(start))


def _describe(generator, scale: float = 1.0) -> str:
    parts = []
    for stride, anchors in zip(generator.strides, generator.cell_anchors, strict=True):
        if anchors.is_meta:
            sizes = f"{len(anchors)} anchors"
        else:
            sides = ((anchors[:, 2:] - anchors[:, :2]) / scale).tolist()
            sizes = ", ".join(f"{w:.0f}x{h:.0f}" for w, h in sides[:3])
            sizes += ", ..." if len(sides) > 3 else ""
        parts.append(f"stride {stride / scale:g}: {sizes}")
    return "; ".join(parts)


def flatten_cells(maps: Sequence[torch.Tensor], width: int) -> list[torch.Tensor]:
    """(N, A * width, H, W) to (N, H * W * A, width), the order of detectron2's anchors."""
    return [
        x.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).reshape(len(x), -1, width) for x in maps
    ]


def unflatten_cells(values: torch.Tensor, grids: Sequence[tuple[int, int]]):
    """(N, R) over all anchors to per level (N, A, H, W), the inverse order.

    Args:
        values: as many for each cell of each level.
        grids: (H, W) of each level.
    """
    a = values.shape[1] // sum(h * w for h, w in grids)
    parts = values.split([a * h * w for h, w in grids], dim=1)
    return [
        part.unflatten(1, (h, w, a)).permute(0, 3, 1, 2)
        for part, (h, w) in zip(parts, grids, strict=True)
    ]


def level_pair(
    student: DenseOutputs,
    target: DenseOutputs,
    place: int,
    match: AnchorMatch,
    width: int,
    mask: torch.Tensor | None,
    labelled: torch.Tensor | None = None,
    boxes: tuple | None = None,
    jitter: float = 0.0,
    shared: SharedClasses = ALL,
) -> DensePair:
    """One level's predictions of both sides.

    Args:
        student, target: of all levels.
        place: of the level in the student's lists.
        match: where in the target's.
        width: K.
        mask: (N, 1, H, W) bool of valid cells, None = all.
        labelled: (N, A, H, W), -1 = ignored, ``width`` = background, else a class; None = unknown.
        boxes: the level's anchors (Boxes) and the Box2BoxTransform of both; None = no boxes.
        jitter, shared: see :meth:`Predictor.pairs`.
    """
    logits = student.logits[place]
    other = match.select(target.logits[match.index])
    if other.shape[-2:] != logits.shape[-2:]:
        raise ConfigError(
            f"KD.TEACHER.INPUT_SCALE: the teacher predicts on {tuple(other.shape[-2:])} cells "
            f"where the student has {tuple(logits.shape[-2:])}; its image is not of that scale"
        )
    counted = positive = None
    if labelled is not None:
        counted, positive = labelled >= 0, (labelled >= 0) & (labelled != width)
    if mask is not None:
        counted = (
            mask.expand(-1, logits.shape[1] // width, -1, -1)
            if counted is None
            else (counted & mask)
        )
    pair = {
        "student_logits": shared.logits(logits.unflatten(1, (-1, width)), 2),
        "target_logits": other.unflatten(1, (-1, shared.number(width))),
        "counted": counted,
        "positive": positive,
    }
    if boxes is not None:
        deltas = match.select(target.box_maps[match.index])
        pair["student_boxes"] = decode(student.box_maps[place], *boxes, mask)
        pair["target_boxes"] = jitter_boxes(decode(deltas.detach(), *boxes, mask), jitter)
    if student.bins is not None:
        pair["student_bins"] = student.bins[place].unflatten(1, (4, -1))
        pair["target_bins"] = match.select(target.bins[match.index]).detach().unflatten(1, (4, -1))
    return DensePair(**pair)


def decode(deltas: torch.Tensor, anchors: Boxes, transform, mask: torch.Tensor | None):
    """Boxes (N, A, H, W, 4) of deltas (N, A * D, H, W); outside of the mask, of deltas of 0."""
    if mask is not None:  # before the exponential: what lies outside may be infinite
        deltas = deltas.masked_fill(~mask, 0.0)
    count, channels, height, width = deltas.shape
    flat = flatten_cells([deltas], channels * height * width // len(anchors))[0].flatten(0, 1)
    boxes = transform.apply_deltas(flat, anchors.tensor.repeat(count, 1))
    return boxes.view(count, height, width, -1, 4).permute(0, 3, 1, 2, 4)


def check_transforms(student, teacher, key: str) -> None:
    """ConfigError unless both regress boxes in the same units."""
    if tuple(student.weights) != tuple(teacher.weights):
        raise ConfigError(
            f"{key}: student and teacher regress boxes in other units, BBOX_REG_WEIGHTS are "
            f"{tuple(student.weights)} and {tuple(teacher.weights)}"
        )


def identity_matches(names: Sequence[str]) -> Mapping[str, AnchorMatch]:
    """Every level with itself."""
    return {level: AnchorMatch(index) for index, level in enumerate(names)}
