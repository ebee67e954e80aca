"""DistillMetaArch: a student that trains beside a frozen teacher."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .balance import ShareController, build_balance
from .building import build_detector
from .config.teachers import (
    config_of,
    config_of_head,
    teacher_names,
    told_of,
    weight_of,
)
from .context import DistillContext
from .data.unlabelled import FLAG
from .detectors import padding_of, taps_for
from .errors import ConfigError, DataError
from .levels import StudentPadding, common_divisibility
from .modeling.half_on_cpu import use_full_precision
from .modeling.roi_align import use_sparse_gradients
from .precision import in_channels_last
from .schedule import Ramp, build_ramp
from .taps import FeatureTaps
from .teacher import Teacher
from .teacher_building import link_to_teacher
from .teacher_link import TeacherLink, extra_taps, on_device, with_digests
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
        heads: nn.ModuleDict,
        ramps: Mapping[str, Ramp],
        teacher: Teacher | None = None,
        level_map: Mapping[str, str] = MappingProxyType({}),
        image_format: str = "BGR",
        log_period: int = 20,
        compile_teacher: bool = False,
        teacher_scale: float = 1.0,
        balance: ShareController | None = None,
        links: Sequence[TeacherLink] = (),
    ):
        super().__init__()
        self.student = student
        self.heads = heads
        self.ramps = dict(ramps)
        self.image_format = image_format
        self.log_period = log_period
        self.balance = balance
        if not links:
            own = {"scale": teacher_scale, "compiled": compile_teacher}
            links = [TeacherLink(teacher, dict(level_map), tuple(heads), **own)]
        self.links = tuple(links)
        self.teacher, self.level_map = self.links[0].teacher, dict(self.links[0].level_map)
        self.teacher_scale = self.links[0].scale
        needed = {"features"}.union(*(head.requires for head in heads.values()))
        ours = needed.union(*(head.requires_student for head in heads.values()))
        specs = {name: spec for name, spec in taps_for(student).items() if name in ours}
        self._taps = FeatureTaps(student, {**specs, **extra_taps(heads, "student")})
        self._strides = {name: s.stride for name, s in student.backbone.output_shape().items()}
        needed = [link.connect(heads, self._strides) for link in self.links]
        scale = next((link.scale for link in self.links if link.scale != 1), 1.0)
        self._padding = _student_padding(student, math.lcm(*needed), scale)
        self._canvas = _CanvasProbe()
        student.backbone.register_forward_pre_hook(self._canvas)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Build the student of MODEL.META_ARCHITECTURE, the teachers and their KD.HEADS."""
        student = build_detector(cfg)
        heads, links = nn.ModuleDict(), []
        for name in teacher_names(cfg):
            with told_of(name):
                link, own = link_to_teacher(config_of(cfg, name), student, name)
            link.weight = weight_of(cfg, name)
            heads.update(own)
            links.append(link)
        check_heads(cfg, heads)
        only = links[0]
        one = {"teacher": only.teacher, "level_map": only.level_map}
        one |= {"teacher_scale": only.scale, "compile_teacher": only.compiled}
        return {
            **({"links": links} if cfg.KD.TEACHERS else one),
            "student": student,
            "heads": heads.to(cfg.MODEL.DEVICE),
            "balance": build_balance(cfg, heads),
            "ramps": {module: build_ramp(*config_of_head(cfg, module)) for module in heads},
            "image_format": cfg.INPUT.FORMAT,
            "log_period": cfg.KD.LOG_PERIOD,
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
        place = next(self.student.parameters()).device
        parts = parts_of(on_device(with_digests(batched_inputs, self.links), place))
        # first: a teacher's activations are gone before the student's are kept, and on a GPU its
        # kernels hide behind the student's host work
        with torch.profiler.record_function("kd/teacher"):
            seen = [self.run_teachers(part) for part in parts]
        losses: dict[str, torch.Tensor] = {}
        contexts = []
        for part, found in zip(parts, seen, strict=True):
            with torch.profiler.record_function("kd/student"):
                student = self._run_student(part, losses)
            contexts.append(self._context(part, student, found))
        return contexts[0] if len(contexts) == 1 else join(*contexts), losses

    def _canvas_of(self, batch) -> tuple[int, int]:
        return self._padding.canvas([tuple(x["image"].shape[-2:]) for x in batch])

    def run_teachers(self, batch: list[dict]) -> list[dict]:
        """What each teacher's taps give for a batch, see :meth:`Teacher.observe`."""
        canvas = self._canvas_of(batch)
        return [link.observe(batch, canvas, self.image_format) for link in self.links]

    def _run_student(self, batch, losses: dict) -> dict:
        """What its taps give; in training, losses of labelled images are added to ``losses``."""
        canvas = self._canvas_of(batch)
        with self._padding.applied():
            if batch[0].get(FLAG):
                student = observe_unlabelled(self.student, self._taps, batch, canvas)
            else:
                with self._taps.record():
                    result = self.student(batch)
                if self.student.training:
                    losses.update(result)
                student = {name: self._taps[name] for name in self._taps.specs}
        self._taps.clear()
        if self._canvas.size != canvas:
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE {type(self.student).__name__} padded the batch to "
                f"{self._canvas.size}, the teacher saw {canvas}; say how it pads with "
                "register_detector(padding=...)"
            )
        return student

    def _context(self, batch, student, seen) -> DistillContext:
        iteration = get_event_storage().iter
        sizes = [tuple(x["image"].shape[-2:]) for x in batch]
        gt = None
        if all("instances" in x for x in batch):
            gt = [x["instances"].to(self.device) for x in batch]
        first = DistillContext(
            iteration=iteration,
            image_sizes=sizes,
            canvas=self._canvas_of(batch),
            gt=gt,
            student_features=student.pop("features"),
            student_outputs=student,
            strides=self._strides,
            batch=batch,
            student=self.student,
            log_scalars=iteration % self.log_period == 0,
            **self.links[0].fields(seen[0], sizes),
        )
        for link, found in zip(self.links[1:], seen[1:], strict=True):
            other = dataclasses.replace(first, **link.fields(found, sizes), _masks={}, others={})
            first.others.update(dict.fromkeys(link.heads, other))
        return first

    def imitate(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """All heads' losses, schedules and multipliers applied, computed without autocast."""
        losses: dict[str, torch.Tensor] = {}
        link_of = {name: link for link in self.links for name in link.heads}
        for name, head in self.heads.items():
            seen = context_of(head, name, ctx.of_head(name))
            if head.needs_boxes and seen.gt is None:
                raise DataError(f"KD.HEADS: {name} needs boxes, and this batch has no annotations")
            with (
                torch.profiler.record_function(f"kd/head/{name}"),
                torch.autocast(self.device.type, enabled=False),
            ):
                own = link_of.get(name, self.links[0]).told(head(seen))
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


def build_training_model(cfg) -> nn.Module:
    """What is trained: the plain student, or the wrapper that KD.META_ARCHITECTURE names."""
    if cfg.KD.META_ARCHITECTURE:
        model = META_ARCH_REGISTRY.get(cfg.KD.META_ARCHITECTURE)(cfg).to(cfg.MODEL.DEVICE)
    else:
        model = build_detector(cfg)
    student = student_of(model)
    if in_channels_last(cfg.SOLVER.CHANNELS_LAST, cfg.MODEL.DEVICE):
        getattr(student, "backbone", student).to(memory_format=torch.channels_last)
    use_sparse_gradients(student)
    return use_full_precision(model)


def student_of(model: nn.Module) -> nn.Module:
    """The deployed detector inside a (DDP-wrapped) training model, or the model itself."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return model.student if isinstance(model, DistillMetaArch) else model
