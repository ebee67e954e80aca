"""The interface between detectors and heads that work on predictions (OutputKD, CSA).

A detector registers a :class:`Predictor` beside its taps
(:func:`~projects.kd.detectors.register_detector`).

Shapes: N images, A predictions a cell (anchors, or 1), K classes, (H, W) cells of a level, R
regions of all images together. Boxes are XYXY in pixels of the student's input.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.structures import Instances
from torch import nn

from ..context import DistillContext
from ..detectors import known_predictors, predictors_of
from ..errors import ConfigError
from ..functional.precision import HALF
from ..shared_classes import ALL, SharedClasses
from .outputs import DenseOutputs


@dataclass(frozen=True)
class DensePair:
    """Predictions of both sides on the cells of one level; classes are independent sigmoids.

    Attributes:
        student_logits, target_logits: (N, A, K, H, W); targets carry no gradient anywhere here.
        counted: (N, A, H, W) bool, those that take part; None = all.
        positive: (N, A, H, W) bool, assigned to an object by the detector; None without boxes.
        student_boxes, target_boxes: (N, A, H, W, 4), or None where only classes are compared.
        student_bins, target_bins: (N, 4, n + 1, H, W) logits of the distributions of a box's left,
            top, right and bottom, of detectors that have those, else None. The two may have
            different n.
    """

    student_logits: torch.Tensor
    target_logits: torch.Tensor
    counted: torch.Tensor | None = None
    positive: torch.Tensor | None = None
    student_boxes: torch.Tensor | None = None
    target_boxes: torch.Tensor | None = None
    student_bins: torch.Tensor | None = None
    target_bins: torch.Tensor | None = None


@dataclass(frozen=True)
class RegionPair:
    """Predictions of both sides for the same regions; classes are a softmax with background last.

    Attributes:
        student_logits, target_logits: (R, K + 1).
        student_deltas, target_deltas: (R, 4), of the target's most probable object class, in the
            units in which the detector regresses boxes.
        classes: (R,) int64, the class that ground truth assigns, K = background.
    """

    student_logits: torch.Tensor
    target_logits: torch.Tensor
    student_deltas: torch.Tensor
    target_deltas: torch.Tensor
    classes: torch.Tensor

    @property
    def foreground(self) -> torch.Tensor:
        """(R,) bool, regions assigned to an object."""
        return (self.classes >= 0) & (self.classes < self.student_logits.shape[1] - 1)


@dataclass(frozen=True)
class Pairs:
    """All that a detector predicts, both sides side by side.

    Attributes:
        dense: classes and boxes of a one-stage detector, one entry a level.
        proposals: objectness of a region proposal network, one entry a level.
        regions: classes and boxes of a box head, one entry a stage.
    """

    dense: list[DensePair] = field(default_factory=list)
    proposals: list[DensePair] = field(default_factory=list)
    regions: list[RegionPair] = field(default_factory=list)


@dataclass(frozen=True)
class AnchorMatch:
    """Where a teacher predicts for the anchors of a student's level.

    Attributes:
        index: place of its level in its head's list of outputs.
        step: every so many of its rows and columns stand for one of the student's.
        start: the first of them.
    """

    index: int
    step: int = 1
    start: int = 0

    def select(self, values: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) on the student's grid of the teacher's (N, C, Ht, Wt)."""
        return values[..., self.start :: self.step, self.start :: self.step]


