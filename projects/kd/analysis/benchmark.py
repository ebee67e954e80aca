"""A distillation step taken apart, for timing: see kd-benchmark."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, ImageList, pairwise_iou

from ..detectors import configured_classes, offers
from ..distiller import build_training_model
from ..engine.optim import build_optimizations
from ..foreign import foreign_scheme
from ..levels import scaled_size
from .measure import random_batch, settle_norms


def without_weights(cfg, device: str = "cpu"):
    """A distillation config, changed to random weights and a learning rate that moves nothing.

    A teacher of another library keeps its KD.TEACHER.WEIGHTS: an exported program is made of them.
    """
    node = cfg.KD.TEACHER
    lazy = node.CONFIG_FILE.endswith(".py")
    weights, no_weights = "", ["train.init_checkpoint" if lazy else "MODEL.WEIGHTS", ""]
    if foreign_scheme(node.CONFIG_FILE):
        weights, no_weights = node.WEIGHTS, []
    cfg.merge_from_list(
        ["MODEL.WEIGHTS", "", "KD.TEACHER.WEIGHTS", weights, "KD.TEACHER.ALLOW_MISSING", True]
        + ["KD.TEACHER.OPTS", [*cfg.KD.TEACHER.OPTS, *no_weights]]
        + ["MODEL.DEVICE", device, "SOLVER.BASE_LR", 1e-8]
    )
    return cfg


def noise_batch(cfg, size: tuple[int, int], boxes: int, images: int, teacher_scale: float = 1.0):
    """:func:`random_batch` for the student of a config, with the teacher's images at a scale."""
    number = configured_classes(cfg, cfg.MODEL.META_ARCHITECTURE)
    segments = offers(cfg.MODEL.META_ARCHITECTURE, "sem_seg")
    classes = 1 if number is None else number
    batch = random_batch(size, boxes, classes, images=images, label_maps=segments)
    for x in batch if teacher_scale != 1 else ():
        scaled = scaled_size(x["image"].shape[-2:], teacher_scale)
        x["image_teacher"] = F.interpolate(x["image"][None], size=scaled)[0]
    return batch


def settle_detector(detector, batch) -> None:
    """:func:`settle_norms` of a detector's backbone on a batch as it normalises and pads it."""
    mean, std = detector.pixel_mean, detector.pixel_std
    images = [(x["image"].to(mean.device) - mean) / std for x in batch]
    padded = ImageList.from_tensors(images, detector.backbone.size_divisibility).tensor
    settle_norms(detector.backbone, padded)


