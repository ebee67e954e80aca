"""Every detector family as a tiny model, with batches that hold what it trains on."""

from __future__ import annotations

import torch
from detectron2.structures import Keypoints, PolygonMasks, pairwise_iou
from detectron2.utils.events import EventStorage
from kd_models import (
    CLASSES,
    build_wrapper,
    distill_cfg,
    losses_at,
    make_batch,
    tiny_cfg,
    train_steps,
)

KEYPOINTS = 4
STUFF = 4  # classes of the semantic branch

_FIVE_LEVELS = {
    "MODEL.BACKBONE.NAME": "build_fcos_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
}


def _dense(name: str) -> dict:
    node = f"MODEL.{name.upper()}"
    return {
        **_FIVE_LEVELS,
        "MODEL.META_ARCHITECTURE": name,
        f"{node}.NUM_CLASSES": CLASSES,
        f"{node}.NUM_CONVS": 1,
        f"{node}.NORM": "",
        f"{node}.SCORE_THRESH_TEST": 0.0,
    }


_CASCADE = {
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 40,
}
_MASK = {
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 7,
}
_KEYPOINT = {
    "MODEL.KEYPOINT_ON": True,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [16],
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": KEYPOINTS,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": 1,
    "TEST.KEYPOINT_OKS_SIGMAS": [0.05] * KEYPOINTS,
}
_SEMANTIC = {
    "MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": STUFF,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 16,
    "MODEL.SEM_SEG_HEAD.NORM": "",
}

# name: (config of kd_models it starts from, changes)
DETECTORS = {
    "RetinaNet": ("RetinaNet", {}),
    "FCOS": ("RetinaNet", _dense("FCOS")),
    "GFL": ("RetinaNet", _dense("GFL")),
    "RepPoints": ("RetinaNet", _dense("RepPoints")),
    "Faster R-CNN": ("GeneralizedRCNN", {}),
    "Cascade R-CNN": ("GeneralizedRCNN", _CASCADE),
    "Cascade Mask R-CNN": ("GeneralizedRCNN", {**_CASCADE, **_MASK}),
    "Mask R-CNN": ("GeneralizedRCNN", _MASK),
    "Keypoint R-CNN": ("GeneralizedRCNN", _KEYPOINT),
    "Panoptic FPN": (
        "GeneralizedRCNN",
        {**_MASK, **_SEMANTIC, "MODEL.META_ARCHITECTURE": "PanopticFPN"},
    ),
}


def every_branch_cfg():
    """An R-CNN with masks and keypoints."""
    keypoints = {key.replace(".", "__"): value for key, value in _KEYPOINT.items()}
    return detector_cfg("Mask R-CNN", **keypoints)


def detector_cfg(name: str, **overrides):
    """The config of a tiny detector of a family; overrides as in ``tiny_cfg``."""
    base, changes = DETECTORS[name]
    changes = {key.replace(".", "__"): value for key, value in changes.items()}
    return tiny_cfg(base, **{**changes, **overrides})


def detector_distill_cfg(name: str, teacher: tuple[str, str], heads, **overrides):
    """A tiny student of a family that learns from a saved teacher."""
    base, changes = DETECTORS[name]
    changes = {key.replace(".", "__"): value for key, value in changes.items()}
    return distill_cfg(teacher, base, heads, **{**changes, **overrides})


def full_batch(sizes=((64, 96), (96, 64)), boxes: int = 2, seed: int = 0, **options) -> list[dict]:
    """``make_batch`` with masks (the boxes as polygons), keypoints and a semantic map."""
    batch = make_batch(sizes, boxes, seed, **options)
    for example in batch:
        instances = example["instances"]
        polygons, points = [], []
        label = torch.zeros(example["image"].shape[1:], dtype=torch.long)
        truth = zip(instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist(), strict=True)
        for (x0, y0, x1, y1), kind in truth:
            polygons.append([torch.tensor([x0, y0, x1, y0, x1, y1, x0, y1]).numpy()])
            middle = (x0 + x1) / 2, (y0 + y1) / 2
            places = [(middle[0], y0 + 1), (x0 + 1, middle[1]), middle, (x1 - 1, middle[1])]
            points.append([[x, y, 2.0] for x, y in places])
            label[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = kind + 1
        instances.gt_masks = PolygonMasks(polygons)
        instances.gt_keypoints = Keypoints(torch.tensor(points).view(-1, KEYPOINTS, 3))
        example["sem_seg"] = label
    return batch


def overfit(model, batch, steps: int, lr: float = 2e-3) -> float:
    """Train on one batch; the mean over its objects of the best IoU among right, sure detections.

    Sure: as many detections as an image has objects.
    """
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr)
    with EventStorage(0) as storage:
        for _ in range(steps):
            optimizer.zero_grad()
            sum(model(batch).values()).backward()
            optimizer.step()
            storage.step()
    best = []
    with torch.no_grad():
        results = model.eval()(batch)
    for example, result in zip(batch, results, strict=True):
        truth = example["instances"]
        found = result["instances"]
        found = found[found.scores.topk(min(len(truth), len(found))).indices]
        overlap = pairwise_iou(truth.gt_boxes, found.pred_boxes)
        overlap *= truth.gt_classes[:, None] == found.pred_classes[None]
        best += overlap.amax(1).tolist()
    return sum(best) / len(best)


def trained_on_predictions(detector, teacher, head):
    """Losses of a late step with OutputKD or CSA: all, and the head's own; then two steps."""
    model = build_wrapper(detector_distill_cfg(detector, teacher, (head,)))
    batch = full_batch()
    losses = losses_at(model, batch, iteration=10**5)
    train_steps(model, batch, steps=2, lr=1e-3)
    own = [v for k, v in losses.items() if k.startswith(f"loss_kd_{head.lower()}")]
    return list(losses.values()), own
