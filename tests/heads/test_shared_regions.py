"""Heads on regions, decoders, masks and label maps with a teacher that knows other classes.

The oracle is a student that never had the classes which the teacher lacks.
"""

from __future__ import annotations

import copy
import dataclasses

import kd_models
import pytest
import torch
from detectron2.utils.events import EventStorage
from kd_detectors import detector_cfg, detector_distill_cfg, full_batch
from kd_detr import CHANNELS as DETR_CHANNELS
from kd_detr import detr_context, info, toy_detr
from kd_regions import REGION_CLASSES, region_context, region_info, toy_rcnn
from kd_testing import head_cfg
from segmentation import label_batch, segmentor_cfg

from projects.kd.functional.dist import relation_losses
from projects.kd.functional.dkd import dkd_loss
from projects.kd.functional.pi import pi_loss
from projects.kd.heads import build_imitation_heads
from projects.kd.modeling.class_layers import choose_classes
from projects.kd.predict import predictor_for
from projects.kd.predict.rcnn import RegionLabels, RegionPredictions
from projects.kd.shared_classes import SharedClasses

KNOWN = (0, 2)


def region_sides():
    student, teacher = toy_rcnn(), toy_rcnn(seed=1)
    choose_classes(teacher, {"thing_classes": KNOWN})
    shared = SharedClasses(KNOWN, REGION_CLASSES)
    return student, teacher, shared


def region_oracle(ctx, teacher, head):
    """Logits of both sides by rows and columns, and classes in [0, K']."""
    features = {own: ctx.teacher_features[x] for own, x in head.regions.teacher_levels.items()}
    stages = [ctx.student_outputs["sampled_proposals"]]
    with torch.no_grad():
        ((target, _),) = predictor_for(teacher).predict_regions(features, stages)
    classes = torch.cat([x.gt_classes for x in stages[0]]).tolist()
    place = {0: 0, 2: 1, REGION_CLASSES: 2}
    rows = [row for row, k in enumerate(classes) if k in place]
    assert 0 < len(rows) < len(classes)
    logits = ctx.student_outputs["box"][0][rows][:, [0, 2, REGION_CLASSES]]
    return logits, target[rows], torch.tensor([place[classes[row]] for row in rows])


@pytest.mark.parametrize("name", ["DKD", "DIST"])
def test_region_heads_compare_shared_classes_and_background(name):
    student, teacher, shared = region_sides()
    ctx = region_context(student, teacher, count=12)
    theirs = dataclasses.replace(region_info(teacher), shared={"thing_classes": shared})
    head = build_imitation_heads(head_cfg(name), region_info(student), theirs)[name]
    found = head(ctx)
    logits, target, classes = region_oracle(ctx, teacher, head)
    if name == "DKD":
        expected = [dkd_loss(logits, target, classes, 1.0, 0.25, 1.0)]
    else:
        expected = relation_losses(logits.softmax(1), target.softmax(1))
    for own, other in zip(found.values(), expected, strict=True):
        assert other > 0
        torch.testing.assert_close(own, other)
    (gradient,) = torch.autograd.grad(sum(found.values()), ctx.student_outputs["box"][0])
    assert not gradient[:, 1].any() and gradient[:, [0, 2, 3]].any()


def test_region_pairs_take_each_sides_own_boxes():
    """Boxes of the class that the teacher finds most likely, of its own and of the student's."""
    student, teacher, shared = region_sides()
    ctx = region_context(student, teacher, count=12)
    regions = ctx.student_outputs["sampled_proposals"]
    classes = torch.cat([x.gt_classes for x in regions])
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        (
            torch.randn(len(classes), k + 1, generator=generator),
            torch.randn(len(classes), 4 * k, generator=generator),
        )
        for k in (REGION_CLASSES, len(KNOWN))
    )
    predictor = predictor_for(student)
    assigned = RegionLabels([], [], [], [regions])
    sides = [RegionPredictions(None, [side]) for side in (ours, theirs)]
    options = {"levels": (), "masks": {}, "shared": shared}
    (pair,) = predictor.pairs(*sides, assigned, **options).regions
    rows = [row for row, k in enumerate(classes.tolist()) if k != 1]
    best = theirs[0][rows][:, :2].argmax(1).tolist()
    for at, (row, k) in enumerate(zip(rows, best, strict=True)):
        own = KNOWN[k]
        assert torch.equal(pair.student_deltas[at], ours[1][row, 4 * own : 4 * own + 4])
        assert torch.equal(pair.target_deltas[at], theirs[1][row, 4 * k : 4 * k + 4])
        assert torch.equal(pair.student_logits[at], ours[0][row, [0, 2, 3]])
        assert torch.equal(pair.target_logits[at], theirs[0][row])
    place = {0: 0, 2: 1, 3: 2}
    assert pair.classes.tolist() == [place[classes[row].item()] for row in rows]
    assert pair.foreground.tolist() == [classes[row].item() != 3 for row in rows]


# --- decoders, masks, label maps -----------------------------------------------------------------


