"""ICD: the teacher's knowledge, weighted by where it shows the instances of an image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from detectron2.data import MetadataCatalog
from torch import nn

from ..config import head_node, optimizer_node, register_config
from ..context import DistillContext, ModelInfo
from ..data.priors import BoxPriors, dataset_priors, uniform_priors
from ..detectors import configured_classes
from ..errors import ConfigError, require_one_of
from ..functional.icd import (
    Priors,
    identification_loss,
    localisation_error,
    summed_attention,
)
from ..functional.icd_values import value_distance
from .base import IMITATION_HEAD_REGISTRY, ImitationHead, common_width
from .fgfi import FGFI, student_anchors
from .icd_decoder import Cells, InstanceDecoder, Read, project
from .icd_queries import Queries, draw_queries

ATTENTIONS = ("decoder", "uniform", "fgfi")
PRIORS = ("dataset", "uniform")


@register_config
def add_icd_config(cfg) -> None:
    """Add KD.ICD."""
    cfg.KD.ICD = node = head_node(weight=8.0, mask_padding=True)
    # Width of queries, keys and values, and the attention heads that share it.
    node.DIM = 256
    node.HEADS = 8
    # Decoder layers; the distillation term is their mean.
    node.LAYERS = 1
    node.FFN_DIM = 1024
    # A query's centre is off by up to this fraction of the box's sides; less than 0.5.
    node.JITTER = 0.3
    # Fake instances per real one, as long as an image has at most MAX_QUERIES of both; real ones
    # are never dropped (an image with MAX_QUERIES objects gets no fake).
    node.NEGATIVES_PER_BOX = 5.0
    node.MAX_QUERIES = 300
    # Where fakes come from: "dataset" = class frequencies and box sizes measured in DATASETS.TRAIN;
    # "uniform" = all classes alike, sizes 0.2 +- 0.2 of the image.
    node.PRIORS = "dataset"
    # First iterations in which the distillation term trains the student's value projection only.
    node.DETACH_ITERS = 1000
    # Weights of the distillation term: "decoder" = attention of the real instances; "uniform" and
    # "fgfi" (mask of KD.FGFI) are the published ablation.
    node.ATTENTION = "decoder"
    # True: the mean over an image's tokens is subtracted from the values of both sides (ours). Most
    # of a detector's values is the same for every token, and would be matched first.
    node.CENTER = False
    # Factors of the auxiliary tasks, which train the decoder: real or fake, and box sides.
    node.CONF_WEIGHT = 1.0
    node.BOX_WEIGHT = 1.0
    # Optimizer of the decoder and of the student's value projection.
    node.OPTIMIZER = optimizer_node("AdamW", 1e-4, 0.01, scheduler="WarmupCosineLR")


@IMITATION_HEAD_REGISTRY.register()
class ICD(ImitationHead):
    """Instance-conditional distillation (Kang et al., NeurIPS 2021).

    A decoder learns, on the teacher's features, to tell real from fake instances and to find their
    sides (``loss_aux_icd_*``). Where its heads look for the real ones, the student's values are
    drawn to the teacher's (``loss_kd_icd``)::

        weight * mean over images, layers and heads of
            sum_l w_l e_l / max(sum_l w_l, 1e-6),   w = attention summed over the real instances

    with e of :func:`~projects.kd.functional.icd_values.value_distance`. Images without objects
    count as 0. The student has a value projection of its own. ``loss_kd_icd`` trains it and, from
    ``detach_iters`` on, the student; the auxiliary losses train the decoder; neither reaches the
    teacher. Widths of student and teacher may differ, as may their classes.

    Unlike the release: of several layers (it trains with one) the auxiliary losses see the last
    one's output only, and one position projection serves the keys of all; the student's value
    projections start as torch's linear layers do.

    Args:
        decoder: on the teacher's features.
        student_channels: width of the student's features.
        priors: what fakes are drawn from.
        jitter: a; centres move by a uniform share in [-a, a] of the box, a < 0.5.
        negatives: fakes per real instance, see :func:`~projects.kd.functional.icd.query_counts`.
        max_queries: limit of both together.
        detach_iters: iterations before ``loss_kd_icd`` reaches the student.
        attention: "decoder", or the ablation "uniform" (w = 1) or "fgfi" (w = imitation mask).
        imitation_mask: an FGFI head whose ``masks`` give the weights of "fgfi".
        conf_weight, box_weight: factors of the auxiliary losses.
        center: of :func:`~projects.kd.functional.icd_values.value_distance`; False as published.
        **base: see :class:`ImitationHead`. Without ``mask_padding`` the padding of the batch counts
            as image.
    """

    needs_boxes = True

    def __init__(
        self,
        *,
        decoder: InstanceDecoder,
        student_channels: int,
        priors: BoxPriors,
        jitter: float = 0.3,
        negatives: float = 5.0,
        max_queries: int = 300,
        detach_iters: int = 1000,
        attention: str = "decoder",
        imitation_mask: FGFI | None = None,
        conf_weight: float = 1.0,
        box_weight: float = 1.0,
        center: bool = False,
        **base,
    ):
        super().__init__(**base)
        self.decoder = decoder
        width = decoder.layers[0].value.out_features
        self.student_values = nn.ModuleList(
            nn.Linear(student_channels, width) for _ in decoder.layers
        )
        self.jitter = jitter
        self.negatives = negatives
        self.max_queries = max_queries
        self.detach_iters = detach_iters
        self.attention = attention
        self.imitation_mask = imitation_mask
        self.conf_weight = conf_weight
        self.box_weight = box_weight
        self.center = center
        cumulative = torch.as_tensor(priors.frequency).cumsum(0).float()
        self.register_buffer("class_share", cumulative, persistent=False)
        self.register_buffer("mean_size", torch.as_tensor(priors.mean).float(), persistent=False)
        self.register_buffer("size_spread", torch.as_tensor(priors.std).float(), persistent=False)

    def reads_of_teacher(self) -> tuple[str, ...]:
        """See the base class."""
        return self.levels

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.ICD."""
        node = cfg.KD.ICD
        _check_node(node)
        kwargs = super().from_config(cfg, student, teacher)
        levels = kwargs["levels"]
        num_classes = _num_classes(cfg, student)
        why = "KD.ICD.LEVELS: ICD projects all levels alike"
        kwargs.update(
            decoder=InstanceDecoder(
                num_classes=num_classes,
                channels=common_width("teacher", teacher, levels, why),
                dim=node.DIM,
                heads=node.HEADS,
                layers=node.LAYERS,
                ffn_dim=node.FFN_DIM,
            ),
            student_channels=common_width("student", student, levels, why),
            priors=_priors(cfg, num_classes),
            jitter=node.JITTER,
            negatives=node.NEGATIVES_PER_BOX,
            max_queries=node.MAX_QUERIES,
            detach_iters=node.DETACH_ITERS,
            attention=node.ATTENTION,
            imitation_mask=(
                fgfi_mask(cfg, student, levels, kwargs["mask_padding"])
                if node.ATTENTION == "fgfi"
                else None
            ),
            conf_weight=node.CONF_WEIGHT,
            box_weight=node.BOX_WEIGHT,
            center=node.CENTER,
        )
        return kwargs

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_icd``, ``loss_aux_icd_conf`` and ``loss_aux_icd_box``."""
        queries = self.queries(ctx)
        student, teacher = self.tokens(ctx)
        if ctx.iteration < self.detach_iters:
            student = [[Cells(x.feature.detach(), x.size) for x in image] for image in student]
        counts = [sum(count) for count in queries.counts]
        logits, sides, reads = self.decoder(queries.encoded.vectors, counts, teacher)
        number = sum(count for count, _ in queries.counts)
        predicted, *expected = map(queries.only_real, (sides, *queries.encoded[1:]))
        error = localisation_error(predicted, *expected).sum() / max(number, 1)
        self._log(ctx, logits.detach(), queries.real, error.detach(), number)
        return {
            "loss_kd_icd": self.weight * self._distance(ctx, student, queries, reads),
            "loss_aux_icd_conf": self.conf_weight * identification_loss(logits, queries.real),
            "loss_aux_icd_box": self.box_weight * error,
        }

    def aux_parameters(self) -> Iterable[nn.Parameter]:
        """The decoder and the student's value projections."""
        return self.parameters()

    def queries(self, ctx: DistillContext) -> Queries:
        """The objects of every image and as many fakes as belong to them."""
        priors = Priors(self.class_share, self.mean_size, self.size_spread)
        return draw_queries(ctx, priors, self.jitter, self.negatives, self.max_queries)

    def tokens(self, ctx: DistillContext) -> tuple[list[list[Cells]], list[list[Cells]]]:
        """Per image the cells of each level of the student and of the teacher, fp32."""
        student: list[list[Cells]] = [[] for _ in ctx.image_sizes]
        teacher: list[list[Cells]] = [[] for _ in ctx.image_sizes]
        for level in self.levels:
            features = ctx.student_features[level], ctx.teacher_features[level]
            own, other, _ = self.align(ctx, level, *features)
            for side, features in ((student, own), (teacher, other)):
                for image, feature in enumerate(features.unbind()):
                    side[image].append(Cells(feature, self._extent(ctx, level, image)))
        return student, teacher

    def _extent(self, ctx: DistillContext, level: str, image: int) -> tuple[int, int]:
        """Valid rows and columns, without asking the device (as ``ctx.valid_mask`` has them)."""
        grid = tuple(ctx.student_features[level].shape[-2:])
        if not self.mask_padding:
            return grid
        stride = ctx.stride(level)
        size = ctx.image_sizes[image]
        return tuple(min(math.ceil(a / stride), b) for a, b in zip(size, grid, strict=True))

    def _distance(self, ctx, student, queries: Queries, reads: list[list[Read]]) -> torch.Tensor:
        """The distillation term without its weight."""
        # every parameter and feature keeps a gradient, as DDP wants, without objects too
        total = 0.0 * sum(values.weight.sum() + values.bias.sum() for values in self.student_values)
        masks = self.imitation_mask.masks(ctx) if self.attention == "fgfi" else None
        for values, layer in zip(self.student_values, reads, strict=True):
            for image, read in enumerate(layer):
                number = queries.counts[image][0]
                if number == 0 and self.attention != "uniform":
                    total = total + 0.0 * sum(x.feature[:, 0, 0].sum() for x in student[image])
                    continue
                if self.attention == "decoder":
                    weights = summed_attention(read.queries[:number], read.keys)
                elif self.attention == "fgfi":
                    weights = self._flat_mask(ctx, masks, image).expand(read.keys.shape[1], -1)
                else:
                    weights = read.keys.new_ones(read.keys.shape[1], len(read.keys))
                heads = read.values.shape[1]
                own = project(values, student[image], heads)
                total = total + value_distance(own, read.values, weights, self.center)
        return total / (len(reads) * len(student))

    def _flat_mask(self, ctx, masks: dict[str, torch.Tensor], image: int) -> torch.Tensor:
        """(L,) imitation mask of one image's tokens."""
        parts = []
        for level in self.levels:
            rows, columns = self._extent(ctx, level, image)
            if level in masks:
                parts.append(masks[level][image, :rows, :columns].flatten().float())
            else:
                parts.append(self.mean_size.new_zeros(rows * columns))
        return torch.cat(parts)

    def _log(self, ctx, logits, real, error, number: int) -> None:
        """Accuracy: mean of those on real and on fake ones (0.5 = guessing), cut at their odds."""
        if not ctx.log_scalars or not 0 < number < len(real):
            return
        odds = number / (len(real) - number)
        right = ((logits > math.log(odds)) == real).float()
        ctx.put_scalar("kd/icd_accuracy", (right[real].mean() + right[~real].mean()) / 2)
        ctx.put_scalar("kd/icd_box_error", error / 4)