class Bench:
    """Student, teacher and some heads with random weights on one batch of noise.

    Needs detectron2's event storage around it, at an iteration at which nothing is logged.

    Args:
        cfg: a distillation config whose detectors load no weights, see :func:`without_weights`.
        heads: names of imitation heads, instead of KD.HEADS.
        image_size: (height, width) of each image.
        boxes: ground-truth boxes on each.
        images: in the batch.
    """

    def __init__(self, cfg, heads, image_size, boxes, images=1):
        self.cfg = cfg.clone()
        self.cfg.KD.HEADS = tuple(heads)
        self.cfg.KD.UNLABELED.DATASETS = ()  # every image has labels here
        torch.manual_seed(0)
        self.model = build_training_model(self.cfg).train()
        self.device = self.model.device
        self.batch = noise_batch(self.cfg, image_size, boxes, images, self.model.teacher_scale)
        for detector in (self.model.student, self.model.teacher.model):
            settle_detector(detector, self.batch)
        amp = self.cfg.SOLVER.AMP
        self.dtype = getattr(torch, amp.DTYPE) if amp.ENABLED else None
        self.ctx = self._observe()

    def autocast(self):
        """The precision of SOLVER.AMP."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    @torch.no_grad()
    def teacher(self):
        """The teacher's input and its forward pass, as far as the heads read it."""
        with self.autocast():
            canvas, form = self.ctx.canvas, self.model.image_format
            seen = [link.observe(self.batch, canvas, form) for link in self.model.links]
            return seen if len(seen) > 1 else seen[0]

    def step(self, model=None):
        """A function that trains ``model`` (the student alone by default) for one step.

        Forward, losses, backward, optimizer step. Its ``clear()`` frees the gradients.
        """
        model = self.model.student if model is None else model
        optimizers = [o.optimizer for o in build_optimizations(self.cfg, model).values()]

        def run():
            run.clear()
            with self.autocast():
                losses = model(self.batch)
            sum(losses.values()).backward()
            for optimizer in optimizers:
                optimizer.step()

        def clear():
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)

        run.clear = clear
        return run

    def second_pass(self, name):
        """A function: a head's second pass, forward and backward to its inputs; None without one.

        See :meth:`~projects.kd.heads.base.ImitationHead.second_pass`.
        """
        found = self.model.heads[name].second_pass(self.ctx.of_head(name))
        if found is None:
            return None
        forward, inputs = found[0], _tensors(found[1])

        def run():
            with self.autocast():
                outputs = _tensors(forward())
            torch.autograd.grad(sum(x.sum() for x in outputs), inputs, allow_unused=True)

        return run

    def base(self):
        """Teacher's forward pass and student step: what distillation cannot do without.

        And the second passes of the heads.
        """
        parts = [self.teacher, step := self.step()]
        parts += filter(None, map(self.second_pass, self.model.heads))

        def run():
            for part in parts:
                part()

        run.clear = step.clear
        return run

    def _observe(self):
        """What the heads see, cut off from the networks."""
        with self.autocast():
            ctx, _ = self.model.observe(self.batch)
        return dataclasses.replace(
            ctx,
            student_features=as_leaves(ctx.student_features),
            student_outputs=as_leaves(ctx.student_outputs),
        )

    def head(self, name):
        """A function that computes a head's losses and their gradient, at features and adapters."""
        head = self.model.heads[name]
        leaves = [p for p in head.parameters() if p.requires_grad]
        observed = _tensors((self.ctx.student_features, self.ctx.student_outputs))
        leaves += [x for x in observed if x.requires_grad]

        def run():
            ctx = dataclasses.replace(self.ctx, _masks={})
            torch.autograd.grad(sum(head(ctx.of_head(name)).values()), leaves, allow_unused=True)

        return run


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = value.values()
    return [x for part in value for x in _tensors(part)] if hasattr(value, "__iter__") else []


def as_leaves(value):
    """Detached tensors in the same nesting of dataclasses, dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **as_leaves(vars(value)))
    if isinstance(value, dict):
        return {key: as_leaves(x) for key, x in value.items()}
    return type(value)(as_leaves(x) for x in value) if type(value) in (list, tuple) else value


def loop_masks(head, ctx) -> list[torch.Tensor]:
    """FGFI's masks by the plain loop over boxes: what the head has to beat.

    Args:
        head: an FGFI head with detectron2's own anchors.
        ctx: of a step.

    Returns:
        (N, H, W) bool for each of ``head.levels``, in fp32 arithmetic.
    """
    features = [ctx.student_features[level] for level in head.anchor_levels]
    anchors = head.grid_anchors(features)
    lengths = [len(part) for part in anchors]
    everything = Boxes.cat(anchors)
    found = torch.zeros(len(ctx.gt), len(everything), dtype=torch.bool, device=everything.device)
    for image, instances in enumerate(ctx.gt):
        for box in instances.gt_boxes.tensor:
            iou = pairwise_iou(Boxes(box[None]), everything)[0]
            parts = iou.split(lengths) if head.per_level else [iou]
            found[image] |= torch.cat([x > head.psi * x.max() for x in parts])
    masks = {}
    for level, part, x in zip(head.anchor_levels, found.split(lengths, 1), features, strict=True):
        mask = part.view(len(ctx.gt), *x.shape[-2:], -1).any(3)
        masks[level] = mask & ctx.valid_mask(level)[:, 0] if head.mask_padding else mask
    return [masks[level] for level in head.levels]