@pytest.mark.parametrize("form", ["d3etr", "kd_detr"])
def test_decoders_compare_shared_classes(form):
    student, teacher = toy_detr(), toy_detr(seed=1)
    total = student.num_classes
    known = (0, 2)
    choose_classes(teacher, {"thing_classes": known})
    reduced = copy.deepcopy(student)
    choose_classes(reduced, {"thing_classes": known})
    shared = {"thing_classes": SharedClasses(known, total)}
    node = {"FIXED": False, "PRED_FORM": form}
    found = {}
    for key, model, classes in (("all", student, shared), ("few", reduced, {})):
        infos = info(model), dataclasses.replace(info(teacher), shared=classes)
        head = build_imitation_heads(head_cfg("D3ETR", **node), *infos)["D3ETR"]
        found[key] = head(detr_context(model, teacher))
    for key, loss in found["few"].items():
        assert loss > 0
        torch.testing.assert_close(found["all"][key], loss)
    gradient = torch.autograd.grad(found["all"]["loss_kd_d3etr_pred"], student.class_embed.weight)
    assert not gradient[0][1].any() and gradient[0][[0, 2]].any()


def test_a_decoder_assigns_objects_of_other_classes_by_their_boxes():
    student, teacher = toy_detr(DETR_CHANNELS), toy_detr(DETR_CHANNELS, seed=1)
    known = (0, 2)
    choose_classes(teacher, {"thing_classes": known})
    shared = SharedClasses(known, student.num_classes)
    infos = info(student), dataclasses.replace(info(teacher), shared={"thing_classes": shared})
    head = build_imitation_heads(head_cfg("D3ETR"), *infos)["D3ETR"]
    ctx = detr_context(student, teacher)
    costs = []
    original = student.criterion.costs
    student.criterion.costs = lambda *args: costs.append(original(*args)) or costs[-1]
    losses = head(ctx)
    assert losses["loss_kd_d3etr_aux"].isfinite()
    for cost, one in zip(costs[-1], ctx.gt, strict=True):
        kinds = one.gt_classes
        assert (kinds == 1).any()
        # without the class part, which is the same for all queries
        logits, boxes = ctx.teacher_outputs["decoded"].logits, ctx.teacher_outputs["decoded"].boxes
        assert cost.shape[-1] == len(one) and logits.shape[-1] == 2 and boxes.shape[-1] == 4


def test_masks_are_those_of_the_regions_own_class(tmp_path):
    whole = kd_models.build(detector_cfg("Mask R-CNN"), seed=1)
    cfg = detector_cfg("Mask R-CNN")
    cfg.DATASETS.TRAIN = ()
    files = kd_models.write_teacher(tmp_path, cfg, whole)
    cfg = detector_distill_cfg(
        "Mask R-CNN",
        files,
        ("CWD",),
        KD__CWD__TARGET="masks",
        KD__TEACHER__CLASS_MAP=[[0, 2], [2, 1]],
        DATASETS__TRAIN=(),
    )
    model = kd_models.build_wrapper(cfg)
    batch = full_batch(sizes=((64, 64), (64, 64)), boxes=3)
    with EventStorage():
        ctx, _ = model.observe(batch)
        roi = model.heads["CWD"].roi
        student, teacher = roi.read(ctx)
    classes = torch.cat([x.gt_classes for x in roi.regions(ctx)]).tolist()
    rows = [row for row, k in enumerate(classes) if k != 1]
    assert 0 < len(rows) < len(classes) and student.shape == teacher.shape
    # all masks of the teacher before its classes were chosen
    ctx.teacher.model.roi_heads.mask_head = whole.eval().roi_heads.mask_head
    every = roi._teacher(ctx, roi.regions(ctx))
    for at, row in enumerate(rows):
        own = ctx.student_outputs["mask_logits"][row, classes[row]]
        torch.testing.assert_close(student[at, 0], own)
        torch.testing.assert_close(teacher[at, 0], every[row, {0: 2, 2: 1}[classes[row]]])


def test_label_maps_are_compared_in_the_shared_classes(tmp_path):
    cfg = segmentor_cfg()
    cfg.DATASETS.TRAIN = ()
    files = kd_models.write_teacher(tmp_path, cfg, kd_models.build(cfg, seed=1))
    cfg = segmentor_cfg(
        KD__META_ARCHITECTURE="DistillMetaArch",
        KD__HEADS=("PI",),
        KD__TEACHER__CONFIG_FILE=files[0],
        KD__TEACHER__WEIGHTS=files[1],
        KD__TEACHER__CLASS_MAP=[[0, 1], [2, 0]],
        KD__PI__WEIGHT=1.0,
        DATASETS__TRAIN=(),
    )
    model = kd_models.build_wrapper(cfg)
    with EventStorage():
        ctx, _ = model.observe(label_batch(sizes=((64, 64), (64, 64))))
        loss = model.heads["PI"](ctx)["loss_kd_pi"]
    ours, theirs = ctx.student_outputs["sem_seg"], ctx.teacher_outputs["sem_seg"]
    assert theirs.shape[1] == 2 < ours.shape[1]
    torch.testing.assert_close(loss, pi_loss(ours[:, [0, 2]], theirs))
