"""Gradients of a small student with one head, in one process or as a rank of several."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.distributed as dist
from dense_toys import BINS, toy_gfl
from detectron2.utils.events import EventStorage
from kd_detr import LEVEL, decoded, detr_targets, info, toy_detr
from kd_regions import REGION_CLASSES, regions_of, toy_rcnn
from kd_testing import (
    CHANNELS,
    DENSE_CHANNELS,
    STRIDES,
    Stages,
    head_cfg,
    make_context,
    toy_info,
    toy_retinanet,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from projects.kd.detectors import taps_for
from projects.kd.heads import build_imitation_heads
from projects.kd.predict import DenseOutputs

# What each rank sees: image sizes on one canvas, so that the batches can be joined.
SIZES = (((40, 56), (64, 33)), ((64, 48),))
CANVAS = (64, 64)
TEACHER_CHANNELS = CHANNELS + 3
TASK_NORMALISER = 1e5
BOX_CHANNELS = 16  # four anchors


@dataclass(frozen=True)
class Case:
    """A head, its config, and the boxes an image has on each rank.

    ``whole_batch``: the gradients are those of the joined batch in one process; otherwise those of
    the mean of the ranks' losses.

    ``patched``: the module of a head whose statistics are each rank's own but whose normalisers,
    by its ``mean_over_ranks``, are not.
    ``detectors``: channels to the detector of a side, for heads that predict with it.
    ``box_channels``: what its head gives beside the logits.
    ``decoder``: the student is a transformer on one of the levels.
    ``regions``: the student classifies regions as well.
    """

    name: str
    node: dict = field(default_factory=dict)
    boxes: tuple[int, int] = (3, 5)
    whole_batch: bool = False
    patched: str = ""
    detectors: Callable = lambda channels: None  # of both sides; None = that of toy_info
    box_channels: int = BOX_CHANNELS
    decoder: bool = False
    regions: bool = False

    def __str__(self):
        kind = "a decoder" if self.decoder else "regions" if self.regions else None
        kind = kind or self.node.get("TARGET", "features")
        return f"{self.name} on {kind}, {self.boxes[0]} and {self.boxes[1]} boxes an image"


GFL_CASE = {"detectors": toy_gfl, "box_channels": 4 * BINS}
CROSSKD = "projects.kd.heads.crosskd"
CASES = {
    str(case): case
    for case in (
        Case("Mimic"),
        Case("CWD"),
        Case("CWD", {"TARGET": "dense"}),
        Case("PKD"),
        Case("AT"),
        Case("LOCAL"),
        Case("PA"),
        Case("IFVD", {"WEIGHT": 1.0}),
        Case("PI", {"TARGET": "dense"}, whole_batch=True),
        Case("FGFI", {"WEIGHT": 1.0}, whole_batch=True),
        Case("FGFI", {"WEIGHT": 1.0}, boxes=(4, 0), whole_batch=True),
        Case("FGFI", {"WEIGHT": 1.0}, boxes=(0, 0), whole_batch=True),
        Case("SDF", {"EMBED_DIM": 8}),
        # one draw for all of a rank's images: no joined batch draws alike
        Case("MGD", {"WEIGHT": 1e-2, "AREA_REF": 0.0}),
        Case("FGD", {"ALPHA": 1.0, "BETA": 1.0, "GAMMA": 1.0, "AREA_REF": 0.0}, boxes=(4, 0)),
        Case("ReviewKD"),
        Case("ScoreL2", detectors=toy_retinanet),
        Case("DSI"),
        Case("DKD", detectors=toy_rcnn, regions=True),
        # as many objects on both ranks: the normaliser of the detection loss is that of each
        Case("D3ETR", boxes=(3, 6), decoder=True),
        Case("D3ETR", {"ADAPTIVE": False}, boxes=(0, 0), decoder=True),
        Case("D3ETR", {"ADAPTIVE": False, "RANDOM": 5}, boxes=(0, 1), decoder=True),
        Case("ICD", {"PRIORS": "uniform", "DIM": 16, "HEADS": 4, "FFN_DIM": 32, "DETACH_ITERS": 0}),
        Case("OutputKD", {"WEIGHT": 10.0}, detectors=toy_retinanet),
        Case("CSA", {"WEIGHT": 10.0, "DIM": 16, "HEADS": 4}, detectors=toy_retinanet),
        Case("BCKD", whole_batch=True, detectors=toy_retinanet),
        Case("BCKD", boxes=(4, 0), whole_batch=True, detectors=toy_retinanet),
        Case("CrossKD", patched=CROSSKD, detectors=toy_retinanet),
        Case("CrossKD", boxes=(4, 0), patched=CROSSKD, **GFL_CASE),
        Case("DIST", {"WEIGHT": 10.0}, detectors=toy_retinanet),
        Case("DIST", detectors=toy_rcnn, regions=True),
        Case("LD", whole_batch=True, **GFL_CASE),
        Case("LD", {"NORMALISER": "weights"}, boxes=(4, 0), whole_batch=True, **GFL_CASE),
    )
}


class Step(nn.Module):
    """A student of one convolution a level, a task loss of fixed normaliser, and a head."""

    def __init__(self, case: Case):
        super().__init__()
        torch.manual_seed(0)
        self.levels = nn.ModuleDict(
            {level: nn.Conv2d(3, CHANNELS, s, stride=s) for level, s in STRIDES.items()}
        )
        self.predictor = nn.Conv2d(CHANNELS, DENSE_CHANNELS, 1)
        self.regressor = nn.Conv2d(CHANNELS, case.box_channels, 1)
        # a tuple: the detectors' parameters are no part of the step
        self.detectors = tuple(case.detectors(x) for x in (CHANNELS, TEACHER_CHANNELS))
        infos = [
            toy_info(channels, model=model)
            for channels, model in zip((CHANNELS, TEACHER_CHANNELS), self.detectors, strict=True)
        ]
        self.classifier = nn.Linear(4 * CHANNELS, REGION_CLASSES + 1) if case.regions else None
        self.detector = None
        if case.decoder:
            self.detector = toy_detr(CHANNELS)
            teacher = toy_detr(TEACHER_CHANNELS, dim=24, seed=1).eval().requires_grad_(False)
            self.teacher = SimpleNamespace(model=teacher)  # outside of the module tree
            infos = info(self.detector), info(teacher)
        heads = build_imitation_heads(head_cfg(case.name, **case.node), *infos)
        self.head = heads[case.name]

    def forward(self, images, ctx):
        features = {level: conv(images) for level, conv in self.levels.items()}
        logits = [self.predictor(feature) for feature in features.values()]
        deltas = [self.regressor(feature) for feature in features.values()]
        ctx.student_features = features
        ctx.student_outputs = {"dense": DenseOutputs(logits, deltas), "bottom_up": Stages(features)}
        ctx.student, ctx.teacher = self.detectors[0], SimpleNamespace(model=self.detectors[1])
        if ctx.student is not None and self.classifier is None:
            named = taps_for(ctx.student)["dense"].select
            ctx.student_outputs["dense"] = named((logits, deltas))
            with torch.no_grad():
                theirs = ctx.teacher.model.head(list(ctx.teacher_features.values()))
            ctx.teacher_outputs["dense"] = named(theirs)
        outputs = (*features.values(), *logits, *deltas)
        task = sum(x.square().sum() for x in outputs) / TASK_NORMALISER
        if self.detector is not None:
            task = task + self.decode(features, ctx)
        if self.classifier is not None:
            task = task + self.classify(features, ctx)
        torch.manual_seed(1)  # a head that draws does so alike wherever the batch is run
        with EventStorage():
            return task, sum(self.head(ctx).values())

    def classify(self, features, ctx):
        """Fill the context with the student's regions and their logits; a task loss as above."""
        regions = regions_of(ctx.image_sizes, seed=len(ctx.image_sizes))
        pooler = self.detectors[0].roi_heads.box_pooler
        pooled = pooler(list(features.values()), [x.proposal_boxes for x in regions])
        logits = self.classifier(pooled.flatten(1))
        ctx.student_outputs.update(sampled_proposals=regions, box=(logits, logits))
        return logits.square().sum() / TASK_NORMALISER

    def decode(self, features, ctx):
        """Fill the context with both decoders' outputs; a task loss of fixed normaliser."""
        canvas = ctx.image_sizes, ctx.canvas
        own = decoded(self.detector, features[LEVEL], *canvas)
        with torch.no_grad():
            other = decoded(self.teacher.model, ctx.teacher_features[LEVEL], *canvas)
        ctx.student_outputs["decoded"], ctx.teacher_outputs["decoded"] = own, other
        ctx.student, ctx.teacher = self.detector, self.teacher
        detr_targets(ctx)
        return (own.logits.square().sum() + own.boxes.square().sum()) / TASK_NORMALISER


