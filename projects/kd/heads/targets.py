"""What a head compares: features of levels, or maps that detectors' heads compute."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..adapters import build_adapter
from ..context import DistillContext, ModelInfo
from ..detectors import architectures_with, taps_for
from ..errors import ConfigError, require_one_of
from ..shared_classes import ALL, SharedClasses
from .base import ImitationHead, adapt, build_adapters, choose_levels, head_name

# "features": backbone outputs by level. "dense": classification logits of a one-stage head by
# level, (N, A * K, H, W). "sem_seg": class logits of a segmentation head before upsampling,
# (N, K, H, W). "decoder": the input of the layer that makes those, (N, C, H, W). Heads that take
# all of these take the taps of a user's own detectors as well, see :func:`_is_own_map`.
TARGETS = ("features", "dense", "decoder", "sem_seg")
_BY_LEVEL = ("features", "dense")
# whose channels are predictions of what
_CLASSES = {"dense": ("thing_classes",), "sem_seg": ("stuff_classes",)}


class MapImitation(ImitationHead):
    """A head that compares pairs of maps, chosen by ``KD.<HEAD>.TARGET``.

    Class attributes:
        targets: what the head can compare.
        by_channel: the head compares channel with channel: features get adapters, and logits need
            the same classes on both sides.

    Args:
        target: one of ``targets``, or a map that both detectors registered.
        adapters: level (or "decoder", or the registered map) to a module that maps student channels
            to teacher channels.
        dense_index: for "dense", level to the place of its logits in the student's and the
            teacher's list.
        shared: classes that the teacher predicts, for maps of logits; the student's others are left
            out.
        **base: see :class:`ImitationHead`; ``levels`` is empty unless the target has levels.
    """

    requires: frozenset[str] = frozenset()  # of the class; an object's are those of its target
    targets: tuple[str, ...] = TARGETS
    by_channel: bool = False

    def __init__(
        self,
        *,
        target: str = "features",
        adapters: nn.ModuleDict | None = None,
        dense_index: dict[str, tuple[int, int]] | None = None,
        shared: SharedClasses = ALL,
        **base,
    ):
        super().__init__(**base)
        self.shared = shared
        self.target = target
        self.adapters = nn.ModuleDict() if adapters is None else adapters
        self.dense_index = dense_index
        self.requires = frozenset({target})
        if self.by_channel:
            self.compares = _CLASSES.get(target, ())

    @classmethod
    def from_config(cls, cfg, student: ModelInfo, teacher: ModelInfo) -> dict:
        """Read TARGET, LEVELS and what is common to all heads.

        Raises:
            ConfigError: a target that the head or a detector does not have, LEVELS of a target
                without levels, or maps that cannot be compared.
        """
        name = head_name(cls).upper()
        node = cfg.KD[name]
        key, target = f"KD.{name}.TARGET", node.TARGET
        if not _is_own_map(cls, target, student, teacher):
            require_one_of(key, target, cls.targets)
        for side, info in (("student", student), ("teacher", teacher)):
            if target not in info.taps:
                raise ConfigError(
                    f"{key}: '{target}' is not what the {side} {info.arch} offers "
                    f"({', '.join(sorted(info.taps))}); detectors that do: "
                    f"{', '.join(architectures_with({target}))}"
                )
        if target in _BY_LEVEL:
            levels = choose_levels(node.LEVELS or cfg.KD.LEVELS, student, teacher, cls)
        elif node.LEVELS:
            raise ConfigError(f"KD.{name}.LEVELS: TARGET '{target}' has no levels; set it to ()")
        else:
            levels = []
        kwargs = {
            "levels": levels,
            "weight": node.WEIGHT,
            "mask_padding": node.MASK_PADDING,
            "target": target,
            "adapters": nn.ModuleDict(),
        }
        if target == "dense":
            kwargs["dense_index"] = _dense_index(levels, student, teacher, name)
        kwargs["shared"] = teacher.classes(*_CLASSES.get(target, ()))
        if cls.by_channel:
            kwargs["adapters"] = _adapters(cfg, key, target, levels, student, teacher)
        return kwargs

    def reads_of_teacher(self) -> tuple[str, ...] | None:
        """See the base class."""
        return self.levels if self.target == "features" else None

    def maps(self, ctx: DistillContext) -> Iterator[tuple]:
        """Per level (once for a target without levels) what :meth:`ImitationHead.pair` gives."""
        if self.target in _BY_LEVEL:
            for level in self.levels:
                read = self._features if self.target == "features" else self._logits
                yield self._pair(ctx, level, level, *read(ctx, level))
            return
        student = ctx.student_outputs[self.target]
        if self.target in _CLASSES:
            student = self.shared.logits(student, 1)
        teacher = ctx.teacher_outputs[self.target]
        for side, value in (("student", student), ("teacher", teacher)):
            if not isinstance(value, torch.Tensor) or value.dim() != 4:
                shape = tuple(getattr(value, "shape", ())) or type(value).__name__
                raise ConfigError(
                    f"KD.{head_name(type(self)).upper()}.TARGET: '{self.target}' of the {side} is "
                    f"no map (N, C, H, W) but {shape}"
                )
        yield self._pair(ctx, None, self.target, student, teacher)

    def _pair(self, ctx, level, name, student, teacher):
        student, teacher, mask = self.align(ctx, level, student, teacher)
        adapter = self.adapters[name] if name in self.adapters else None
        return adapt(student, mask, adapter), teacher, mask

    @staticmethod
    def _features(ctx: DistillContext, level: str):
        return ctx.student_features[level], ctx.teacher_features[level]

    def _logits(self, ctx: DistillContext, level: str):
        ours, theirs = self.dense_index[level]
        student = self.shared.of_anchors(ctx.student_outputs["dense"].logits[ours])
        teacher = ctx.teacher_outputs["dense"].logits[theirs]
        if self.by_channel:
            key = f"KD.{head_name(type(self)).upper()}.TARGET"
            _check_dense(key, student.shape[1], teacher.shape[1], f" at {level}")
        return student, teacher

    def extra_repr(self) -> str:
        """Target, levels and weight in ``print(model)``."""
        return f"target={self.target}, {super().extra_repr()}"


def _is_own_map(cls: type, target: str, student: ModelInfo, teacher: ModelInfo) -> bool:
    """Whether a target is a map that the detectors of both sides registered with ``channels``.

    Its value is one map (N, C, H, W) that covers the padded batch. Only heads that compare any two
    maps take it, since what it shows is not known here.
    """
    if target in TARGETS or not set(TARGETS) <= set(cls.targets):
        return False
    return all(
        target in info.taps and taps_for(info.model)[target].channels is not None
        for info in (student, teacher)
    )


def channels_of(info: ModelInfo, target: str) -> int | None:
    """Channels of a target that is no backbone level, as the detector's tap says."""
    spec = taps_for(info.model).get(target)
    return spec.channels(info.model) if spec is not None and spec.channels else None


