"""Gradients of a small student with one head, in one process or as a rank of several."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from kd_testing import CHANNELS, DENSE_CHANNELS, STRIDES, head_cfg, make_context, toy_info
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from projects.kd.heads import build_imitation_heads

# What each rank sees: image sizes on one canvas, so that the batches can be joined.
SIZES = (((40, 56), (64, 33)), ((64, 48),))
CANVAS = (64, 64)
TEACHER_CHANNELS = CHANNELS + 3
TASK_NORMALISER = 1e5


@dataclass(frozen=True)
class Case:
    """A head, its config, and the boxes an image has on each rank.

    ``whole_batch``: the gradients are those of the joined batch in one process; otherwise those of
    the mean of the ranks' losses.
    """

    name: str
    node: dict = field(default_factory=dict)
    boxes: tuple[int, int] = (3, 5)
    whole_batch: bool = False

    def __str__(self):
        kind = self.node.get("TARGET", "features")
        return f"{self.name} on {kind}, {self.boxes[0]} and {self.boxes[1]} boxes an image"


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
        Case("ICD", {"PRIORS": "uniform", "DIM": 16, "HEADS": 4, "FFN_DIM": 32, "DETACH_ITERS": 0}),
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
        infos = toy_info(CHANNELS), toy_info(TEACHER_CHANNELS)
        heads = build_imitation_heads(head_cfg(case.name, **case.node), *infos)
        self.head = heads[case.name]

    def forward(self, images, ctx):
        features = {level: conv(images) for level, conv in self.levels.items()}
        logits = [self.predictor(feature) for feature in features.values()]
        ctx.student_features, ctx.student_outputs = features, {"dense": (logits,)}
        task = sum(x.square().sum() for x in (*features.values(), *logits)) / TASK_NORMALISER
        torch.manual_seed(1)  # a head that draws does so alike wherever the batch is run
        return task, sum(self.head(ctx).values())


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
        pairs = zip(ctx.teacher_outputs["dense"][0], other.teacher_outputs["dense"][0], strict=True)
        ctx.teacher_outputs["dense"] = ([torch.cat(pair) for pair in pairs],)
    return torch.cat(images), ctx


def gradients(module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): None if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
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
