"""An ICD head on toy detectors, for its tests."""

from __future__ import annotations

import torch
from kd_testing import CHANNELS, head_cfg, make_context, toy_info

from projects.kd.heads.icd import ICD

STUDENT, TEACHER = CHANNELS, CHANNELS + 4
SMALL = {"PRIORS": "uniform", "DIM": 16, "HEADS": 4, "FFN_DIM": 32, "DETACH_ITERS": 0}


def build(seed: int = 0, common=None, **node) -> ICD:
    cfg = head_cfg("ICD", common, **{**SMALL, **node})
    cfg.MODEL.RETINANET.NUM_CLASSES = 5
    torch.manual_seed(seed)
    return ICD(**ICD.from_config(cfg, toy_info(STUDENT, cfg), toy_info(TEACHER)))


def context(**kwargs):
    return make_context(**{"channels": (STUDENT, TEACHER), **kwargs})


def gradients(loss, tensors):
    """The gradient of each tensor, None where it takes no part or the gradient is exactly 0."""
    found = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
    return [None if g is None or not g.any() else g for g in found]


def features(ctx):
    return list(ctx.student_features.values())
