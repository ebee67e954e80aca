"""D3ETR: imitation of a detection transformer's decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import nn

from ..config import head_node, register_config
from ..context import DistillContext, ModelInfo
from ..errors import ConfigError, require_one_of
from ..functional.d3etr import (
    CLASS_COSTS,
    QUERY_WEIGHTS,
    attention_loss,
    layer_map,
    matching_cost,
    prediction_loss,
    top_queries,
)
from ..functional.set_prediction import assign
from ..modeling.conditional_detr import Decoded
from ..modeling.conditional_detr_transformer import Attention
from ..modeling.set_criterion import Targets, to_matches
from .base import IMITATION_HEAD_REGISTRY, ImitationHead

ASSIGN_LAYERS = ("last", "all")


@register_config
def add_d3etr_config(cfg) -> None:
    """Add KD.D3ETR."""
    # MASK_PADDING and LEVELS stay as they are: the decoder reads one level and masks its padding
    cfg.KD.D3ETR = node = head_node(weight=1.0, mask_padding=True)
    # Adaptive matching: in every layer the student's queries are paired with the teacher's.
    node.ADAPTIVE = True
    # Fixed matching: the teacher's queries are a second group in the student's decoder (training
    # only); output j belongs to the teacher's output j.
    node.FIXED = True
    node.MATCH = match = CfgNode()
    # Class term of the cost: "soft_bce" or "focal_hard" (with CLASS_WEIGHT 2, as the detector's).
    match.CLASS_COST = "soft_bce"
    match.CLASS_WEIGHT = 1.0
    match.L1_WEIGHT = 5.0
    match.GIOU_WEIGHT = 2.0
    # Adaptive matching takes the teacher's queries with the highest scores only; 0 = all.
    match.TOPK = 100
    node.LOSS = loss = CfgNode()
    # Factors of the three terms; a term with factor 0 is not computed.
    loss.PRED = 1.0
    loss.SELF = 1.0
    loss.CROSS = 1.0
    # Parts of the prediction term.
    loss.CLASS = 1.0
    loss.L1 = 5.0
    loss.GIOU = 2.0
    # Weight of a pair in the prediction term: "teacher_max_prob" or "uniform".
    node.QUERY_WEIGHT = "teacher_max_prob"
    # Detection loss of the second group: its factor, and the decoder layers in which the teacher
    # says which query finds which object ("last" or "all"); others match by themselves.
    node.AUX_DET_WEIGHT = 1.0
    node.AUX_ASSIGN_LAYERS = "last"


@dataclass(frozen=True)
class Pairs:
    """Which queries belong together, in every layer of the student.

    Attributes:
        student, teacher: (L, N, P) int64; None on both sides = j belongs to j.
    """

    student: torch.Tensor | None = None
    teacher: torch.Tensor | None = None

    def layer(self, k: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Those of one layer, (N, P) each."""
        return (None, None) if self.student is None else (self.student[k], self.teacher[k])


