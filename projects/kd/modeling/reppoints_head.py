"""The head of RepPoints on torchvision's deformable convolution (no compiled extension needed)."""

from __future__ import annotations

import math

import torch
from detectron2.layers import get_norm
from torch import nn
from torchvision.ops import DeformConv2d

from ..errors import ConfigError, require_one_of
from ..functional.reppoints import minmax_boxes, moment_boxes
from .square_anchors import points_of

TRANSFORMS = ("moment", "minmax")


class RepPointsHead(nn.Module):
    """Two towers; nine points, from the centre and then refined, steer deformable convolutions.

    Args:
        channels: of all levels and layers.
        num_classes: K.
        num_convs: convolutions of each tower.
        norm: their norm.
        num_points: a square number of odd root; the points are a kernel's taps.
        gradient_mul: share of the gradient that reaches the first points through the offsets.
        prior_prob: class probability that the bias starts from.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        num_convs: int,
        norm: str,
        num_points: int = 9,
        gradient_mul: float = 0.1,
        prior_prob: float = 0.01,
    ):
        super().__init__()
        side = math.isqrt(num_points)
        if side * side != num_points or side % 2 == 0:
            raise ConfigError(
                f"MODEL.REPPOINTS.NUM_POINTS is {num_points}; it must be 1, 9, 25, ...: a kernel"
            )
        self.gradient_mul = gradient_mul
        self.cls_subnet = _tower(channels, num_convs, norm)
        self.bbox_subnet = _tower(channels, num_convs, norm)
        self.points_init = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * num_points, 1),
        )
        kernel = {"kernel_size": side, "padding": side // 2, "bias": False}
        self.cls_deform = DeformConv2d(channels, channels, **kernel)
        self.points_deform = DeformConv2d(channels, channels, **kernel)
        self.cls_score = nn.Conv2d(channels, num_classes, 1)
        self.points_refine = nn.Conv2d(channels, 2 * num_points, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, DeformConv2d)):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))
        steps = torch.arange(side) - side // 2
        taps = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)
        self.register_buffer("kernel", taps.float().view(1, -1, 1, 1), persistent=False)

    def forward(self, features):
        """Lists over levels: (N, K, H, W) class logits, and (N, 2 P, H, W) first and refined points
        as (y, x) pairs in strides from the location."""
        logits, first, refined = [], [], []
        for feature in features:
            tower, classes = self.bbox_subnet(feature), self.cls_subnet(feature)
            points = self.points_init(tower)
            steered = torch.lerp(points.detach(), points, self.gradient_mul)
            # in fp32: torchvision wants all its inputs in one type
            offset = steered.float() - self.kernel
            with torch.autocast(feature.device.type, enabled=False):
                classes = self.cls_deform(classes.float(), offset).relu()
                around = self.points_deform(tower.float(), offset).relu()
            logits.append(self.cls_score(classes))
            first.append(points)
            refined.append(self.points_refine(around) + points.detach())
        return logits, first, refined


class PointBoxes(nn.Module):
    """Point sets to boxes.

    Args:
        transform: "moment" (with two learnt factors) or "minmax".
        scale: side of the anchors in strides, from which a location's stride is read.
        moment_mul: share of the gradient that the factors get.
    """

    def __init__(self, transform: str, scale: float, moment_mul: float = 0.01):
        super().__init__()
        require_one_of("MODEL.REPPOINTS.TRANSFORM", transform, TRANSFORMS)
        self.transform = transform
        self.scale = scale
        self.moment_mul = moment_mul
        if transform == "moment":
            self.moment_transfer = nn.Parameter(torch.zeros(2))

    def apply_deltas(self, points: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """(R, 2 P) points in strides at (R, 4) anchors to (R, 4) boxes XYXY in pixels."""
        points = points.float().unflatten(1, (int(points.shape[1]) // 2, 2))
        if self.transform == "moment":
            own = self.moment_transfer
            boxes = moment_boxes(points, torch.lerp(own.detach(), own, self.moment_mul))
        else:
            boxes = minmax_boxes(points)
        centres, strides = points_of(anchors, self.scale)
        return boxes * strides[:, None] + centres.repeat(1, 2)


def _tower(channels: int, number: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(number):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=not norm))
        if norm:
            layers.append(get_norm(norm, channels))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)
