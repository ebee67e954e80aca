"""Imitation heads: the registry, the base class, and how a config's heads are built."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.logger import log_first_n
from detectron2.utils.registry import Registry
from torch import nn

from ..adapters import align_spatial, build_adapter
from ..context import DistillContext, ModelInfo
from ..detectors import architectures_with
from ..errors import ConfigError
from ..levels import default_levels, describe
from ..taps import TapSpec

IMITATION_HEAD_REGISTRY = Registry("IMITATION_HEAD")
IMITATION_HEAD_REGISTRY.__doc__ = """
Imitation heads by the acronym of their paper. ``KD.HEADS`` names them; the config node of head
``Name`` is ``KD.NAME``. A registered class subclasses :class:`ImitationHead`.
"""


class ImitationHead(nn.Module):
    """A loss that pulls the student towards the teacher, with the parameters that it needs.

    Class attributes:
        requires: taps that both sides must offer ("features", "dense", ...).
        requires_student: further taps of the student alone.
        extra_taps: "student" and "teacher" to taps whose place depends on the head's config. Their
            names must differ from those of the detectors' registered taps.
        supports: the student meta-archs that it works with; () = all that offer ``requires``.
        targets: values of KD.<HEAD>.TARGET, if the head has this key.
        needs_boxes: the head reads ground-truth boxes.
        needs_label_maps: the head reads label maps.
        compares: metadata ("thing_classes", "stuff_classes", "keypoint_names") whose predictions
            are compared one by one, so teacher and data set must have the same names.

    Args:
        levels: student levels to distil, finest first.
        weight: factor of the head's ``loss_kd_*``.
        mask_padding: leave cells in a batch's padding out of the loss.

    Attributes:
        lr_factors: name of a submodule to a factor of SOLVER.BASE_LR for its parameters, on top of
            KD.ADAPTER.LR_FACTOR.
    """

    requires: frozenset[str] = frozenset({"features"})
    requires_student: frozenset[str] = frozenset()
    extra_taps: Mapping[str, Mapping[str, TapSpec]] = {}
    supports: tuple[str, ...] = ()
    needs_boxes: bool = False
    needs_label_maps: bool = False
    compares: tuple[str, ...] = ()

    def __init__(self, *, levels: Sequence[str], weight: float, mask_padding: bool):
        super().__init__()
        self.levels = tuple(levels)
        self.weight = float(weight)
        self.mask_padding = bool(mask_padding)
        self.lr_factors: dict[str, float] = {}

    @classmethod
    def from_config(cls, cfg, student: ModelInfo, teacher: ModelInfo) -> dict:
        """Keyword arguments of the constructor.

        Args:
            cfg: the student's config.
            student, teacher: the two sides; ``shapes`` hold the paired levels under the student's
                names.
        """
        node = cfg.KD[head_name(cls).upper()]
        return {
            "levels": choose_levels(node.LEVELS or cfg.KD.LEVELS, student, teacher, cls),
            "weight": node.WEIGHT,
            "mask_padding": node.MASK_PADDING,
        }

    @classmethod
    def preferred(cls, levels: Sequence[str], shapes: Mapping[str, ShapeSpec]) -> list[str]:
        """Those of the shared levels, finest first, that it takes unless LEVELS says otherwise."""
        return list(levels)

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """Scalar fp32 losses of one step, already weighted.

        Keys start with ``loss_kd_`` (the wrapper multiplies them by the head's schedule) or
        ``loss_aux_`` (never scheduled; they train the head's own parameters only).
        """
        raise TypeError(f"{type(self).__name__} does not define forward")

    def acts_on(self, ctx: DistillContext) -> list[torch.Tensor]:
        """Student maps at which this head's gradient is compared with the task losses'.

        The features of all paired levels, unless a head reads maps that lie deeper in the student.
        """
        paired = ctx.teacher_strides or ctx.teacher_features
        return [ctx.student_features[level] for level in paired]

    def reads_of_teacher(self) -> tuple[str, ...] | None:
        """Levels that it reads of ``ctx.teacher_features``, under the student's names.

        None, as here, means all of them. What no head reads need not be computed, and may be
        missing in the context. Other taps are not meant.
        """
        return None

    def second_pass(self, ctx: DistillContext):
        """A further pass of a detection head that no form of the method can do without.

        Timing (``kd-benchmark step``) counts it, forward and backward to its inputs, to what
        distillation costs in any case.

        Args:
            ctx: of a step, whose maps are cut off from the networks.

        Returns:
            A function that gives the pass's outputs, and the inputs that its gradient goes to, both
            tensors in any nesting; None, as here, where there is no such pass.
        """
        return None

    def aux_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters for an optimizer of the head's own, set in ``KD.<HEAD>.OPTIMIZER``."""
        return ()

    def pair(self, ctx: DistillContext, level: str, adapter: nn.Module | None = None):
        """Student and teacher features of a level in fp32 on the student's grid.

        No gradient flows to the teacher's.

        Returns:
            (N, C, H, W) student features through ``adapter``, (N, C_teacher, H, W) teacher
            features, and the (N, 1, H, W) validity mask: None without ``mask_padding``, and where
            the level has no padding.
        """
        features = ctx.student_features[level], ctx.teacher_features[level]
        student, teacher, mask = self.align(ctx, level, *features)
        return adapt(student, mask, adapter), teacher, mask

    def align(
        self, ctx: DistillContext, level: str | None, student: torch.Tensor, teacher: torch.Tensor
    ):
        """:meth:`pair` for any two maps (N, C, H, W) of a level, e.g. logits.

        Args:
            ctx: of the step.
            level: whose strides the maps have; None = maps that cover the canvas.
            student, teacher: the maps; the teacher's is resized to the student's grid, with
                ``mask_padding`` from cells inside its images alone.
        """
        mask = theirs = None
        resized = student.shape[-2:] != teacher.shape[-2:]
        if self.mask_padding and level is None:
            mask = ctx.canvas_mask(student.shape[-2:])
            theirs = ctx.canvas_mask(teacher.shape[-2:]) if resized else None
        elif self.mask_padding:
            mask = ctx.valid_mask(level) if ctx.has_padding(level) else None
            if resized and ctx.teacher_has_padding(level):
                theirs = ctx.teacher_valid_mask(level)
        student = student.float()
        return student, align_spatial(teacher.detach().float(), student, theirs), mask

    def extra_repr(self) -> str:
        """Levels and weight in ``print(model)``."""
        return f"levels={self.levels}, weight={self.weight}, mask_padding={self.mask_padding}"


def adapt(student: torch.Tensor, mask: torch.Tensor | None, adapter: nn.Module | None):
    """Student features (N, C, H, W) through an adapter, if there is one."""
    if adapter is None or isinstance(adapter, nn.Identity):
        return student
    if mask is not None:
        # zeroed before a convolution looks across the border of the valid area
        student = torch.where(mask, student, 0.0)
    return adapter(student)


def head_name(cls: type) -> str:
    """The registry name of a head class."""
    for name, registered in IMITATION_HEAD_REGISTRY:
        if registered is cls:
            return name
    for base in cls.__mro__[1:]:
        for name, registered in IMITATION_HEAD_REGISTRY:
            if registered is base:
                return name
    raise ConfigError(f"{cls.__name__} is not in IMITATION_HEAD_REGISTRY")


def choose_levels(
    wanted: Sequence[str], student: ModelInfo, teacher: ModelInfo, cls: type
) -> list[str]:
    """The levels a head works on, finest first.

    Args:
        wanted: the config's choice; empty = all paired levels that both detectors' heads read.
        student, teacher: as in :meth:`ImitationHead.from_config`.
        cls: the head, for messages.

    Raises:
        ConfigError: a level that is not paired, or no pair at all.
    """
    paired = [level for level in student.shapes if level in teacher.shapes]
    key = f"KD.{head_name(cls).upper()}.LEVELS"
    _check_paired(f"{key} (or KD.LEVELS)", wanted, student, paired)
    chosen = list(wanted)
    if not chosen:
        pairs = {level: teacher.own_names.get(level, level) for level in paired}
        chosen = default_levels(pairs, student.model, teacher.model)
        _tell_unread([level for level in paired if level not in chosen])
        chosen = cls.preferred(chosen, student.shapes)
    if not chosen:
        sides = (("student", student), ("teacher", teacher))
        has = "; ".join(f"{n}: {describe(x.model.backbone.output_shape())}" for n, x in sides)
        raise ConfigError(f"{key}: student and teacher share no level; set KD.LEVEL_MAP; {has}")
    return sorted(chosen, key=lambda level: student.shapes[level].stride)


def _check_paired(key: str, wanted: Sequence[str], student: ModelInfo, paired) -> None:
    unknown = [level for level in wanted if level not in paired]
    if unknown:
        by = " by KD.LEVEL_MAP" if student.cfg is not None and student.cfg.KD.LEVEL_MAP else ""
        raise ConfigError(
            f"{key}: {', '.join(unknown)} not among the levels that student and teacher share{by}: "
            f"{', '.join(paired) or 'none'}"
        )


def _tell_unread(levels: Sequence[str]) -> None:
    if levels:
        text = f"not distilled: {', '.join(levels)}, which no detection head reads (KD.LEVELS)"
        log_first_n(logging.INFO, text, name=__name__, key="message")


def common_width(side: str, info: ModelInfo, levels: Sequence[str], why: str) -> int:
    """Channels that all levels of a side have.

    Args:
        side: "student" or "teacher", for the message.
        info: of that side.
        levels: those in question.
        why: the config key, and what needs equal widths.

    Raises:
        ConfigError: they differ.
    """
    widths = {level: info.shapes[level].channels for level in levels}
    if len(set(widths.values())) != 1:
        raise ConfigError(
            f"{why}, but the {side}'s differ in width: "
            + ", ".join(f"{level} {width}" for level, width in widths.items())
        )
    return next(iter(widths.values()))


def build_adapters(
    kind: str,
    levels: Sequence[str],
    student: ModelInfo,
    teacher: ModelInfo,
    key: str = "KD.ADAPTER.TYPE",
) -> nn.ModuleDict:
    """One adapter a level, see :func:`~projects.kd.adapters.build_adapter`."""
    return nn.ModuleDict(
        {
            level: build_adapter(
                kind, student.shapes[level].channels, teacher.shapes[level].channels, key
            )
            for level in levels
        }
    )


def head_class(name: str) -> type[ImitationHead]:
    """The class registered as ``name``; ConfigError lists what there is."""
    if name not in IMITATION_HEAD_REGISTRY:
        known = ", ".join(sorted(key for key, _ in IMITATION_HEAD_REGISTRY))
        raise ConfigError(f"KD.HEADS: no imitation head '{name}'; registered: {known}")
    return IMITATION_HEAD_REGISTRY.get(name)


def build_imitation_heads(cfg, student: ModelInfo, teacher: ModelInfo) -> nn.ModuleDict:
    """Build KD.HEADS in order and check that both sides offer what each needs.

    Raises:
        ConfigError: unknown head, or a detector that cannot feed it, with those that can.
    """
    heads = nn.ModuleDict()
    _check_paired("KD.LEVELS", cfg.KD.LEVELS, student, list(student.shapes))
    for name in cfg.KD.HEADS:
        cls = head_class(name)
        if cls.supports and not _is_a(type(student.model), cls.supports):
            raise ConfigError(
                f"KD.HEADS: {name} does not work with a {student.arch} student; "
                f"it works with {', '.join(cls.supports)}"
            )
        for side, info in (("student", student), ("teacher", teacher)):
            lacking = cls.requires - info.taps
            if lacking:
                raise ConfigError(
                    f"KD.HEADS: {name} needs {', '.join(sorted(lacking))} and the {side} "
                    f"{info.arch} offers {', '.join(sorted(info.taps))}; detectors that do: "
                    f"{', '.join(architectures_with(cls.requires))}"
                )
        heads[name] = cls(**cls.from_config(cfg, student, teacher))
    return heads


def _is_a(cls: type, names: Sequence[str]) -> bool:
    return any(base.__name__ in names for base in cls.__mro__)
