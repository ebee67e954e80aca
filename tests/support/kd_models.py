"""Tiny detectors, their config files, and batches: what the tests of the core share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from projects.kd import add_kd_config, build_training_model
from projects.kd.levels import scaled_size

CLASSES = 3

_SHARED = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.PIXEL_STD": [57.0, 57.0, 57.0],
    "MODEL.FPN.OUT_CHANNELS": 16,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "SOLVER.CHANNELS_LAST": False,  # as detectron2's own detectors, for comparisons to the bit
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.01,
    "DATASETS.TRAIN": ("shapes_train",),
    "DATASETS.TEST": ("shapes_val",),
    "DATALOADER.NUM_WORKERS": 0,
}
_ARCHS = {
    "RetinaNet": {
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]],
        "MODEL.RETINANET.NUM_CLASSES": CLASSES,
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    },
    "GeneralizedRCNN": {
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.PROPOSAL_GENERATOR.NAME": "RPN",
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]],
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.NUM_CLASSES": CLASSES,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    },
    "ConditionalDETR": {
        "MODEL.META_ARCHITECTURE": "ConditionalDETR",
        "MODEL.BACKBONE.NAME": "build_detr_resnet_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res4"],
        "MODEL.CONDITIONAL_DETR.IN_FEATURE": "res4",
        "MODEL.CONDITIONAL_DETR.NUM_CLASSES": CLASSES,
        "MODEL.CONDITIONAL_DETR.NUM_QUERIES": 12,
        "MODEL.CONDITIONAL_DETR.HIDDEN_DIM": 16,
        "MODEL.CONDITIONAL_DETR.NHEADS": 4,
        "MODEL.CONDITIONAL_DETR.DIM_FEEDFORWARD": 24,
        "MODEL.CONDITIONAL_DETR.DROPOUT": 0.0,
        "MODEL.CONDITIONAL_DETR.ENC_LAYERS": 1,
        "MODEL.CONDITIONAL_DETR.DEC_LAYERS": 3,
    },
}


def tiny_cfg(arch: str = "RetinaNet", **overrides):
    """A config of a small detector; overrides are written ``MODEL__WEIGHTS="..."``."""
    cfg = get_cfg()
    add_kd_config(cfg)
    values = {**_SHARED, **_ARCHS[arch]}
    values.update({key.replace("__", "."): value for key, value in overrides.items()})
    cfg.merge_from_list([part for pair in values.items() for part in pair])
    return cfg


def build(cfg, seed: int = 0):
    """The plain detector of a config with random weights."""
    torch.manual_seed(seed)
    return build_model(cfg)


def write_config(cfg, path) -> str:
    path.write_text(cfg.dump())
    return str(path)


def write_teacher(folder, cfg=None, model=None, seed: int = 1) -> tuple[str, str]:
    """Save a teacher's config and its weights; returns the two paths."""
    cfg = tiny_cfg() if cfg is None else cfg
    model = build(cfg, seed) if model is None else model
    weights = folder / "teacher.pth"
    torch.save({"model": model.state_dict()}, weights)
    return write_config(cfg, folder / "teacher.yaml"), str(weights)


def distill_cfg(teacher: tuple[str, str], arch: str = "RetinaNet", heads=("Mimic",), **overrides):
    """The config of a tiny student that learns from a saved teacher."""
    return tiny_cfg(
        arch,
        **{
            "KD__META_ARCHITECTURE": "DistillMetaArch",
            "KD__HEADS": tuple(heads),
            "KD__TEACHER__CONFIG_FILE": teacher[0],
            "KD__TEACHER__WEIGHTS": teacher[1],
            **overrides,
        },
    )


def build_wrapper(cfg, seed: int = 2):
    """The training model of a config, in training mode."""
    torch.manual_seed(seed)
    return build_training_model(cfg).train()


def make_batch(
    sizes=((64, 96), (96, 64)), boxes: int = 2, seed: int = 0, teacher_scale: float = 1.0
) -> list[dict]:
    """Random images of (height, width) with ground-truth boxes XYXY in their pixels."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for height, width in sizes:
        corner = torch.rand(boxes, 2, generator=generator) * torch.tensor([width, height]) * 0.5
        side = (torch.rand(boxes, 2, generator=generator) * 0.3 + 0.15) * min(height, width)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + side], dim=1))
        instances.gt_classes = torch.randint(CLASSES, (boxes,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
        if teacher_scale != 1:
            size = scaled_size((height, width), teacher_scale)
            batch[-1]["image_teacher"] = F.interpolate(image[None], size=size)[0]
    return batch


def losses_at(model, batch, iteration: int = 0) -> dict:
    """Losses of a training model as the training loop would see them in an iteration."""
    with EventStorage(iteration):
        return model(batch)


def train_steps(model, batch, steps: int = 2, lr: float = 0.01) -> None:
    """Plain SGD steps on one batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    with EventStorage(0) as storage:
        for _ in range(steps):
            optimizer.zero_grad()
            sum(model(batch).values()).backward()
            optimizer.step()
            storage.step()