class Predictor:
    """How a detector predicts from a feature pyramid, and how two predictions are compared.

    One is made for each model (:func:`predictor_for`); it keeps nothing of a step.

    Class attributes:
        name: the detectors it is for, in messages.
        two_stage: which published loss weights apply.
        taps: taps of the student that :meth:`student` reads.
        scores: tap from which :meth:`confidence` is read, of a teacher as well.
        modules: paths of the submodules that :meth:`predict` runs, for assistants that predict by
            modules of their own (:func:`with_modules`).

    Args:
        model: the detector.
    """

    name: str = ""
    two_stage: bool = False
    taps: frozenset[str] = frozenset()
    scores: str = ""
    modules: tuple[str, ...] = ()

    def __init__(self, model: nn.Module):
        self.model = model

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether it can work with this very model; meta-archs have exchangeable parts."""
        return True

    @property
    def levels(self) -> tuple[str, ...]:
        """The model's own names of the levels that it predicts from."""
        raise NotImplementedError

    @property
    def score_levels(self) -> tuple[str, ...]:
        """Those of :meth:`confidence`."""
        return self.levels

    @property
    def num_classes(self) -> int:
        """K."""
        raise NotImplementedError

    def other_family(self, teacher: Predictor, key: str) -> ConfigError:
        """The error of :meth:`match` for a teacher that predicts different things."""
        return ConfigError(
            f"{key}: a {self.name} student and a {teacher.name} teacher predict different "
            "things; use a teacher of the same family"
        )

    def check_student(self) -> None:
        """Raise ConfigError for settings with which predictions cannot be compared."""

    def match(self, teacher: Predictor, scale: float, key: str) -> dict[str, AnchorMatch]:
        """Where a teacher predicts for the same anchors; level of the student to the place.

        Args:
            teacher: of a detector that was trained separately.
            scale: side of the teacher's input over that of the student's.
            key: the config node of the head, for messages.

        Raises:
            ConfigError: the two predict different things.
        """
        raise NotImplementedError

    def check_exchange(self, teacher: Predictor, key: str) -> None:
        """Raise ConfigError unless the teacher's ``modules`` can stand in for this model's.

        Called after :meth:`match`; ``key`` is for the message.
        """

    def assign(self, ctx: DistillContext) -> Any:
        """What ground truth says about the step's anchors and regions; ``ctx.gt`` is given."""
        raise NotImplementedError

    def known(self, assigned: Any, shared: SharedClasses) -> Any:
        """What :meth:`assign` gave, without what ground truth assigns to classes of the others.

        Here as it is: :meth:`pairs` leaves out regions of such classes.
        """
        del shared
        return assigned

    def student(self, ctx: DistillContext) -> Any:
        """The student's own predictions of the step, from its taps, with their gradients."""
        raise NotImplementedError

    def predict(
        self,
        features: Mapping[str, torch.Tensor],
        assigned: Any,
        *,
        scale: float = 1.0,
        constant: bool = True,
    ) -> Any:
        """Raw predictions in fp32 from other features.

        Args:
            features: level under the model's own name to (N, C, H, W).
            assigned: what :meth:`assign` gave; regions are those of the student.
            scale: as in :meth:`match`, where the model is the teacher.
            constant: no gradient to the parameters, and buffers stay as they are (running
                statistics); gradients flow to ``features`` only.
        """
        raise NotImplementedError

    def confidence(self, outputs: DenseOutputs) -> dict[str, torch.Tensor]:
        """How sure the detector is of an object at each cell.

        Args:
            outputs: what the tap ``scores`` gave.

        Returns:
            Level of ``score_levels`` to (N, 1, H, W) in fp32: the largest sigmoid of the logits of
            a cell, of all anchors and classes, or the objectness of a proposal network. Centre-ness
            has no part in it.
        """
        maps = zip(self.score_levels, outputs.logits, strict=True)
        return {level: x.float().amax(1, keepdim=True).sigmoid() for level, x in maps}

    def losses(self, predictions: Any, assigned: Any) -> dict[str, torch.Tensor]:
        """The detector's own ground-truth losses; its running normalisers are read, not updated."""
        raise NotImplementedError

    def pairs(
        self,
        student: Any,
        target: Any,
        assigned: Any,
        *,
        levels: Sequence[str],
        masks: Mapping[str, torch.Tensor | None],
        match: Mapping[str, AnchorMatch] | None = None,
        jitter: float = 0.0,
        shared: SharedClasses = ALL,
    ) -> Pairs:
        """Predictions to be compared.

        Args:
            student: with gradients.
            target: predictions on the student's own grids, or a teacher's with ``match``.
            assigned: what :meth:`assign` gave.
            levels: of the student, for what is predicted level by level.
            masks: level to (N, 1, H, W) bool of valid cells, None = all.
            match: what :meth:`match` gave.
            jitter: target boxes move by so many pixels along the diagonal, see
                :func:`~projects.kd.functional.output_kd.jitter_boxes`.
            shared: classes of which the target's logits are; what is compared are these, and no
                region that ground truth assigns to another.
        """
        raise NotImplementedError

    def infer(
        self, features: Mapping[str, torch.Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Detections of a model in eval mode, in pixels of its input before padding."""
        raise NotImplementedError


_KEPT = "_kd_predictor"  # attribute of a model that holds its predictor


def predictor_for(model: nn.Module, user: str = "", side: str = "student") -> Predictor:
    """The predictor of a detector, made when it is first asked for.

    Args:
        model: the detector.
        user: head that asks, for the message.
        side: "student" or "teacher", for the message.

    Raises:
        ConfigError: there is none; names those that there are.
    """
    made = vars(model).get(_KEPT)
    if made is not None and made.model is model:  # a view (with_modules) has its own
        return made
    for cls in predictors_of(type(model)):
        if cls.fits(model):
            vars(model)[_KEPT] = made = cls(model)
            return made
    parts = type(model).__name__
    if hasattr(model, "roi_heads"):
        parts += f" with {type(model.roi_heads).__name__}"
    known = sorted({cls.name for cls in known_predictors()})
    raise ConfigError(
        f"KD.HEADS: {user} does not work with the {side} {parts} "
        f"(register_detector); it works with {', '.join(known)}"
    )


def with_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The same detector with other submodules; it shares all else, and the model is not changed.

    Args:
        model: the detector.
        modules: path to what takes the place of the submodule there.
    """
    view = _shallow(model)
    for path, module in modules.items():
        *parents, name = path.split(".")
        owner, original = view, model
        for parent in parents:
            original = original._modules[parent]
            if owner._modules[parent] is original:  # not yet a copy of this call's
                owner._modules[parent] = _shallow(original)
            owner = owner._modules[parent]
        owner._modules[name] = module
    return view


def _shallow(module: nn.Module) -> nn.Module:
    result = copy.copy(module)
    result._modules = dict(module._modules)
    return result


def call_constant(module: nn.Module, *inputs, constant: bool = True):
    """Run a module as a fixed function: gradients pass through it and none reaches it.

    Parameters enter detached, buffers as copies, so batch norms do not update their statistics.
    """
    if not constant:
        return module(*inputs)
    state = {name: value.detach() for name, value in module.named_parameters()}
    state.update({name: value.clone() for name, value in module.named_buffers()})
    return torch.func.functional_call(module, state, inputs)


def step_precision(like: torch.Tensor):
    """Autocast to the type of a tensor if that is a half type, else none.

    Heads run without autocast; a detector's own layers are run as the student ran them.
    """
    if like.dtype in HALF:
        return torch.autocast(like.device.type, dtype=like.dtype)
    return contextlib.nullcontext()
