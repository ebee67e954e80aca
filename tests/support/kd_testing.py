"""What tests of losses and imitation heads share: waves, toy detectors, contexts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances
from torch import nn

from projects.kd import (
    DistillContext,
    ModelInfo,
    TapSpec,
    add_kd_config,
    register_detector,
)
from projects.kd.predict import DenseOutputs

STRIDES = {"p3": 8, "p4": 16, "p5": 32}
CHANNELS = 6
DENSE_CHANNELS = 8  # anchors x classes of the toy detectors' dense head


def wave(name: str, *shape: int, dtype=torch.float64) -> torch.Tensor:
    """The deterministic inputs of the golden numbers: "student" or "teacher" values in C order."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    values = 2 * torch.sin(0.37 * i + 0.10) if name == "student" else 3 * torch.cos(0.23 * i - 0.20)
    return values.to(dtype).view(shape)


def random_boxes(count, height, width, generator, smallest=4.0, dtype=torch.float32):
    """(count, 4) XYXY inside the image, sides log-uniform from ``smallest`` to the image's."""
    side = torch.tensor([width, height], dtype=torch.float64)
    shape = smallest * (side / smallest) ** torch.rand(
        count, 2, generator=generator, dtype=torch.float64
    )
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * (side - shape)
    return torch.cat([corner, corner + shape], dim=1).to(dtype)


class ToyDetector(nn.Module):
    """What heads read of a one-stage detector when they are built."""

    def __init__(self, channels: int = CHANNELS, strides=None):
        super().__init__()
        strides = STRIDES if strides is None else strides
        shapes = {level: ShapeSpec(channels=channels, stride=s) for level, s in strides.items()}
        self.backbone = nn.Module()
        self.backbone.output_shape = lambda: shapes
        self.backbone.bottom_up = nn.Module()
        self.backbone.bottom_up.output_shape = lambda: {stage(x): s for x, s in shapes.items()}
        self.head_in_features = list(shapes)
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[2.0 * s, 3.0 * s] for s in strides.values()],
            aspect_ratios=[[0.5, 1.0]],
            strides=list(strides.values()),
            offset=0.0,
        )


def toy_retinanet(channels: int = CHANNELS, seed: int = 0) -> RetinaNet:
    """detectron2's RetinaNet with the levels, anchors and classes of :class:`ToyDetector`.

    It has no layers below its head, whose kernels look at a cell alone, so that what lies in padded
    cells stays there.
    """
    toy = ToyDetector(channels)
    torch.manual_seed(seed)
    anchors = toy.anchor_generator.num_cell_anchors[0]
    classes = DENSE_CHANNELS // anchors
    head = RetinaNetHead(
        input_shape=list(toy.backbone.output_shape().values()),
        num_classes=classes,
        num_anchors=anchors,
        conv_dims=[channels],
    )
    for name, parameter in head.named_parameters():
        if name.endswith("weight"):
            centre = torch.zeros(3, 3)
            centre[1, 1] = 1.0
            parameter.data.normal_(std=0.5).mul_(centre)
        elif name.startswith("cls_score"):
            parameter.data.fill_(-1.0)
    model = RetinaNet(
        backbone=toy.backbone,
        head=head,
        head_in_features=list(STRIDES),
        anchor_generator=toy.anchor_generator,
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        num_classes=classes,
        pixel_mean=(0.0, 0.0, 0.0),
        pixel_std=(1.0, 1.0, 1.0),
    )
    return model.train()


def stage(level: str) -> str:
    """The toy backbone's stage below a level: it has the same values."""
    return level.replace("p", "res")


class Stages(Mapping):
    """Backbone stages that are the features of their levels, whatever these are set to."""

    def __init__(self, features):
        self.features = features

    def __getitem__(self, name):
        return self.features[name.replace("res", "p")]

    def __iter__(self):
        return map(stage, self.features)

    def __len__(self):
        return len(self.features)


register_detector(
    "ToyDetector",
    taps={"features": TapSpec("backbone"), "bottom_up": TapSpec("backbone.bottom_up")},
    class_key="MODEL.RETINANET.NUM_CLASSES",
)


def toy_info(
    channels: int = CHANNELS, cfg=None, taps=("features", "dense", "bottom_up"), model=None
):
    """One side of a pair of toy detectors."""
    model = ToyDetector(channels) if model is None else model
    shapes = model.backbone.output_shape()
    return ModelInfo(model=model, shapes=shapes, taps=frozenset(taps), cfg=cfg)


def head_cfg(name: str, common=None, **node):
    """A config with keys of KD.<HEAD> (``node``) and of KD (``common``) set."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.KD.HEADS = (name,)
    cfg.KD.merge_from_other_cfg(type(cfg)({name.upper(): node, **(common or {})}))
    return cfg


def instances(size, boxes: torch.Tensor, classes=None) -> Instances:
    result = Instances(size)
    result.gt_boxes = Boxes(boxes)
    result.gt_classes = torch.zeros(len(boxes), dtype=torch.long) if classes is None else classes
    return result


def make_context(
    sizes=((40, 56), (64, 33)),
    canvas=(64, 64),
    channels=(CHANNELS, CHANNELS),
    boxes: int = 3,
    dtype=torch.float32,
    same: bool = False,
    seed: int = 0,
    teacher_scale: float = 1.0,
) -> DistillContext:
    """Random features of both sides, all of them leaves that ask for a gradient.

    Args:
        sizes: (height, width) of each image.
        canvas: (height, width) of the padded batch.
        channels: of the student's and the teacher's features.
        boxes: ground-truth boxes in each image.
        dtype: of the features.
        same: the teacher's values are the student's.
        seed: of everything.
        teacher_scale: side of the teacher's input in parts of the student's.
    """
    generator = torch.Generator().manual_seed(seed)

    def maps(number, scale=1.0):
        sides = [round(scale * x) for x in canvas]
        return {
            level: torch.randn(
                len(sizes), number, *(-(-x // stride) for x in sides), generator=generator
            ).to(dtype)
            for level, stride in STRIDES.items()
        }

    student, teacher = maps(channels[0]), maps(channels[1], teacher_scale)
    ours, theirs = maps(DENSE_CHANNELS), maps(DENSE_CHANNELS, teacher_scale)
    if same:
        teacher, theirs = ({k: v.clone() for k, v in x.items()} for x in (student, ours))
    for value in (v for x in (student, teacher, ours, theirs) for v in x.values()):
        value.requires_grad_()
    gt = [instances(tuple(s), random_boxes(boxes, *s, generator)) for s in sizes]
    return DistillContext(
        iteration=0,
        image_sizes=[tuple(s) for s in sizes],
        canvas=tuple(canvas),
        gt=gt,
        student_features=student,
        teacher_features=teacher,
        student_outputs={"dense": DenseOutputs(list(ours.values())), "bottom_up": Stages(student)},
        teacher_outputs={
            "dense": DenseOutputs(list(theirs.values())),
            "bottom_up": Stages(teacher),
        },
        strides=dict(STRIDES),
        teacher_scale=teacher_scale,
    )


def leaves(ctx: DistillContext) -> SimpleNamespace:
    """The context's tensors: per side a list of (level, tensor), features and dense outputs."""

    def side(features, outputs):
        dense = (zip(features, part, strict=True) for part in outputs["dense"].parts().values())
        return [*features.items(), *itertools.chain.from_iterable(dense)]

    return SimpleNamespace(
        student=side(ctx.student_features, ctx.student_outputs),
        teacher=side(ctx.teacher_features, ctx.teacher_outputs),
    )