def _check_dense(key: str, ours: int, theirs: int, where: str = "") -> None:
    if ours != theirs:
        raise ConfigError(
            f"{key}: 'dense' compares anchors x classes one by one, but{where} the student has "
            f"{ours} of them and the teacher {theirs}; use 'features', or KD.TEACHER.CLASS_MAP"
        )


def _adapters(cfg, key, target, levels, student, teacher) -> nn.ModuleDict:
    if target == "features":
        return build_adapters(cfg.KD.ADAPTER.TYPE, levels, student, teacher)
    ours, theirs = (channels_of(info, target) for info in (student, teacher))
    shared = teacher.classes(*_CLASSES.get(target, ()))
    if target in _CLASSES and ours is not None and shared.known is not None:
        ours = ours // shared.total * len(shared.known)
    if target == "dense":
        if None not in (ours, theirs):  # else it is seen in the first step
            _check_dense(key, ours, theirs)
        return nn.ModuleDict()
    if target != "sem_seg":  # "decoder", or a detector's own map
        return nn.ModuleDict({target: build_adapter(cfg.KD.ADAPTER.TYPE, ours, theirs)})
    if ours != theirs:
        raise ConfigError(
            f"{key}: '{target}' compares classes one by one, but the student has {ours} and the "
            f"teacher {theirs}; use 'features' or 'decoder', or KD.TEACHER.CLASS_MAP"
        )
    return nn.ModuleDict()


def _dense_index(levels, student, teacher, name) -> dict[str, tuple[int, int]]:
    """Level to the places of its logits in what the two heads give."""
    ours, theirs = (list(info.model.head_in_features) for info in (student, teacher))
    own = {level: teacher.own_names.get(level, level) for level in levels}
    missing = [level for level in levels if level not in ours or own[level] not in theirs]
    if missing:
        raise ConfigError(
            f"KD.{name}.LEVELS (or KD.LEVELS): both one-stage heads must read "
            f"{', '.join(missing)} for KD.{name}.TARGET 'dense'"
        )
    return {level: (ours.index(level), theirs.index(own[level])) for level in levels}