def _check_node(node) -> None:
    if node.HEADS < 1 or node.DIM % node.HEADS or node.DIM // node.HEADS < 2:
        raise ConfigError(
            f"KD.ICD.HEADS {node.HEADS} must divide KD.ICD.DIM {node.DIM} into at least 2 channels "
            "a head"
        )
    if not 0 <= node.JITTER < 0.5:
        raise ConfigError(
            f"KD.ICD.JITTER is {node.JITTER}, it must be in [0, 0.5): a centre moved by half a box "
            "lies outside of it"
        )
    for key, allowed in (("ATTENTION", ATTENTIONS), ("PRIORS", PRIORS)):
        require_one_of(f"KD.ICD.{key}", node[key], allowed)
    for key, least in (("LAYERS", 1), ("FFN_DIM", 1), ("MAX_QUERIES", 1), ("DETACH_ITERS", 0)):
        if node[key] < least:
            raise ConfigError(f"KD.ICD.{key} is {node[key]}, it must be at least {least}")
    if node.NEGATIVES_PER_BOX < 0:
        raise ConfigError(f"KD.ICD.NEGATIVES_PER_BOX is {node.NEGATIVES_PER_BOX}, below 0")


def _num_classes(cfg, student: ModelInfo) -> int:
    """The student's number of classes, from its config key or the data set's class names."""
    number = configured_classes(cfg, type(student.model))
    if number is not None:
        return number
    for name in cfg.DATASETS.TRAIN:
        classes = MetadataCatalog.get(name).get("thing_classes", ())
        if classes:
            return len(classes)
    raise ConfigError(
        f"KD.HEADS: ICD cannot tell the number of classes of {student.arch}; "
        "call register_detector beside the meta-arch"
    )


