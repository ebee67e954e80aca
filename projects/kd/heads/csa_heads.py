"""The detection head through which CSA's assistant predicts: whose it is, and who trains it."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from ..context import DistillContext, ModelInfo
from ..errors import ConfigError
from ..predict import Predictor, predictor_for, with_modules
from .average import MovingAverage
from .output_kd import comparable

HEADS = ("student", "copy", "average", "teacher")
WITH_PARAMETERS = ("copy", "average")


class AssistantHead(nn.Module):
    """The modules of a student's detection head, or what stands in for them.

    - "student": the student's own, held constant.
    - "copy": a copy. It follows the student until the assistant trains (from the first iteration
      on, without KD.CSA.IDLE_ITERS); from then on it trains with the assistant, by the same
      optimizer, on ground truth through the assistant's features. Its batch norms keep their own
      running statistics.
    - "average": the moving average of the student's, begun at the same place as "copy", held
      constant. Its buffers are the student's.
    - "teacher": the teacher's, held constant.

    Everything else (anchors, poolers, losses with their normalisers) is always the student's.

    Args:
        kind: one of HEADS.
        paths: of the head's modules in the detector (:attr:`Predictor.modules`).
        student: whose head is copied; for kinds without parameters it is not read.
        decay: of "average".
    """

    def __init__(self, kind: str, paths: tuple[str, ...], student: nn.Module, decay: float):
        super().__init__()
        self.kind = kind
        self.paths = tuple(paths)
        self.parts = None
        if kind in WITH_PARAMETERS:
            self.parts = copy.deepcopy(self._of(student))
            if kind == "average":
                self.parts.requires_grad_(False)
            # a run that resumes must not take the student's head again
            self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._average = MovingAverage(decay)
        self._started = False  # what the buffer said: it costs a transfer to ask
        self.register_load_state_dict_post_hook(_ask_again)

    def _of(self, model: nn.Module) -> nn.ModuleList:
        return nn.ModuleList(model.get_submodule(path) for path in self.paths)

    @torch.no_grad()
    def follow(self, student: nn.Module, iteration: int, trains: bool) -> None:
        """Start from the student's head, or take its last step into the average.

        Args:
            student: the detector, with the weights that its training starts from.
            iteration: of the step.
            trains: whether the assistant does in this iteration.
        """
        if self.parts is None:
            return
        own = self._of(student)
        if not self._started:
            if not bool(self.started):
                for mine, theirs in zip(self.parts, own, strict=True):
                    mine.load_state_dict(theirs.state_dict())
                self.started.fill_(trains)
            self._started = bool(self.started)
        if self.kind == "average":
            self._average.update(self.parts, own, iteration)

    def predictor(self, ctx: DistillContext) -> Predictor:
        """Of the student with this head in place of its own."""
        if self.kind == "student":
            return predictor_for(ctx.student)
        source = self._of(ctx.teacher.model) if self.parts is None else self.parts
        # not kept: a view does not follow the student from training to evaluation
        return predictor_for(with_modules(ctx.student, dict(zip(self.paths, source, strict=True))))

    def predict(self, ctx: DistillContext, features: Mapping[str, torch.Tensor], assigned):
        """:meth:`Predictor.predict` by this head; "copy" alone gets gradients of its own."""
        return self.predictor(ctx).predict(features, assigned, constant=self.kind != "copy")


def _ask_again(head: AssistantHead, _) -> None:
    head._started = False


def build_assistant_head(cfg, student: ModelInfo, teacher: ModelInfo) -> AssistantHead:
    """The head that KD.CSA.HEAD names.

    Raises:
        ConfigError: a predictor without exchangeable modules, or a teacher that predicts other
            things than the student.
    """
    kind, predictor = cfg.KD.CSA.HEAD, predictor_for(student.model, "CSA")
    if kind != "student" and not predictor.modules:
        raise ConfigError(
            f"KD.CSA.HEAD '{kind}': the predictor of {predictor.name} names no modules "
            "(Predictor.modules); use 'student'"
        )
    if kind == "teacher":
        check_teacher_head(cfg, student, teacher)
    return AssistantHead(kind, predictor.modules, student.model, cfg.KD.CSA.HEAD_DECAY)


def check_teacher_head(cfg, student: ModelInfo, teacher: ModelInfo) -> None:
    """The teacher's head has to predict for the student's anchors, level by level.

    It works on the student's grid, so a teacher that sees the image at a scale must have anchors
    of that many times the student's, on levels of the student's strides.

    Raises:
        ConfigError: other family, classes, anchors, levels or units.
    """
    key, scale = "KD.CSA.HEAD 'teacher'", cfg.KD.TEACHER.INPUT_SCALE
    ours, theirs, match = comparable(cfg, student, teacher, "CSA", key)
    if teacher.classes().known is not None:
        raise ConfigError(
            f"{key}: the assistant learns all of the student's classes through the teacher's head, "
            "which does not know all of them (KD.TEACHER.CLASS_MAP); choose another"
        )
    ours.check_exchange(theirs, key)
    paired = teacher.paired_names(theirs.levels, key)
    same = tuple(paired.values()) == ours.levels and all(
        level in match and match[level].index == place and match[level].step == scale
        for place, level in enumerate(ours.levels)
    )
    if not same:
        raise ConfigError(
            f"{key}: the teacher's head must predict for the student's anchors on each of its "
            f"levels {', '.join(ours.levels)}, paired in that order (KD.LEVEL_MAP); of the "
            f"teacher's {', '.join(theirs.levels)} only "
            f"{', '.join(_fitting(ours, match, scale)) or 'none'} do (with KD.TEACHER.INPUT_SCALE "
            f"{scale:g} its MODEL.ANCHOR_GENERATOR.SIZES are {scale:g} times the student's)"
        )


def _fitting(ours: Predictor, match: Mapping, scale: float) -> list[str]:
    found = enumerate(ours.levels)
    return [x for i, x in found if x in match and (match[x].index, match[x].step) == (i, scale)]
