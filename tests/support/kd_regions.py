"""A small two-stage detector without layers below its heads, and regions for it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.structures import Boxes, Instances
from kd_testing import CHANNELS, STRIDES, ToyDetector, make_context, random_boxes

from projects.kd.context import ModelInfo
from projects.kd.detectors import taps_for

REGION_CLASSES = 3
_UNITS = (10.0, 10.0, 5.0, 5.0)


def toy_rcnn(channels: int = CHANNELS, seed: int = 0) -> GeneralizedRCNN:
    """detectron2's Faster R-CNN on the levels of :class:`ToyDetector`."""
    toy = ToyDetector(channels)
    torch.manual_seed(seed)
    pooled = ShapeSpec(channels=channels, height=2, width=2)
    rpn = RPN(
        in_features=list(STRIDES),
        head=StandardRPNHead(in_channels=channels, num_anchors=4),
        anchor_generator=toy.anchor_generator,
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=16,
        positive_fraction=0.5,
        pre_nms_topk=(20, 20),
        post_nms_topk=(10, 10),
    )
    heads = StandardROIHeads(
        num_classes=REGION_CLASSES,
        batch_size_per_image=8,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
        box_in_features=list(STRIDES),
        box_pooler=ROIPooler(2, [1 / s for s in STRIDES.values()], 0, "ROIAlignV2"),
        box_head=FastRCNNConvFCHead(pooled, conv_dims=[], fc_dims=[12]),
        box_predictor=FastRCNNOutputLayers(
            ShapeSpec(channels=12),
            box2box_transform=Box2BoxTransform(_UNITS),
            num_classes=REGION_CLASSES,
        ),
    )
    torch.nn.init.normal_(heads.box_predictor.cls_score.weight, std=1.0)
    model = GeneralizedRCNN(
        backbone=toy.backbone,
        proposal_generator=rpn,
        roi_heads=heads,
        pixel_mean=(0.0, 0.0, 0.0),
        pixel_std=(1.0, 1.0, 1.0),
    )
    return model.train()


def regions_of(sizes, seed: int = 0, count: int = 5) -> list[Instances]:
    """Sampled proposals of each image, labelled with all classes and background."""
    generator, found = torch.Generator().manual_seed(seed), []
    for size in sizes:
        own = Instances(tuple(size))
        own.proposal_boxes = Boxes(random_boxes(count, *size, generator))
        own.gt_classes = torch.randint(REGION_CLASSES + 1, (count,), generator=generator)
        found.append(own)
    return found


def region_info(model: GeneralizedRCNN) -> ModelInfo:
    """One side of a pair of toy R-CNNs."""
    shapes = model.backbone.output_shape()
    return ModelInfo(model=model, shapes=shapes, taps=frozenset(taps_for(model)))


def region_context(student, teacher, count: int = 5, **kwargs):
    """A context with ``count`` regions an image; the student's logits are leaves."""
    channels = tuple(x.backbone.output_shape()["p3"].channels for x in (student, teacher))
    ctx = make_context(channels=channels, **kwargs)
    regions = regions_of(ctx.image_sizes, count=count)
    generator = torch.Generator().manual_seed(3)
    rows = count * len(regions)
    logits = torch.randn(rows, REGION_CLASSES + 1, generator=generator).requires_grad_()
    ctx.student_outputs.update(sampled_proposals=regions, box=(logits, None))
    ctx.student, ctx.teacher = student, SimpleNamespace(model=teacher)
    return ctx
