"""DistillMetaArch: a student that trains beside a frozen teacher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .balance import ShareController, build_balance
from .building import build_detector
from .context import DistillContext, ModelInfo
from .data.classes import compare_with_teacher
from .data.unlabelled import FLAG
from .detectors import padding_of, taps_for
from .errors import ConfigError, DataError
from .heads.base import build_imitation_heads
from .levels import (
    StudentPadding,
    common_divisibility,
    pair_levels,
    scaled_divisibility,
    scaled_size,
)
from .modeling.narrow_maps import guard_narrow_maps
from .schedule import Ramp, build_ramp
from .taps import FeatureTaps, TapSpec
from .teacher import Teacher, build_teacher
from .unlabelled import check_heads, context_of, join, observe_unlabelled, parts_of


@META_ARCH_REGISTRY.register()
class DistillMetaArch(nn.Module):
    """Student, teacher and imitation heads in one training module.

    In training, ``forward`` returns the student's own losses, the heads' ``loss_kd_*`` times
    their schedule, and ``loss_aux_*``; in evaluation it is the student. ``student`` and ``heads``
    are submodules; the teacher is not, so nothing of it is trained, synchronised or saved.

    Args:
        student: the deployed detector.
        teacher: see :class:`Teacher`; its taps are placed here.
        heads: imitation heads by name.
        ramps: schedule of each head's ``loss_kd_*``.
        level_map: student level to teacher level.
        image_format: "BGR" or "RGB", the order of the loader's images.
        log_period: iterations between two records of the heads' scalars.
        compile_teacher: compile the teacher's backbone.
        teacher_scale: side of the teacher's images relative to the student's; if it is not 1, every
            example must have ``image_teacher``.
        balance: sets the heads' weights during training; None = they stay.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher,
        heads: nn.ModuleDict,
        ramps: Mapping[str, Ramp],
        level_map: Mapping[str, str],
        image_format: str = "BGR",
        log_period: int = 20,
        compile_teacher: bool = False,
        teacher_scale: float = 1.0,
        balance: ShareController | None = None,
    ):
        super().__init__()
        self.student = student
        self.heads = heads
        self.teacher = teacher
        self.ramps = dict(ramps)
        self.level_map = dict(level_map)
        self.image_format = image_format
        self.log_period = log_period
        self.balance = balance
        needed = {"features"}.union(*(head.requires for head in heads.values()))
        ours = needed.union(*(head.requires_student for head in heads.values()))
        specs = {name: spec for name, spec in taps_for(student).items() if name in ours}
        self._taps = FeatureTaps(student, {**specs, **_extra_taps(heads, "student")})
        teacher.tap(needed, compile_teacher, _extra_taps(heads, "teacher"))
        self.teacher_scale = teacher_scale
        self._strides = {name: s.stride for name, s in student.backbone.output_shape().items()}
        theirs = teacher.model.backbone.output_shape()
        self._teacher_strides = {ours: theirs[x].stride for ours, x in self.level_map.items()}
        strides = {x: (self._strides[x], self._teacher_strides[x]) for x in self.level_map}
        needed = scaled_divisibility(teacher_scale, strides, teacher.size_divisibility)
        self._padding = _student_padding(student, needed, teacher_scale)
        self._canvas = _CanvasProbe()
        student.backbone.register_forward_pre_hook(self._canvas)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Build the student of MODEL.META_ARCHITECTURE, the teacher and KD.HEADS."""
        student = build_detector(cfg)
        teacher = build_teacher(cfg)
        backbones = student.backbone, teacher.model.backbone
        level_map = pair_levels(cfg.KD.LEVEL_MAP, *backbones, required=False)
        student_info, teacher_info = paired_infos(cfg, student, teacher, level_map)
        heads = build_imitation_heads(cfg, student_info, teacher_info)
        check_heads(cfg, heads)
        compared = {name: head.compares for name, head in heads.items()}
        compare_with_teacher(cfg, teacher.names, compared, teacher.shared)
        return {
            "student": student,
            "teacher": teacher,
            "heads": heads.to(cfg.MODEL.DEVICE),
            "balance": build_balance(cfg, heads),
            "ramps": {name: build_ramp(cfg, name) for name in heads},
            "level_map": level_map,
            "image_format": cfg.INPUT.FORMAT,
            "log_period": cfg.KD.LOG_PERIOD,
            "compile_teacher": cfg.KD.TEACHER.COMPILE,
            "teacher_scale": cfg.KD.TEACHER.INPUT_SCALE,
        }

    @property
    def device(self) -> torch.device:
        """The student's device."""
        return self.student.device

    def forward(self, batched_inputs: list[dict]):
        """Losses of one step in training, the student's predictions in evaluation.

        Args:
            batched_inputs: what detectron2's data loader gives: ``image`` (3, H, W) in
                ``image_format``, ``instances`` with boxes XYXY in pixels of that image, ...; with
                a ``teacher_scale`` also ``image_teacher``, that image at the teacher's size.
                Images with ``unlabeled`` True have no labels and train heads alone.

        Returns:
            Training: dict of scalar losses, ready to be summed.
        """
        if not self.training:
            return self.student(batched_inputs)
        ctx, losses = self.observe(batched_inputs)
        if self.balance is not None:
            self.balance.begin(ctx, losses)
        return self.combine(losses, self.imitate(ctx))

    def observe(self, batched_inputs: list[dict]) -> tuple[DistillContext, dict]:
        """Run teacher and student; returns what heads read, and the student's own losses.

        Examples marked ``unlabeled`` give no losses; see :mod:`.unlabelled`.
        """
        parts = parts_of(batched_inputs)
        # first: the teacher's activations are gone before the student's are kept, and on a GPU its
        # kernels hide behind the student's host work
        with torch.profiler.record_function("kd/teacher"):
            teachers = [self._run_teacher(part) for part in parts]
        losses: dict[str, torch.Tensor] = {}
        contexts = []
        for part, teacher in zip(parts, teachers, strict=True):
            with torch.profiler.record_function("kd/student"):
                student = self._run_student(part, losses)
            contexts.append(self._context(part, student, teacher))
        return contexts[0] if len(contexts) == 1 else join(*contexts), losses

    def _canvas_of(self, batch) -> tuple[int, int]:
        return self._padding.canvas([tuple(x["image"].shape[-2:]) for x in batch])

    def _run_teacher(self, batch) -> dict:
        images = self.teacher_images(batch)
        theirs = scaled_size(self._canvas_of(batch), self.teacher_scale)
        return self.teacher.observe(images, theirs, self.image_format)

    def _run_student(self, batch, losses: dict) -> dict:
        """What its taps give; losses of labelled images are added to ``losses``."""
        canvas = self._canvas_of(batch)
        with self._padding.applied():
            if batch[0].get(FLAG):
                student = observe_unlabelled(self.student, self._taps, batch, canvas)
            else:
                with self._taps.record():
                    losses.update(self.student(batch))
                student = {name: self._taps[name] for name in self._taps.specs}
        self._taps.clear()
        if self._canvas.size != canvas:
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE {type(self.student).__name__} padded the batch to "
                f"{self._canvas.size}, the teacher saw {canvas}; say how it pads with "
                "register_detector(padding=...)"
            )
        return student

    def teacher_images(self, batched_inputs: list[dict]) -> list[torch.Tensor]:
        """Per image what the teacher sees, (3, H, W): ``image`` at scale 1, else ``image_teacher``.

        Raises:
            DataError: the latter is missing or of another size than the scale says.
        """
        if self.teacher_scale == 1:
            return [x["image"] for x in batched_inputs]
        key = f"KD.TEACHER.INPUT_SCALE is {self.teacher_scale:g}"
        for x in batched_inputs:
            if "image_teacher" not in x:
                raise DataError(
                    f"{key}, and the data set mapper gives no 'image_teacher'; use this project's "
                    "MultiResolutionMapper, or set INPUT_SCALE to 1.0"
                )
            own, theirs = (tuple(x[name].shape[-2:]) for name in ("image", "image_teacher"))
            if theirs != scaled_size(own, self.teacher_scale):
                raise DataError(
                    f"{key}: the data set mapper gives an 'image' of {own} and an 'image_teacher' "
                    f"of {theirs} pixels, not {scaled_size(own, self.teacher_scale)}"
                )
        return [x["image_teacher"] for x in batched_inputs]

    def _context(self, batch, student, teacher) -> DistillContext:
        iteration = get_event_storage().iter
        sizes = [tuple(x["image"].shape[-2:]) for x in batch]
        gt = None
        if all("instances" in x for x in batch):
            gt = [x["instances"].to(self.device) for x in batch]
        theirs = teacher.pop("features")
        return DistillContext(
            iteration=iteration,
            image_sizes=sizes,
            canvas=self._canvas_of(batch),
            gt=gt,
            student_features=student.pop("features"),
            teacher_features={ours: theirs[level] for ours, level in self.level_map.items()},
            student_outputs=student,
            teacher_outputs=teacher,
            strides=self._strides,
            teacher_scale=self.teacher_scale,
            teacher_image_sizes=[scaled_size(size, self.teacher_scale) for size in sizes],
            teacher_strides=self._teacher_strides,
            batch=batch,
            student=self.student,
            teacher=self.teacher,
            log_scalars=iteration % self.log_period == 0,
        )

    def imitate(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """All heads' losses, schedules and multipliers applied, computed without autocast."""
        losses: dict[str, torch.Tensor] = {}
        for name, head in self.heads.items():
            seen = context_of(head, name, ctx)
            if head.needs_boxes and seen.gt is None:
                raise DataError(f"KD.HEADS: {name} needs boxes, and this batch has no annotations")
            with (
                torch.profiler.record_function(f"kd/{name}"),
                torch.autocast(self.device.type, enabled=False),
            ):
                own = head(seen)
            factor = self.ramps[name](ctx.iteration)
            if self.balance is not None:
                factor *= self.balance.factor(name, head, own, seen)
            for key, loss in own.items():
                if key in losses:
                    raise ConfigError(f"KD.HEADS: two heads return a loss named {key}")
                losses[key] = _scheduled(loss, factor) if key.startswith("loss_kd_") else loss
        if self.balance is not None:
            self.balance.end(ctx)
        return losses

    def combine(self, task: dict, distillation: dict) -> dict[str, torch.Tensor]:
        """Task and distillation losses in one dict; wrappers of your own may override it."""
        shared = task.keys() & distillation.keys()
        if shared:
            raise ConfigError(f"KD.HEADS: loss names also used by the student: {sorted(shared)}")
        return {**task, **distillation}


def _extra_taps(heads: nn.ModuleDict, side: str) -> dict[str, TapSpec]:
    """Those of all heads for a side; ConfigError where two want one name for different places."""
    found: dict[str, TapSpec] = {}
    for name, head in heads.items():
        for tap, spec in head.extra_taps.get(side, {}).items():
            if found.setdefault(tap, spec) != spec:
                raise ConfigError(f"KD.HEADS: {name} and another head tap different {tap}")
    return found


def _student_padding(student: nn.Module, needed: int, scale: float) -> StudentPadding:
    rule = padding_of(student)
    if rule is not None and scale != 1:
        raise ConfigError(
            f"KD.TEACHER.INPUT_SCALE is {scale:g}: {type(student).__name__} pads by a rule of its "
            "own, which fits no other scale than 1"
        )
    return StudentPadding(student, common_divisibility(student.backbone, needed, scale), rule)


class _CanvasProbe:
    """Forward pre-hook that notes (height, width) of what a backbone got.

    An object of its own: as a method of the wrapper it would tie every copy of the student (EMA)
    to a copy of the wrapper.
    """

    size: tuple[int, int] | None = None

    def __call__(self, module: nn.Module, inputs) -> None:
        self.size = tuple(inputs[0].shape[-2:])


def _scheduled(loss: torch.Tensor, factor: float) -> torch.Tensor:
    if factor == 0.0:  # 0 * inf is NaN; while a loss counts, it is never mended
        loss = torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)
    return loss * factor