@IMITATION_HEAD_REGISTRY.register()
class D3ETR(ImitationHead):
    """Decoder distillation with MixMatcher (Chen et al., arXiv 2211.09768, IJCAI 2024).

    ``loss_kd_d3etr_pred``, ``_self`` and ``_cross`` are sums over decoder layers and groups of
    :func:`~projects.kd.functional.d3etr.prediction_loss` and
    :func:`~projects.kd.functional.d3etr.attention_loss`; ``loss_kd_d3etr_aux`` is the detection
    loss of the second group over all layers. Groups: the student's own queries, paired adaptively
    in every layer; and the teacher's queries, frozen, decoded by the student from the same memory.
    Structure by the paper; the costs, forms and weights are ours where
    :mod:`projects.kd.functional.d3etr` says so.

    Nothing of it remains in the student: the second group exists in this head only.

    Args:
        adapter_queries: teacher's query width to the student's; None where they agree.
        adaptive, fixed: which groups are distilled; at least one.
        match: ``class_cost``, ``class_weight``, ``l1_weight`` and ``giou_weight`` of the cost.
        top_k: teacher queries that take part in adaptive matching; 0 = all.
        terms: factors of "pred", "self" and "cross".
        parts: ``class_weight``, ``l1_weight``, ``giou_weight`` and ``query_weight`` of "pred".
        aux_weight: factor of the second group's detection loss.
        assign_layers: "last" or "all", where the teacher's assignment replaces the group's own.
        **base: see :class:`ImitationHead`.
    """

    requires = frozenset({"features", "decoded"})
    compares = ("thing_classes",)

    def __init__(
        self,
        *,
        adapter_queries: nn.Module | None = None,
        adaptive: bool = True,
        fixed: bool = True,
        match: dict,
        top_k: int = 100,
        terms: dict[str, float],
        parts: dict,
        aux_weight: float = 1.0,
        assign_layers: str = "last",
        **base,
    ):
        super().__init__(**base)
        self.adapter_queries = adapter_queries if fixed else None
        self.adaptive = adaptive
        self.fixed = fixed
        self.match = match
        self.top_k = top_k
        self.terms = {name: factor for name, factor in terms.items() if factor > 0}
        self.parts = parts
        self.aux_weight = aux_weight if fixed else 0.0
        self.assign_layers = assign_layers
        self.needs_boxes = self.aux_weight > 0

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.D3ETR."""
        node = cfg.KD.D3ETR
        _check_node(cfg, student, teacher)
        kwargs = super().from_config(cfg, student, teacher)
        widths = [info.model.query_embed.embedding_dim for info in (teacher, student)]
        same = widths[0] == widths[1]
        kwargs.update(
            adapter_queries=None if same else nn.Linear(*widths, bias=False),
            adaptive=node.ADAPTIVE,
            fixed=node.FIXED,
            match={
                "class_cost": node.MATCH.CLASS_COST,
                "class_weight": node.MATCH.CLASS_WEIGHT,
                "l1_weight": node.MATCH.L1_WEIGHT,
                "giou_weight": node.MATCH.GIOU_WEIGHT,
            },
            top_k=node.MATCH.TOPK,
            terms={"pred": node.LOSS.PRED, "self": node.LOSS.SELF, "cross": node.LOSS.CROSS},
            parts={
                "class_weight": node.LOSS.CLASS,
                "l1_weight": node.LOSS.L1,
                "giou_weight": node.LOSS.GIOU,
                "query_weight": node.QUERY_WEIGHT,
            },
            aux_weight=node.AUX_DET_WEIGHT,
            assign_layers=node.AUX_ASSIGN_LAYERS,
        )
        return kwargs

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_d3etr_pred``, ``_self``, ``_cross`` and ``_aux``, those with a factor."""
        student: Decoded = ctx.student_outputs["decoded"]
        teacher: Decoded = ctx.teacher_outputs["decoded"]
        layers = layer_map(len(student.logits), len(teacher.logits))
        second = self.second_group(ctx, student) if self.fixed else None
        pairs, detection = self._match(ctx, student, teacher, second, layers)
        groups = [(student, pairs)] if self.adaptive else []
        groups += [(second, Pairs())] if self.fixed else []
        each = [self.imitate(group, teacher, layers, own) for group, own in groups]
        result = {
            f"loss_kd_d3etr_{name}": self.weight * factor * sum(terms[name] for terms in each)
            for name, factor in self.terms.items()
        }
        if detection is not None:
            result["loss_kd_d3etr_aux"] = self.weight * self.aux_weight * detection
        return result

    def second_group(self, ctx: DistillContext, student: Decoded) -> Decoded:
        """The student's decoder on the teacher's frozen queries, in the precision of the step."""
        queries = ctx.teacher.model.query_embed.weight.detach()
        with torch.autocast(
            queries.device.type, dtype=student.autocast, enabled=student.autocast is not None
        ):
            if self.adapter_queries is not None:
                queries = self.adapter_queries(queries)
            return ctx.student.decode(student.memory, queries, keep_attention=True)

    # -- matching ----------------------------------------------------------------------------------

    def _match(self, ctx, student, teacher, second, layers):
        """Adaptive pairs of each layer, and the second group's detection loss (or None).

        All assignments of a step are solved after one copy from the device.
        """
        costs: list[torch.Tensor] = []
        if self.adaptive:
            costs, chosen = self._adaptive_costs(student, teacher, layers)
        first = len(costs)
        targets = None
        if self.aux_weight > 0:
            targets = Targets.of(ctx.gt, student.boxes.device)
            criterion = ctx.student.criterion
            own = 0 if self.assign_layers == "all" else len(layers) - 1
            costs += criterion.costs(second.logits[:own], second.boxes[:own], targets)
            theirs = layers[own:]
            costs += criterion.costs(teacher.logits[theirs], teacher.boxes[theirs], targets)
        solved = assign(costs, "KD.D3ETR")
        pairs = self._adaptive_pairs(solved[:first], chosen) if self.adaptive else None
        if targets is None:
            return pairs, None
        matches = to_matches(solved[first:], targets)
        losses = criterion.losses(second.logits, second.boxes, targets, matches)
        return pairs, sum(value.sum() for value in losses.values())

    def adaptive_pairs(self, student: Decoded, teacher: Decoded) -> Pairs:
        """Which queries belong together in each layer, by the cost of pairing them."""
        layers = layer_map(len(student.logits), len(teacher.logits))
        costs, chosen = self._adaptive_costs(student, teacher, layers)
        return self._adaptive_pairs(assign(costs, "KD.D3ETR"), chosen)

    def _adaptive_costs(self, student, teacher, layers):
        """Cost matrices of layers and images, and the (L, N, K) queries of the teacher in them."""
        chosen = top_queries(teacher.logits[layers].float(), self.top_k)
        cost = matching_cost(
            student.logits.detach(),
            student.boxes.detach(),
            _take(teacher.logits[layers], chosen),
            _take(teacher.boxes[layers], chosen),
            **self.match,
        )
        return list(cost.flatten(0, 1).unbind()), chosen

    def _adaptive_pairs(self, solved, chosen: torch.Tensor) -> Pairs:
        table = torch.stack([torch.from_numpy(pair) for pair in solved])
        table = table.to(chosen.device, non_blocking=True).unflatten(0, chosen.shape[:2])
        student, teacher = table.unbind(2)  # (L, N, P) each
        return Pairs(student, chosen.gather(-1, teacher))

    # -- the three terms ---------------------------------------------------------------------------

    def imitate(
        self, group: Decoded, teacher: Decoded, layers: list[int], pairs: Pairs
    ) -> dict[str, torch.Tensor]:
        """The terms "pred", "self" and "cross" of a group, sums over its layers.

        Args:
            group: the student's decoder on one group of queries.
            teacher: its decoder's outputs.
            layers: the teacher's layer for each of the student's.
            pairs: which queries belong together.
        """
        terms = {}
        if "pred" in self.terms:
            terms["pred"] = prediction_loss(
                _take(group.logits, pairs.student),
                _take(group.boxes, pairs.student),
                _take(teacher.logits[layers], pairs.teacher),
                _take(teacher.boxes[layers], pairs.teacher),
                **self.parts,
            ).sum()
        if "self" in self.terms:
            # small maps: all layers at once, as if they were images
            theirs = [teacher.self_attention[k] for k in layers]
            ours = _stacked(group.self_attention, pairs.student)
            mean = attention_loss(*ours, *_stacked(theirs, pairs.teacher))
            terms["self"] = len(layers) * mean
        if "cross" in self.terms:
            terms["cross"] = sum(
                self._cross(group, k, teacher, other, *pairs.layer(k))
                for k, other in enumerate(layers)
            )
        return terms

    def _cross(self, group, k: int, teacher, other: int, own_rows, their_rows):
        """Cross-attention of layer ``k`` against the teacher's layer ``other``."""
        ours, theirs = group.cross_attention[k], teacher.cross_attention[other]
        return attention_loss(
            _of_heads(ours.query, own_rows),
            ours.key,
            _of_heads(theirs.query, their_rows),
            theirs.key,
            ours.valid,
            theirs.valid,
            group.memory.grid,
            teacher.memory.grid,
        )


