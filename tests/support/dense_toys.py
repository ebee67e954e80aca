"""GFL and FCOS without layers below their heads, beside ``toy_retinanet``; deeper towers."""

from __future__ import annotations

import torch
from detectron2.modeling.meta_arch import fcos
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from kd_testing import CHANNELS, DENSE_CHANNELS, STRIDES, ToyDetector, toy_retinanet

from projects.kd.modeling.fcos import FCOS
from projects.kd.modeling.gfl import ANCHOR_SCALE, GFL, GFLHead
from projects.kd.modeling.square_anchors import square_anchors

BINS = 5
PIXELS = {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (1.0, 1.0, 1.0)}


def look_at_cells_alone(head, seed: int = 0):
    """Random kernels of which only the centre is not 0; sure background."""
    torch.manual_seed(seed)
    for name, parameter in head.named_parameters():
        if name.endswith("weight") and parameter.dim() == 4:
            centre = torch.zeros(3, 3)
            centre[1, 1] = 1.0
            parameter.data.normal_(std=0.5).mul_(centre)
        elif name.startswith("cls_score"):
            parameter.data.fill_(-1.0)
    return head


def toy_gfl(channels: int = CHANNELS, convs: int = 1, bins: int = BINS, seed: int = 0) -> GFL:
    shapes = list(ToyDetector(channels).backbone.output_shape().values())
    head = GFLHead(
        reg_max=bins - 1,
        input_shape=shapes,
        num_classes=DENSE_CHANNELS,
        conv_dims=[channels] * convs,
        norm="",
    )
    head.scales.data.copy_(torch.tensor([0.8, 1.0, 1.3]))
    model = GFL(
        backbone=ToyDetector(channels).backbone,
        head=look_at_cells_alone(head, seed),
        head_in_features=list(STRIDES),
        anchor_generator=square_anchors(list(STRIDES.values()), ANCHOR_SCALE, 0.0),
        num_classes=DENSE_CHANNELS,
        test_score_thresh=0.05,
        test_topk_candidates=10,
        test_nms_thresh=0.6,
        max_detections_per_image=10,
        **PIXELS,
    )
    return model.train()


def toy_fcos(channels: int = CHANNELS, convs: int = 1, seed: int = 0) -> FCOS:
    shapes = list(ToyDetector(channels).backbone.output_shape().values())
    head = fcos.FCOSHead(
        input_shape=shapes, num_classes=DENSE_CHANNELS, conv_dims=[channels] * convs, norm=""
    )
    head = look_at_cells_alone(head, seed)
    head.bbox_pred.bias.data.fill_(2.0)  # boxes with an area
    model = FCOS(
        backbone=ToyDetector(channels).backbone,
        head=head,
        head_in_features=list(STRIDES),
        num_classes=DENSE_CHANNELS,
        center_sampling_radius=1.5,
        **PIXELS,
    )
    return model.train()


def deep_retinanet(channels: int = CHANNELS, convs: int = 2, seed: int = 0, norm: str = ""):
    model = toy_retinanet(channels, seed)
    head = RetinaNetHead(
        input_shape=list(model.backbone.output_shape().values()),
        num_classes=model.num_classes,
        num_anchors=4,
        conv_dims=[channels] * convs,
        norm=norm,
    )
    model.head = look_at_cells_alone(head, seed)
    return model