def paired_infos(cfg, student: nn.Module, teacher: Teacher, level_map: Mapping[str, str]):
    """Both sides as heads see them: shapes of the paired levels under the student's names."""
    ours, theirs = student.backbone.output_shape(), teacher.model.backbone.output_shape()
    student_info = ModelInfo(
        model=student,
        shapes={level: ours[level] for level in level_map},
        taps=frozenset(taps_for(student)),
        cfg=cfg,
    )
    teacher_info = ModelInfo(
        model=teacher.model,
        shapes={level: theirs[other] for level, other in level_map.items()},
        taps=frozenset(taps_for(teacher.model)),
        cfg=teacher.cfg,
        own_names=dict(level_map),
        shared=teacher.shared,
    )
    return student_info, teacher_info


def build_training_model(cfg) -> nn.Module:
    """What is trained: the plain student, or the wrapper that KD.META_ARCHITECTURE names."""
    if cfg.KD.META_ARCHITECTURE:
        model = META_ARCH_REGISTRY.get(cfg.KD.META_ARCHITECTURE)(cfg).to(cfg.MODEL.DEVICE)
    else:
        model = build_detector(cfg)
    return guard_narrow_maps(model)


def student_of(model: nn.Module) -> nn.Module:
    """The deployed detector inside a (DDP-wrapped) training model, or the model itself."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return model.student if isinstance(model, DistillMetaArch) else model