def _take(values: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """(..., Q, C) and (..., P) to (..., P, C)."""
    return values if index is None else torch.take_along_dim(values, index[..., None], dim=-2)


def _of_heads(values: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """(N, M, Q, d) and (N, P), the same for all heads, to (N, M, P, d)."""
    return values if index is None else _take(values, index[:, None])


def _stacked(layers: Sequence[Attention], index: torch.Tensor | None):
    """Queries and keys of self-attention, both of the chosen rows: (L N, M, P, d) each."""
    rows = None if index is None else index.flatten(0, 1)
    query, key = (torch.cat([getattr(x, name) for x in layers]) for name in ("query", "key"))
    return _of_heads(query, rows), _of_heads(key, rows)


def _check_node(cfg, student: ModelInfo, teacher: ModelInfo) -> None:
    node = cfg.KD.D3ETR
    if not (node.ADAPTIVE or node.FIXED):
        raise ConfigError("KD.D3ETR: ADAPTIVE and FIXED are both False, nothing would be distilled")
    for key, value, allowed in (
        ("MATCH.CLASS_COST", node.MATCH.CLASS_COST, CLASS_COSTS),
        ("QUERY_WEIGHT", node.QUERY_WEIGHT, QUERY_WEIGHTS),
        ("AUX_ASSIGN_LAYERS", node.AUX_ASSIGN_LAYERS, ASSIGN_LAYERS),
    ):
        require_one_of(f"KD.D3ETR.{key}", value, allowed)
    factors = {f"LOSS.{key}": value for key, value in node.LOSS.items()}
    factors |= {f"MATCH.{key}": node.MATCH[key] for key in node.MATCH if key != "CLASS_COST"}
    factors["AUX_DET_WEIGHT"] = node.AUX_DET_WEIGHT
    for key, value in factors.items():
        if value < 0:
            raise ConfigError(f"KD.D3ETR.{key} is {value}, it must not be negative")
    if not any((node.LOSS.PRED, node.LOSS.SELF, node.LOSS.CROSS)):
        raise ConfigError("KD.D3ETR.LOSS: PRED, SELF and CROSS are all 0")
    if node.LEVELS or not node.MASK_PADDING:
        key = "LEVELS" if node.LEVELS else "MASK_PADDING"
        raise ConfigError(
            f"KD.D3ETR.{key}: D3ETR reads the decoder, which sees one level and always masks its "
            "padding; leave the key as it is"
        )
    ours, theirs = student.model.num_classes, teacher.model.num_classes
    if ours != theirs:
        raise ConfigError(
            f"KD.TEACHER.CONFIG_FILE: D3ETR compares class by class, the teacher has {theirs} "
            f"classes and the student {ours}"
        )