def batch_of(ranks, case: Case):
    """Images and context of some ranks' batches, joined."""
    images, contexts = [], []
    for rank in ranks:
        generator = torch.Generator().manual_seed(rank)
        images.append(torch.randn(len(SIZES[rank]), 3, *CANVAS, generator=generator))
        channels = (CHANNELS, TEACHER_CHANNELS)
        contexts.append(
            make_context(SIZES[rank], CANVAS, channels, boxes=case.boxes[rank], seed=10 + rank)
        )
    ctx = contexts[0]
    for other in contexts[1:]:
        ctx.image_sizes += other.image_sizes
        ctx.gt += other.gt
        for level, feature in other.teacher_features.items():
            ctx.teacher_features[level] = torch.cat([ctx.teacher_features[level], feature])
        pairs = zip(
            ctx.teacher_outputs["dense"].logits, other.teacher_outputs["dense"].logits, strict=True
        )
        ctx.teacher_outputs["dense"] = DenseOutputs([torch.cat(pair) for pair in pairs])
    return torch.cat(images), ctx


def gradients(module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): None if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def run_rank(rank: int, folder: str) -> None:
    """All cases on one of two processes; writes the gradients to ``folder``."""
    torch.set_num_threads(1)
    address = "file://" + os.path.join(folder, "rendezvous")
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(SIZES))
    results = {}
    for key, case in CASES.items():
        model = DistributedDataParallel(Step(case))
        sum(model(*batch_of([rank], case))).backward()
        results[key] = gradients(model)
        # the reducer of the next step would complain about a parameter left out of this one
        model(*batch_of([rank], case))
    torch.save(results, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()
