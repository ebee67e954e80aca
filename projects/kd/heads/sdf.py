"""SDF: distillation of the last backbone stage, decoupled by scale."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from torch import nn

from ..adapters import align_spatial, build_adapter
from ..config import head_node, register_config
from ..context import DistillContext, ModelInfo
from ..detectors import tapped_module
from ..errors import ConfigError, require_one_of
from ..functional.mimic import mimic_loss
from ..functional.sdf import spread
from .average import MovingAverage
from .base import IMITATION_HEAD_REGISTRY, ImitationHead
from .sdf_decoupler import ScaleDecoupler
from .sdf_share import ModuleShare

logger = logging.getLogger(__name__)

TARGETS = ("ema", "shared", "frozen")
# Weight of the feature term for one-stage and for two-stage students. "paper": alpha of ScaleKD as
# a public summary of the paper quotes it; the reduction that it went with is not known. "balanced":
# ours; on shapes the term starts at a thirtieth of the task losses, its gradient at the stage at a
# fifth of theirs. At ten times that, small students came out worse than without it. For two stages
# it is scaled alike and was not tried.
PRESETS = {"paper": (0.01, 0.07), "balanced": (0.03, 0.1)}
BY_PRESET = -1.0
COLLAPSED = 0.1  # of its first value: below that a target's spread is reported


@register_config
def add_sdf_config(cfg) -> None:
    """Add KD.SDF."""
    cfg.KD.SDF = node = head_node(weight=BY_PRESET, mask_padding=True)
    # WEIGHT -1.0 = that of the preset, by the kind of student: "balanced" or "paper". LEVELS are
    # stages of the student's backbone ("res5",); () = the last one. KD.LEVELS does not count here.
    node.PRESET = "balanced"
    # Dilations of the weight-shared 3x3 convolution, one branch each.
    node.DILATIONS = [1, 2, 3]
    # Channels that each branch is projected to.
    node.EMBED_DIM = 256
    # True: each branch's embedding is normalised over its channels in every cell.
    node.NORMALIZE = True
    # Who embeds the teacher's features, never with a gradient: "ema" = a moving average of the
    # student's module, "shared" = that module itself, "frozen" = its first, random state.
    node.TEACHER_SDF = "ema"
    # Share of the old value that "ema" keeps in a step; 0.995 for a few thousand steps.
    node.EMA_DECAY = 0.999
    # Multiplier of SOLVER.BASE_LR for the decouplers (the student's adapter: KD.ADAPTER.LR_FACTOR).
    # Decouplers that learn as fast as the student make the loss small by themselves.
    node.LR_FACTOR = 1.0
    # True: the student's features enter detached, so that only adapter and decouplers learn. This
    # is a control: if the loss falls as far with it as without, it teaches the student nothing.
    node.DETACH = False


@IMITATION_HEAD_REGISTRY.register()
class SDF(ImitationHead):
    """Scale-decoupled feature distillation, the first half of ScaleKD (Zhu et al., CVPR 2023).

    ``weight * mean over images, valid cells and channels of (E(A(z_s)) - E'(R(z_t)))^2`` on the
    last backbone stage z: A = adapter, R = mean of the teacher's cells in each of the student's
    (ours), E = :class:`ScaleDecoupler`, E' = its copy for the teacher.

    The paper does not say who trains E'. With a gradient on both sides the loss falls to 0 because
    both embeddings become constant (measured: their spread over cells falls to a tenth), so here E'
    has none: by default it is the moving average of E, taken once an iteration before E is used.
    ``kd/sdf_target_std`` logs the spread of E'; one warning says when it is lost.

    A small loss by itself is no success: A and E can make it small without the student.
    ``kd/sdf_module_share`` logs their share of its fall (:class:`ModuleShare`), and a warning says
    when they have done it nearly alone.

    Args:
        adapters: student stage to A.
        decouplers: student stage to E.
        teacher_stages: student stage to the name of its teacher stage.
        strides: student stage to its stride and the teacher's, each in pixels of its own input.
        teacher_sdf: "ema", "shared" or "frozen".
        ema_decay: in [0, 1).
        lr_factor: of the decouplers, at least 0.
        detach: no gradient to the student.
        **base: see :class:`ImitationHead`; ``levels`` are stages of the student's backbone.
    """

    requires = frozenset({"features", "bottom_up"})

    def __init__(
        self,
        *,
        adapters: nn.ModuleDict,
        decouplers: nn.ModuleDict,
        teacher_stages: dict[str, str],
        strides: dict[str, tuple[int, int]],
        teacher_sdf: str = "ema",
        ema_decay: float = 0.999,
        lr_factor: float = 1.0,
        detach: bool = False,
        **base,
    ):
        super().__init__(**base)
        self.adapters = adapters
        self.decouplers = decouplers
        self.teacher_stages = dict(teacher_stages)
        self.strides = dict(strides)
        self.teacher_sdf = teacher_sdf
        self.average = MovingAverage(ema_decay)
        self.detach = detach
        self.lr_factors = {"decouplers": lr_factor}
        # parameters in no optimizer: saved, and made equal on all processes when training starts
        self.targets = None
        if teacher_sdf != "shared":
            self.targets = copy.deepcopy(decouplers).requires_grad_(False)
        # at the first logged step; below 0 = none yet
        self.register_buffer("first_spread", torch.full((), -1.0))
        self.share = ModuleShare(self._modules_in_use())
        self._warned = False

    def reads_of_teacher(self) -> tuple[str, ...]:
        """See the base class."""
        return ()  # it reads stages

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.SDF."""
        node = cfg.KD.SDF
        _check_node(node)
        ours, theirs = _stages("student", student), _stages("teacher", teacher)
        pairs = _pair_stages(node.LEVELS, ours, theirs)
        _check_dilations(cfg, {stage: ours[stage].stride for stage in pairs})
        one_stage = "dense" in student.taps  # heads that predict at every cell of a level
        preset = PRESETS[node.PRESET][0 if one_stage else 1]
        adapters, decouplers = nn.ModuleDict(), nn.ModuleDict()
        for stage, other in pairs.items():
            channels = theirs[other].channels
            adapters[stage] = build_adapter(cfg.KD.ADAPTER.TYPE, ours[stage].channels, channels)
            decouplers[stage] = ScaleDecoupler(
                channels, max(channels // 4, 8), node.EMBED_DIM, node.DILATIONS, node.NORMALIZE
            )
        return {
            "levels": list(pairs),
            "weight": preset if node.WEIGHT == BY_PRESET else node.WEIGHT,
            "mask_padding": node.MASK_PADDING,
            "adapters": adapters,
            "decouplers": decouplers,
            "teacher_stages": pairs,
            "strides": {a: (ours[a].stride, theirs[b].stride) for a, b in pairs.items()},
            "teacher_sdf": node.TEACHER_SDF,
            "ema_decay": node.EMA_DECAY,
            "lr_factor": node.LR_FACTOR,
            "detach": node.DETACH,
        }

    def acts_on(self, ctx: DistillContext) -> list[torch.Tensor]:
        """The stages of the backbone that it reads."""
        return [ctx.student_outputs["bottom_up"][stage] for stage in self.levels]

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_sdf``: weight * mean over stages of the mean squared difference."""
        if self.training and self.teacher_sdf == "ema":
            self.average.update(self.targets, self.decouplers, ctx.iteration)
        pairs = {stage: self.stage_pair(ctx, stage) for stage in self.levels}
        total, spreads = 0.0, []
        for stage, (student, teacher, mask) in pairs.items():
            own = self.decouplers[stage](self.adapters[stage](student), mask)
            target = self.embed_teacher(stage, teacher, mask)
            total = total + mimic_loss(own, target, mask)
            if ctx.log_scalars:
                spreads.append(spread(target.detach(), mask))
        total = total / len(self.levels)
        if spreads:
            self._watch(ctx, torch.stack(spreads).mean())
        if ctx.log_scalars and self.training:
            self._watch_share(ctx, total.detach(), pairs)
        return {"loss_kd_sdf": self.weight * total}

    @torch.no_grad()
    def embed_teacher(self, stage: str, teacher: torch.Tensor, mask: torch.Tensor | None):
        """E' of a stage's teacher features (N, C, H, W) on the student's grid; no gradient."""
        modules = self.decouplers if self.targets is None else self.targets
        return modules[stage](teacher, mask)

    def _modules_in_use(self) -> dict[str, nn.Module]:
        modules = {"adapters": self.adapters, "decouplers": self.decouplers}
        return modules if self.targets is None else {**modules, "targets": self.targets}

    def _watch_share(self, ctx: DistillContext, loss: torch.Tensor, pairs: dict) -> None:
        def again(modules):
            theirs = modules["targets" if "targets" in modules else "decouplers"]
            found = [
                mimic_loss(
                    modules["decouplers"][stage](modules["adapters"][stage](student), mask),
                    theirs[stage](teacher, mask),
                    mask,
                )
                for stage, (student, teacher, mask) in pairs.items()
            ]
            return sum(found) / len(found)

        share = self.share.take(self._modules_in_use(), loss, again)
        if share is not None:
            ctx.put_scalar("kd/sdf_module_share", share)
        if not self.detach:
            self.share.warn(share, loss)

    def stage_pair(self, ctx: DistillContext, stage: str):
        """A backbone stage of both sides in fp32 on the student's grid, 0 in the padding.

        Returns:
            (N, C, H, W) student, (N, C_teacher, H, W) teacher without gradient, and the
            (N, 1, H, W) mask of valid cells: None without ``mask_padding`` or padding.
        """
        student = ctx.student_outputs["bottom_up"][stage].float()
        student = student.detach() if self.detach else student
        teacher = ctx.teacher_outputs["bottom_up"][self.teacher_stages[stage]].detach().float()
        mask = theirs = None
        if self.mask_padding:
            mask = ctx.padding_mask("student", student, self.strides[stage][0])
            theirs = ctx.padding_mask("teacher", teacher, self.strides[stage][1])
        teacher = align_spatial(teacher, student, theirs)
        if mask is not None:
            student, teacher = (torch.where(mask, x, 0.0) for x in (student, teacher))
        return student, teacher, mask

    def _watch(self, ctx: DistillContext, value: torch.Tensor) -> None:
        """Log the target's spread and say once if it is lost; only in steps that log."""
        value = value.item()
        ctx.put_scalar("kd/sdf_target_std", value)
        if self.first_spread < 0:
            self.first_spread.fill_(value)
        first = self.first_spread.item()
        if value < COLLAPSED * first and not self._warned and comm.is_main_process():
            self._warned = True
            logger.warning(
                "KD.SDF: the teacher's embedding collapses: its spread over cells is %.3g, at the "
                "start it was %.3g; a small loss_kd_sdf now means nothing (KD.SDF.TEACHER_SDF)",
                value,
                first,
            )


def _check_node(node) -> None:
    for key, allowed in (("TEACHER_SDF", TARGETS), ("PRESET", tuple(PRESETS))):
        require_one_of(f"KD.SDF.{key}", node[key], allowed)
    if node.WEIGHT < 0 and node.WEIGHT != BY_PRESET:
        raise ConfigError(
            f"KD.SDF.WEIGHT is {node.WEIGHT}; give a weight, or -1.0 for the preset's"
        )
    if not node.DILATIONS or any(type(r) is not int or r < 1 for r in node.DILATIONS):
        raise ConfigError(f"KD.SDF.DILATIONS: {node.DILATIONS} is no list of whole numbers from 1")
    if node.EMBED_DIM < 2:
        raise ConfigError(f"KD.SDF.EMBED_DIM is {node.EMBED_DIM}, it must be at least 2")
    if node.LR_FACTOR < 0:
        raise ConfigError(f"KD.SDF.LR_FACTOR is {node.LR_FACTOR}, it must not be negative")
    if not 0 <= node.EMA_DECAY < 1:
        raise ConfigError(f"KD.SDF.EMA_DECAY is {node.EMA_DECAY}, it must lie in [0, 1)")


def _check_dilations(cfg, strides: Mapping[str, int]) -> None:
    widest = max(cfg.KD.SDF.DILATIONS)
    for stage, stride in strides.items():
        cells = cfg.INPUT.MAX_SIZE_TRAIN * max(cfg.KD.TEACHER.INPUT_SCALE, 1) / stride
        if widest > max(cells, 3):
            raise ConfigError(
                f"KD.SDF.DILATIONS: {widest} is more cells than {stage} has along the longest side "
                f"of an image, {cells:.0f} (INPUT.MAX_SIZE_TRAIN)"
            )


def _stages(side: str, info: ModelInfo) -> dict[str, ShapeSpec]:
    """Stages of one side's backbone by name, in their order."""
    try:
        return dict(tapped_module(info.model, "bottom_up").output_shape())
    except (ConfigError, AttributeError) as error:
        raise ConfigError(
            f"KD.HEADS: SDF reads the stages of the {side}'s backbone, and {info.arch} has a "
            f"{type(info.model.backbone).__name__} without stages below a pyramid ({error})"
        ) from error


def _pair_stages(
    wanted: Sequence[str], ours: dict[str, ShapeSpec], theirs: dict[str, ShapeSpec]
) -> dict[str, str]:
    """Student stage to teacher stage: the last of both, or those named, by equal stride."""
    if not wanted:
        return {_last(ours): _last(theirs)}
    by_stride = {shape.stride: name for name, shape in theirs.items()}
    lacking = [x for x in wanted if x not in ours or ours[x].stride not in by_stride]
    if lacking:
        raise ConfigError(
            f"KD.SDF.LEVELS: {', '.join(lacking)} not among the backbone stages that student "
            f"({', '.join(ours)}) and teacher ({', '.join(theirs)}) share; () = the last of both"
        )
    return {stage: by_stride[ours[stage].stride] for stage in wanted}


def _last(shapes: dict[str, ShapeSpec]) -> str:
    """The deepest stage: of those with the largest stride the last."""
    return max(reversed(shapes), key=lambda name: shapes[name].stride)
