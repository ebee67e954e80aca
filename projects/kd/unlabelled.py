"""Images without labels in a training step: what the student computes of them, and joined batches.

Labelled and unlabelled images go through the student one after the other, each part on its own
canvas. So the task losses, and what batch norms do to the labelled part, are those of the labelled
images alone. Heads that need no labels see both parts as one batch.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from detectron2.utils.logger import log_first_n
from torch import nn

from .context import DistillContext
from .data.unlabelled import FLAG, KEY
from .errors import ConfigError
from .heads.base import ImitationHead
from .predict.outputs import DenseOutputs
from .taps import FeatureTaps, run_tapped


def parts_of(batch: Sequence[dict]) -> list[list[dict]]:
    """The labelled images of a batch, then those marked ``unlabeled``; only parts that it has."""
    parts = [[x for x in batch if bool(x.get(FLAG)) == without] for without in (False, True)]
    return [part for part in parts if part]


def observe_unlabelled(
    student: nn.Module, taps: FeatureTaps, batch: list[dict], canvas: tuple[int, int]
) -> dict[str, Any]:
    """What a detector in training mode gives of images without running its losses.

    Args:
        student: the detector; its ``preprocess_image`` is used if it has one.
        taps: placed on it.
        batch: examples with ``image``.
        canvas: (height, width) to which it pads them.

    Returns:
        Tap name to its value, of the taps that the backbone or their ``run`` reaches.

    Raises:
        ConfigError: a detector that normalises its images in a way of its own.
    """
    images = _preprocessed(student, batch, canvas)
    with taps.record():
        run_tapped(student, taps.specs.values(), student.backbone(images.tensor), images)
    return {name: taps[name] for name in taps.specs if name in taps}


def _preprocessed(student: nn.Module, batch: list[dict], canvas) -> ImageList:
    if hasattr(student, "preprocess_image"):
        return student.preprocess_image(batch)
    if not (hasattr(student, "pixel_mean") and hasattr(student, "pixel_std")):
        raise ConfigError(
            f"{KEY}: {type(student).__name__} has neither preprocess_image(batch) nor pixel_mean "
            "and pixel_std, so that images cannot be run without its losses"
        )
    images = [x["image"].to(student.device, non_blocking=True) for x in batch]
    images = [(image - student.pixel_mean) / student.pixel_std for image in images]
    sizes = [tuple(image.shape[-2:]) for image in images]
    ends = [(0, canvas[1] - width, 0, canvas[0] - height) for height, width in sizes]
    padded = [F.pad(image, end) for image, end in zip(images, ends, strict=True)]
    return ImageList(torch.stack(padded), sizes)


class Joined(Mapping):
    """Values of two parts of a batch by name, joined when first asked for.

    Args:
        first, second: name to a map (N, C, H, W), or to lists, dicts and
            :class:`~projects.kd.predict.DenseOutputs` of such. Names of one part alone, and what
            cannot be joined, are left out.
        sources: gets for the ``id`` of each joined map the two it was made of.
    """

    def __init__(self, first: Mapping, second: Mapping, sources: dict):
        names = (name for name in first if name in second)
        self._pairs = {
            name: (first[name], second[name])
            for name in names
            if _is_maps(first[name]) and _is_maps(second[name])
        }
        self._sources = sources
        self._made: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __contains__(self, name) -> bool:
        return name in self._pairs

    def __getitem__(self, name: str):
        if name not in self._made:
            self._made[name] = self._join(*self._pairs[name])
        return self._made[name]

    def _join(self, first, second):
        if isinstance(first, torch.Tensor):
            joined = torch.cat(_on_one_grid(first, second))
            self._sources[id(joined)] = (first, second)
            return joined
        if isinstance(first, Mapping):
            return {name: self._join(first[name], second[name]) for name in first}
        if isinstance(first, DenseOutputs):
            return DenseOutputs(**self._join(first.parts(), second.parts()))
        return [self._join(*pair) for pair in zip(first, second, strict=True)]


def _is_maps(value) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 4
    if isinstance(value, DenseOutputs):
        value = value.parts()
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and all(_is_maps(x) for x in value)


def _on_one_grid(*maps: torch.Tensor) -> list[torch.Tensor]:
    """Maps (N, C, H, W) with zeros below and to the right, up to the largest H and W."""
    rows, columns = (max(x.shape[axis] for x in maps) for axis in (2, 3))
    return [
        F.pad(x, (0, columns - x.shape[3], 0, rows - x.shape[2]))
        if x.shape[2:] != (rows, columns)
        else x
        for x in maps
    ]


def join(
    labelled: DistillContext, unlabelled: DistillContext, student: DistillContext | None = None
) -> DistillContext:
    """Both parts as one batch without ground truth, labelled images first.

    The canvas is the least that holds both; where a part's own is smaller its maps have zeros, on
    both sides, which count as padding. A part in ``labelled`` of the result is what heads that need
    labels see.

    Args:
        labelled, unlabelled: the parts.
        student: a joined context that has the student's maps already, of another teacher.
    """
    sources: dict[int, tuple] = {} if student is None else student.sources
    pairs = {
        name: Joined(getattr(labelled, name), getattr(unlabelled, name), sources)
        if student is None or name.startswith("teacher")
        else getattr(student, name)
        for name in (
            "student_features",
            "teacher_features",
            "student_outputs",
            "teacher_outputs",
        )
    }
    joined = dataclasses.replace(
        labelled,
        **pairs,
        image_sizes=labelled.image_sizes + unlabelled.image_sizes,
        teacher_image_sizes=labelled.teacher_image_sizes + unlabelled.teacher_image_sizes,
        canvas=tuple(max(x) for x in zip(labelled.canvas, unlabelled.canvas, strict=True)),
        gt=None,
        batch=labelled.batch + unlabelled.batch,
        labelled=labelled,
        sources=sources,
        others={},
        _masks={},
    )
    made: dict[int, DistillContext] = {}  # heads of one teacher share a context
    for head, own in labelled.others.items():
        if id(own) not in made:
            made[id(own)] = join(own, unlabelled.others[head], joined)
        joined.others[head] = made[id(own)]
    return joined


def context_of(head: ImitationHead, name: str, ctx: DistillContext) -> DistillContext:
    """What a head learns from: the whole batch, or its labelled images alone.

    Args:
        head, name: the head and its registry name.
        ctx: of the whole batch.
    """
    if ctx.labelled is None:
        return ctx
    reason = needs_labels(head)
    if not reason:
        asked = {*head.requires, *head.extra_taps.get("teacher", ())}
        lacking = asked - {"features", *ctx.teacher_outputs}
        own = {*head.requires, *head.requires_student, *head.extra_taps.get("student", ())}
        lacking |= own - {"features", *ctx.student_outputs}
        if not lacking:
            return ctx
        reason = f"reads {', '.join(sorted(lacking))}"
    text = f"{KEY}: {name} {reason}, it learns from the labelled images alone"
    log_first_n(logging.INFO, text, name=__name__, key="message")
    return ctx.labelled


def needs_labels(head: ImitationHead) -> str:
    """What ground truth a head reads, in words; "" for none."""
    if head.needs_boxes:
        return "needs boxes"
    return "needs label maps" if head.needs_label_maps else ""


def check_heads(cfg, heads: Mapping[str, ImitationHead]) -> None:
    """Refuse heads with which KD.UNLABELED has no effect, or that have nothing to learn from.

    Raises:
        ConfigError: names the heads.
    """
    if not cfg.KD.UNLABELED.DATASETS:
        return
    bound = {name: reason for name, head in heads.items() if (reason := needs_labels(head))}
    listed = ", ".join(f"{name} {reason}" for name, reason in bound.items())
    if bound and not cfg.DATASETS.TRAIN:
        raise ConfigError(f"KD.HEADS: {listed}, and DATASETS.TRAIN is empty: leave them out")
    if len(bound) == len(heads):
        raise ConfigError(f"{KEY}: no head of KD.HEADS learns from images without labels: {listed}")