def _priors(cfg, num_classes: int) -> BoxPriors:
    # on the meta device nothing is ever drawn: such outlines need no data
    if cfg.KD.ICD.PRIORS == "uniform" or cfg.MODEL.DEVICE == "meta":
        return uniform_priors(num_classes)
    return dataset_priors(cfg.DATASETS.TRAIN, num_classes)


def fgfi_mask(cfg, student: ModelInfo, levels: Sequence[str], mask_padding: bool) -> FGFI:
    """An FGFI head without parameters, of which only ``masks`` is asked.

    Args:
        cfg: the student's config; KD.FGFI sets the anchors and the threshold.
        student: its side.
        levels: those that need a mask; it is empty where the student has no anchors.
        mask_padding: leave the padding of a batch out.

    Raises:
        ConfigError: anchors on none of the levels.
    """
    anchors, anchor_levels = student_anchors(cfg, student, levels)
    levels = [level for level in levels if level in anchor_levels]
    if not levels:
        raise ConfigError(
            f"KD.ICD.LEVELS (or KD.LEVELS): the mask of FGFI needs levels with anchors, which are "
            f"{', '.join(anchor_levels)}"
        )
    return FGFI(
        adapters=nn.ModuleDict(),
        anchors=anchors,
        anchor_levels=anchor_levels,
        psi=cfg.KD.FGFI.THRESH_FACTOR,
        per_level=cfg.KD.FGFI.ASSIGN == "per_level",
        levels=levels,
        weight=0.0,
        mask_padding=mask_padding,
    )
