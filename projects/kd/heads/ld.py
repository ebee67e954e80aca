"""LD: the distributions of a box's sides, at positives and in the valuable localisation region."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..config import head_node, register_config
from ..context import DistillContext
from ..errors import ConfigError, require_one_of
from ..functional.ld import DISTANCES, class_divergence, side_divergence
from ..functional.ranks import mean_over_ranks
from ..predict import predictor_for
from .base import IMITATION_HEAD_REGISTRY
from .dense_kd import DenseImitation, term_weights
from .output_kd import cell_masks

NORMALISERS = ("images", "weights")
PUBLISHED_IMAGES = 2  # a process's, for which the published weights were made
LEAST_WEIGHT = 1e-6
MAIN_SHARE, REGION_SHARE = 1 / 4, 1 / 16


@register_config
def add_ld_config(cfg) -> None:
    """Add KD.LD; the values are those of the authors' configs."""
    cfg.KD.LD = node = head_node(weight=1.0, mask_padding=True)
    # Weights of the sides at positives, of the sides in the valuable localisation region, and of
    # the classes at positives (-1 = 10, and 0 where BCKD is among KD.HEADS).
    node.LD_WEIGHT = 0.25
    node.VLR_WEIGHT = 0.25
    node.KD_WEIGHT = -1.0
    # Temperatures of the softmax over a side's bins and over classes.
    node.TEMPERATURE = 10.0
    node.KD_TEMPERATURE = 2.0
    # The sums over locations are multiplied by 2 / images ("images": the published size for every
    # batch) or divided by the sum of their weights ("weights": bounded, for crowded images).
    node.NORMALISER = "images"
    # How near an anchor is to a box: "paper" = DIoU, or "released" as the authors' code has it.
    node.DISTANCE = "paper"


class Rows(NamedTuple):
    """Some locations: bins (R, 4, n + 1) and class logits (R, K) of both sides."""

    student_bins: torch.Tensor
    target_bins: torch.Tensor
    student_logits: torch.Tensor
    target_logits: torch.Tensor


@IMITATION_HEAD_REGISTRY.register()
class LD(DenseImitation):
    """Localisation distillation with the valuable localisation region (VLR), on GFL.

    Source: Zheng et al., CVPR 2022 and TPAMI 2023; forms as in the authors' code. Main term: at
    positives, weighted by the student's best class probability. VLR term: in the region, weighted
    by its IoU. Class term: softmax over classes at positives, the mean of a level's positives,
    levels summed. All normalisers are means over processes (ours).

    Args:
        weights: of the main term, of the region's and of the classes.
        temperatures: of sides and of classes.
        normaliser: one of NORMALISERS.
        distance: of the region, see :func:`~projects.kd.functional.ld.valuable_region`.
        **base: see :class:`DenseImitation`.
    """

    supports = ("GFL",)

    def __init__(
        self,
        *,
        weights: tuple[float, float, float],
        temperatures: tuple[float, float] = (10.0, 2.0),
        normaliser: str = "images",
        distance: str = "paper",
        **base,
    ):
        super().__init__(**base)
        self.weights = tuple(weights)
        self.temperatures = temperatures
        self.normaliser = normaliser
        self.distance = distance

    @classmethod
    def from_config(cls, cfg, student, teacher):
        """Read KD.LD."""
        node, key = cfg.KD.LD, "KD.LD"
        require_one_of(f"{key}.NORMALISER", node.NORMALISER, NORMALISERS)
        require_one_of(f"{key}.DISTANCE", node.DISTANCE, DISTANCES)
        for name in ("TEMPERATURE", "KD_TEMPERATURE"):
            if node[name] <= 0:
                raise ConfigError(f"{key}.{name} is {node[name]}, it must be positive")
        beside = 0.0 if "BCKD" in cfg.KD.HEADS else 10.0
        names = {"LD_WEIGHT": 0.25, "VLR_WEIGHT": 0.25, "KD_WEIGHT": beside}
        weights = term_weights(node, key, names)
        kwargs = super().from_config(cfg, student, teacher)
        ours, theirs = (predictor_for(x.model, "LD") for x in (student, teacher))
        ours.check_exchange(theirs, key)
        return {
            **kwargs,
            "weights": weights,
            "temperatures": (node.TEMPERATURE, node.KD_TEMPERATURE),
            "normaliser": node.NORMALISER,
            "distance": node.DISTANCE,
        }

    def forward(self, ctx: DistillContext):
        """``loss_kd_ld_main``, ``loss_kd_ld_vlr`` and ``loss_kd_ld_cls``, those of weight > 0."""
        predictor, _ = self.predictors(ctx)
        assigned, masks = self.assign(ctx, predictor), cell_masks(self, ctx)
        student = predictor.student(ctx)
        pairs = self.compared(ctx, predictor, student, assigned, masks=masks, decoded=False)
        region = predictor.valuable_region(assigned, ctx.gt, self.distance, self.shared)
        region = [
            w for level, w in zip(predictor.levels, region, strict=True) if level in self.levels
        ]
        sides, softness = self.temperatures
        main, vlr, classes, sums, counts = [], [], [], [], []
        for pair, near in zip(pairs, region, strict=True):
            rows = _rows(pair, pair.positive & pair.counted)
            weight = rows.student_logits.detach().sigmoid().amax(1)
            main.append(side_divergence(*rows[:2], weight, sides))
            classes.append(class_divergence(*rows[2:], softness))
            near = near.masked_fill(~pair.counted, 0.0)
            inside = near > 0
            vlr.append(side_divergence(*_rows(pair, inside)[:2], near[inside], sides))
            sums.append(torch.stack([weight.sum(), near.sum()]))
            counts.append(weight.new_tensor(len(weight)))
        images = weight.new_tensor(len(ctx.gt))
        images, own, near, *counts = mean_over_ranks(
            torch.stack([images, *torch.stack(sums).sum(0), *counts])
        )
        if self.normaliser == "images":
            own = near = images / PUBLISHED_IMAGES
        terms = {
            "main": sum(main) * MAIN_SHARE / own.clamp(min=LEAST_WEIGHT),
            "vlr": sum(vlr) * REGION_SHARE / near.clamp(min=LEAST_WEIGHT),
            "cls": sum(x / n.clamp(min=LEAST_WEIGHT) for x, n in zip(classes, counts, strict=True)),
        }
        return {
            f"loss_kd_ld_{name}": self.weight * weight * term
            for weight, (name, term) in zip(self.weights, terms.items(), strict=True)
            if weight
        }


def _rows(pair, where: torch.Tensor) -> Rows:
    """The locations of a level where (N, 1, H, W) is true."""
    where = where[:, 0]
    bins = [x.movedim((3, 4), (1, 2))[where] for x in (pair.student_bins, pair.target_bins)]
    logits = [x[:, 0].movedim(1, 3)[where] for x in (pair.student_logits, pair.target_logits)]
    return Rows(*bins, *(x.detach() if k else x for k, x in enumerate(logits)))
