"""D3ETR: imitation of a detection transformer's decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..context import DistillContext
from ..functional.d3etr import attention_loss, layer_map, matching_cost, top_queries
from ..functional.decoded import Attention, Decoded
from ..functional.kd_detr import random_queries
from ..functional.set_prediction import assign
from ..functional.set_targets import Targets, to_matches
from ..shared_classes import ALL, SharedClasses
from .base import IMITATION_HEAD_REGISTRY, ImitationHead
from .d3etr_keys import PRED_FORMS, check_node


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
    in every layer; the teacher's queries, frozen, decoded by the student from the same memory; and,
    if asked for, random queries that both sides decode, with the prediction term only (KD-DETR,
    Wang et al., CVPR 2024; the law of a query is ours). Structure by the papers; the costs, forms
    and weights are ours where :mod:`projects.kd.functional.d3etr` says so.

    Nothing of it remains in the student: the second group exists in this head only.

    Args:
        adapter_queries: teacher's query width to the student's; None where they agree.
        adaptive, fixed: which groups are distilled.
        random: number of random queries; 0 = no such group. At least one group is needed.
        random_law: of :func:`~projects.kd.functional.kd_detr.random_queries`.
        last_layer: every layer of the student is compared with the teacher's last one.
        pred_form: "d3etr" or "kd_detr", the function of the prediction term.
        match: ``class_cost``, ``class_weight``, ``l1_weight`` and ``giou_weight`` of the cost.
        top_k: teacher queries that take part in adaptive matching; 0 = all.
        terms: factors of "pred", "self" and "cross".
        parts: ``class_weight``, ``l1_weight``, ``giou_weight`` and ``query_weight`` of "pred".
        aux_weight: factor of the second group's detection loss.
        assign_layers: "last" or "all", where the teacher's assignment replaces the group's own.
        shared: classes that the teacher predicts. The student's others are left out of what is
            compared; where the teacher assigns objects of those, it does so by their boxes.
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
        random: int = 0,
        random_law: str = "teacher",
        last_layer: bool = False,
        pred_form: str = "d3etr",
        match: dict,
        top_k: int = 100,
        terms: dict[str, float],
        parts: dict,
        aux_weight: float = 1.0,
        assign_layers: str = "last",
        shared: SharedClasses = ALL,
        **base,
    ):
        super().__init__(**base)
        self.shared = shared
        self.adapter_queries = adapter_queries if fixed or random else None
        self.adaptive = adaptive
        self.fixed = fixed
        self.random = random
        self.random_law = random_law
        self.last_layer = last_layer
        self.prediction_loss = PRED_FORMS[pred_form]
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
        check_node(cfg, student, teacher)
        kwargs = super().from_config(cfg, student, teacher)
        widths = [info.model.query_embed.embedding_dim for info in (teacher, student)]
        same = widths[0] == widths[1]
        kwargs.update(
            adapter_queries=None if same else nn.Linear(*widths, bias=False),
            adaptive=node.ADAPTIVE,
            fixed=node.FIXED,
            random=node.RANDOM,
            random_law=node.RANDOM_LAW,
            last_layer=node.LAYERS == "last",
            pred_form=node.PRED_FORM,
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
            shared=teacher.classes(),
        )
        return kwargs

    def forward(self, ctx: DistillContext) -> dict[str, torch.Tensor]:
        """``loss_kd_d3etr_pred``, ``_self``, ``_cross`` and ``_aux``, those with a factor."""
        student: Decoded = ctx.student_outputs["decoded"]
        teacher: Decoded = ctx.teacher_outputs["decoded"]
        layers = self.layers_of(student, teacher)
        second = self.second_group(ctx, student) if self.fixed else None
        pairs, detection = self._match(ctx, student, teacher, second, layers)
        groups = [(student, pairs)] if self.adaptive else []
        groups += [(second, Pairs())] if self.fixed else []
        each = [self.imitate(group, teacher, layers, own) for group, own in groups]
        if self.random:
            each.append(self.random_group(ctx, student, teacher, layers))
        # random queries alone have no term of attention
        terms = {name: [own[name] for own in each if name in own] for name in self.terms}
        result = {
            f"loss_kd_d3etr_{name}": self.weight * self.terms[name] * sum(values)
            for name, values in terms.items()
            if values
        }
        if detection is not None:
            result["loss_kd_d3etr_aux"] = self.weight * self.aux_weight * detection
        return result

    def layers_of(self, student: Decoded, teacher: Decoded) -> list[int]:
        """The teacher's layer for each layer of the student."""
        if self.last_layer:
            return [len(teacher.logits) - 1] * len(student.logits)
        return layer_map(len(student.logits), len(teacher.logits))

    def second_group(self, ctx: DistillContext, student: Decoded) -> Decoded:
        """The student's decoder on the teacher's frozen queries, in the precision of the step."""
        queries = ctx.teacher.model.query_embed.weight.detach()
        return self._decoded(ctx, student, queries, keep_attention=True)

    def _decoded(self, ctx, student: Decoded, queries, keep_attention: bool) -> Decoded:
        """The student's decoder on queries (Q, D) of the teacher's width."""
        with _precision_of(student):
            if self.adapter_queries is not None:
                queries = self.adapter_queries(queries)
            return ctx.student.decode(student.memory, queries, keep_attention)

    def random_group(
        self, ctx: DistillContext, student: Decoded, teacher: Decoded, layers: list[int]
    ) -> dict[str, torch.Tensor]:
        """The term "pred" of random queries, the same for all images and other in each process."""
        own = ctx.teacher.model.query_embed.weight.detach()
        queries = random_queries(own, self.random, self.random_law)
        with torch.no_grad(), _precision_of(teacher):
            other = ctx.teacher.model.decode(teacher.memory, queries)
        group = self._decoded(ctx, student, queries, keep_attention=False)
        return {"pred": self._prediction(group, other, layers, Pairs())}

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
            # a class that it does not know costs the same for all queries
            logits = self.shared.widened(teacher.logits[theirs], -1)
            costs += criterion.costs(logits, teacher.boxes[theirs], targets)
        solved = assign(costs, "KD.D3ETR")
        pairs = self._adaptive_pairs(solved[:first], chosen) if self.adaptive else None
        if targets is None:
            return pairs, None
        matches = to_matches(solved[first:], targets)
        losses = criterion.losses(second.logits, second.boxes, targets, matches)
        return pairs, sum(value.sum() for value in losses.values())

    def adaptive_pairs(self, student: Decoded, teacher: Decoded) -> Pairs:
        """Which queries belong together in each layer, by the cost of pairing them."""
        layers = self.layers_of(student, teacher)
        costs, chosen = self._adaptive_costs(student, teacher, layers)
        return self._adaptive_pairs(assign(costs, "KD.D3ETR"), chosen)

    def _adaptive_costs(self, student, teacher, layers):
        """Cost matrices of layers and images, and the (L, N, K) queries of the teacher in them."""
        chosen = top_queries(teacher.logits[layers].float(), self.top_k)
        cost = matching_cost(
            self.shared.logits(student.logits.detach(), -1),
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
            terms["pred"] = self._prediction(group, teacher, layers, pairs)
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

    def _prediction(self, group, teacher, layers, pairs: Pairs) -> torch.Tensor:
        return self.prediction_loss(
            _take(self.shared.logits(group.logits, -1), pairs.student),
            _take(group.boxes, pairs.student),
            _take(teacher.logits[layers], pairs.teacher),
            _take(teacher.boxes[layers], pairs.teacher),
            **self.parts,
        ).sum()

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


def _precision_of(decoded: Decoded):
    """Autocast as a decoder's outputs were computed."""
    kind, dtype = decoded.logits.device.type, decoded.autocast
    return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)


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
