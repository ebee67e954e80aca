"""Small Conditional DETRs on given features, and contexts for heads that read their decoders."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList
from kd_testing import CHANNELS, leaves, make_context
from torch import nn

from projects.kd import ModelInfo
from projects.kd.levels import scaled_size
from projects.kd.modeling.conditional_detr import ConditionalDETR
from projects.kd.modeling.conditional_detr_transformer import Transformer
from projects.kd.modeling.set_criterion import SetCriterion
from projects.kd.predict import DenseOutputs

LEVEL = "p4"
STRIDE = 16
CLASSES = 3


class GivenFeatures(nn.Module):
    """Stands where a backbone would; the features come from a context."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def output_shape(self):
        return {LEVEL: ShapeSpec(channels=self.channels, stride=STRIDE)}


def toy_detr(
    channels=CHANNELS, dim=16, heads=4, layers=2, queries=8, seed=0, classes=CLASSES
) -> ConditionalDETR:
    """Random weights without dropout; boxes and scores differ from query to query."""
    torch.manual_seed(seed)
    model = ConditionalDETR(
        backbone=GivenFeatures(channels),
        in_feature=LEVEL,
        num_classes=classes,
        num_queries=queries,
        transformer=Transformer(dim, heads, 1, layers, 2 * dim, dropout=0.0),
        criterion=SetCriterion(),
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )
    with torch.no_grad():
        for parameter in (*model.bbox_embed.parameters(), *model.class_embed.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def info(model) -> ModelInfo:
    shapes = model.backbone.output_shape()
    return ModelInfo(model=model, shapes=shapes, taps=frozenset({"features", "decoded"}))


def decoded(model, feature, sizes, canvas):
    """What the tap "decoded" gives for a feature map."""
    images = ImageList(torch.zeros(len(sizes), 3, *canvas), list(sizes))
    return model.decode(model.encode({LEVEL: feature}, images), keep_attention=True)


class OnDemand(dict):
    """Outputs that are computed when a head asks, from what the features hold by then."""

    def __init__(self, compute, **known):
        super().__init__(known)
        self.compute = compute

    def __missing__(self, name):
        assert name == "decoded"
        self[name] = self.compute()
        return self[name]


def detr_targets(ctx) -> None:
    """Classes of all kinds for the objects of a context."""
    for one in ctx.gt:
        one.gt_classes = torch.arange(len(one)) % CLASSES


def detr_context(student, teacher, same=False, **kwargs):
    """A context of two detectors whose features are leaves that ask for a gradient."""
    channels = tuple(model.backbone.channels for model in (student, teacher))
    ctx = make_context(channels=channels, same=same, **kwargs)
    for features in (ctx.student_features, ctx.teacher_features):
        for level in set(features) - {LEVEL}:
            del features[level]
    detr_targets(ctx)

    def of_student():
        return decoded(student, ctx.student_features[LEVEL], ctx.image_sizes, ctx.canvas)

    @torch.no_grad()
    def of_teacher():
        scale = ctx.teacher_scale
        sizes = [scaled_size(size, scale) for size in ctx.image_sizes]
        canvas = tuple(round(scale * side) for side in ctx.canvas)
        return decoded(teacher, ctx.teacher_features[LEVEL], sizes, canvas)

    for name, compute in (("student_outputs", of_student), ("teacher_outputs", of_teacher)):
        dense = getattr(ctx, name)["dense"].logits[1:2]
        setattr(ctx, name, OnDemand(compute, dense=DenseOutputs(dense)))
    ctx.student = student.train()
    ctx.teacher = SimpleNamespace(model=teacher.eval().requires_grad_(False))
    assert len(leaves(ctx).student) == 2
    return ctx
