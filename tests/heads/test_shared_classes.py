"""Heads on class outputs with a teacher that knows some of the student's classes, and others.

The oracle is a student that never had the classes which the teacher lacks.
"""

from __future__ import annotations

import copy
import dataclasses

import kd_models
import pytest
import torch
from dense_toys import toy_fcos, toy_gfl
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from kd_detr import CHANNELS as DETR_CHANNELS
from kd_detr import detr_context, info, toy_detr
from kd_regions import REGION_CLASSES, region_context, region_info, toy_rcnn
from kd_testing import CHANNELS, head_cfg, toy_info, toy_retinanet
from prediction_contract import prediction_context
from segmentation import label_batch, segmentor_cfg

from projects.kd.engine.inherit import inherit
from projects.kd.errors import ConfigError
from projects.kd.functional.dist import relation_losses
from projects.kd.functional.dkd import dkd_loss
from projects.kd.functional.pi import pi_loss
from projects.kd.heads import build_imitation_heads
from projects.kd.modeling.class_layers import choose_classes
from projects.kd.predict import predictor_for
from projects.kd.predict.rcnn import RegionLabels, RegionPredictions
from projects.kd.shared_classes import ALL, SharedClasses

DENSE = ("OutputKD", "BCKD", "CrossKD", "DIST", "CWD", "PI")


# --- from a config: superset, another order, all in order ----------------------------------------


def rows_of_retinanet(state: dict, chosen: list[int], total: int) -> dict:
    """A RetinaNet's weights with some of its classes, one row after another (one anchor)."""
    cut = dict(state)
    for name in ("head.cls_score.weight", "head.cls_score.bias"):
        assert len(state[name]) == total
        cut[name] = torch.stack([state[name][k] for k in chosen])
    return cut


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A teacher of six classes and the same with classes 4, 2 and 5 alone, as files."""
    found = {}
    whole = kd_models.build(kd_models.tiny_cfg(MODEL__RETINANET__NUM_CLASSES=6), seed=1)
    for name, chosen in (("six", list(range(6))), ("three", [4, 2, 5])):
        cfg = kd_models.tiny_cfg(MODEL__RETINANET__NUM_CLASSES=len(chosen))
        model = kd_models.build(cfg)
        model.load_state_dict(rows_of_retinanet(whole.state_dict(), chosen, 6))
        cfg.DATASETS.TRAIN = ()  # pairs of numbers need no names
        folder = tmp_path_factory.mktemp(name)
        found[name] = kd_models.write_teacher(folder, cfg, model)
    return found


def wrapper_of(teacher, class_map, heads=DENSE):
    targets = {f"KD__{head.upper()}__TARGET": "dense" for head in ("CWD", "PI") if head in heads}
    cfg = kd_models.distill_cfg(
        teacher, heads=heads, KD__TEACHER__CLASS_MAP=class_map, DATASETS__TRAIN=(), **targets
    )
    return kd_models.build_wrapper(cfg)


def test_a_teacher_of_more_classes_is_the_teacher_without_the_others(teachers):
    batch = kd_models.make_batch(sizes=((64, 64),))
    mapped = wrapper_of(teachers["six"], [[2, 5], [0, 4], [1, 2]])
    found = kd_models.losses_at(mapped, batch)
    expected = kd_models.losses_at(wrapper_of(teachers["three"], []), batch)
    assert len([x for x in found if x.startswith("loss_kd_")]) == 10
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}
    # inheriting copies the rows of the student's classes
    inherit(mapped.student, mapped.teacher.model, ("head.",))
    reduced = torch.load(teachers["three"][1])["model"]
    assert torch.equal(mapped.student.head.cls_score.weight, reduced["head.cls_score.weight"])


def test_a_map_of_all_classes_in_order_changes_no_bit(teachers):
    batch = kd_models.make_batch(sizes=((64, 64),))
    losses = []
    for class_map in ([], [[0, 0], [1, 1], [2, 2]]):
        model = wrapper_of(teachers["three"], class_map)
        assert model.teacher.shared.get("thing_classes", ALL).known is None
        losses.append(kd_models.losses_at(model, batch))
    assert all(torch.equal(losses[0][k], losses[1][k]) for k in losses[0])
    kept = torch.load(teachers["three"][1])["model"]
    assert all(torch.equal(x, kept[k]) for k, x in model.teacher.model.state_dict().items())


def test_without_a_map_other_numbers_are_refused(teachers):
    with pytest.raises(ConfigError, match=r"3 classes and the teacher 6; .*KD.TEACHER.CLASS_MAP"):
        wrapper_of(teachers["six"], [], heads=("BCKD",))


# --- dense heads and classes that the teacher lacks ----------------------------------------------


TOYS = {"RetinaNet": (toy_retinanet, (1,)), "FCOS": (toy_fcos, (1, 4, 6)), "GFL": (toy_gfl, (0, 5))}


def known_only(maps, shared, anchors):
    """(N, A * K, H, W) to (N, A * K', H, W), channel by channel."""
    columns = [a * shared.total + k for a in range(anchors) for k in shared.known]
    return [x[:, columns].detach().clone().requires_grad_() for x in maps]


def dense_case(toy, known):
    """Sides and context of a student of K classes; and of one that has the shared ones alone."""
    student = toy(CHANNELS)
    total = student.num_classes
    shared = SharedClasses(known, total)
    anchors = student.anchor_generator.num_cell_anchors[0]
    ctx = prediction_context(toy=toy)
    for n, instances in enumerate(ctx.gt):
        instances.gt_classes = (torch.arange(len(instances)) + n) % total
    teacher = ctx.teacher.model
    choose_classes(teacher, {"thing_classes": known})
    theirs = ctx.teacher_outputs["dense"]
    theirs = dataclasses.replace(theirs, logits=known_only(theirs.logits, shared, anchors))
    ctx.teacher_outputs["dense"] = theirs
    reduced = copy.copy(ctx)
    reduced.student = copy.deepcopy(ctx.student)
    choose_classes(reduced.student, {"thing_classes": known})
    ours = ctx.student_outputs["dense"]
    reduced.student_outputs = dict(ctx.student_outputs)
    own = dataclasses.replace(ours, logits=known_only(ours.logits, shared, anchors))
    reduced.student_outputs["dense"] = own
    kept = [x[torch.tensor([k in known for k in x.gt_classes.tolist()])] for x in ctx.gt]
    assert 0 < sum(map(len, kept)) < sum(map(len, ctx.gt))
    reduced.gt = kept

    def assign(ctx_of_reduced):
        """Labels of the student with all classes: those of the others are ignored."""
        full = predictor_for(ctx.student).assign(ctx)
        place = {k: known.index(k) for k in known} | {total: len(known), -1: -1}
        labels = [
            torch.tensor([place.get(k, -1) for k in x.tolist()], dtype=x.dtype) for x in full.labels
        ]
        candidates = tuple(
            type(c)(*(part[[k in known for k in x.gt_classes.tolist()]] for part in c))
            for c, x in zip(full.candidates, ctx.gt, strict=bool(full.candidates))
        )
        return dataclasses.replace(full, labels=labels, candidates=candidates)

    predictor_for(reduced.student).assign = assign
    return shared, ctx, reduced


def dense_losses(name, ctx, shared=None):
    node = {"TARGET": "dense"} if name in ("CWD", "PI") else {}
    infos = [toy_info(CHANNELS, model=model) for model in (ctx.student, ctx.teacher.model)]
    if shared is not None:
        infos[1] = dataclasses.replace(infos[1], shared={"thing_classes": shared})
    head = build_imitation_heads(head_cfg(name, **node), *infos)[name]
    if name == "CrossKD":  # its towers have one convolution: it crosses at the levels
        assert head.depth == 0
    with EventStorage():
        return head(ctx)


@pytest.mark.parametrize(
    ("arch", "name"),
    [(arch, name) for arch in TOYS for name in DENSE] + [("GFL", "LD")],
)
def test_dense_heads_leave_out_what_the_teacher_does_not_know(arch, name):
    toy, known = TOYS[arch]
    shared, ctx, reduced = dense_case(toy, known)
    found, expected = dense_losses(name, ctx, shared), dense_losses(name, reduced)
    assert found and found.keys() == expected.keys()
    for key in found:
        assert expected[key] > 0
        torch.testing.assert_close(found[key], expected[key])
    if name == "CrossKD":
        return
    logits = ctx.student_outputs["dense"].logits
    gradients = torch.autograd.grad(sum(found.values()), logits, allow_unused=True)
    anchors = ctx.student.anchor_generator.num_cell_anchors[0]
    split = [x.unflatten(1, (anchors, shared.total)) for x in gradients if x is not None]
    others = [k for k in range(shared.total) if k not in known]
    assert all(not x[:, :, others].any() for x in split)
    assert any(x[:, :, list(known)].any() for x in split)


# --- regions -------------------------------------------------------------------------------------


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
    from kd_detectors import detector_cfg, detector_distill_cfg, full_batch

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


# --- the pieces ----------------------------------------------------------------------------------


def test_choosing_and_widening_are_inverse():
    shared = SharedClasses((1, 3), 4)
    values = torch.randn(2, 3 * 4, 2, 2)
    chosen = shared.of_anchors(values)
    assert torch.equal(chosen, values[:, [1, 3, 5, 7, 9, 11]])
    assert torch.equal(shared.of_anchors(shared.of_all_anchors(chosen)), chosen)
    assert not shared.of_all_anchors(chosen)[:, ::2].any()
    classes = torch.tensor([0, 1, 2, 3, 4])
    assert shared.lacking(classes).tolist() == [True, False, True, False, False]
    assert not shared.lacking(torch.tensor([-1]))
    assert shared.places(classes)[[1, 3, 4]].tolist() == [0, 1, 2]
    assert shared.own(torch.tensor([1, 0])).tolist() == [3, 1]
    kept, rows = shared.regions(classes, torch.arange(5))
    assert kept.tolist() == [0, 1, 2] and rows.tolist() == [1, 3, 4]
    probability = torch.randn(3, 5)
    softmax = probability.softmax(1)[:, [1, 3, 4]]
    torch.testing.assert_close(
        shared.with_background(probability).softmax(1), softmax / softmax.sum(1, keepdim=True)
    )
    for given in (values, classes):
        assert ALL.of_anchors(given) is ALL.logits(given, 0) is ALL.places(given) is given


def test_an_assistant_behind_the_teachers_head_needs_all_classes():
    student, teacher = toy_retinanet(), toy_retinanet()
    choose_classes(teacher, {"thing_classes": [1]})
    shared = {"thing_classes": SharedClasses((1,), 2)}
    infos = toy_info(model=student), dataclasses.replace(toy_info(model=teacher), shared=shared)
    with pytest.raises(ConfigError, match=r"KD.CSA.HEAD 'teacher': .*KD.TEACHER.CLASS_MAP"):
        build_imitation_heads(head_cfg("CSA", HEAD="teacher", DIM=8, HEADS=4), *infos)


def test_detections_of_a_mapped_teacher_have_the_students_numbers(teachers):
    from projects.kd.commands.evaluate.teacher import in_students_numbers

    model = wrapper_of(teachers["six"], [[2, 5], [0, 4]], heads=("BCKD",))
    batch = kd_models.make_batch(sizes=((64, 64),))
    with torch.no_grad():
        before = model.teacher.model(batch)[0]["instances"]
        in_students_numbers(model.teacher)
        after: Instances = model.teacher.model(batch)[0]["instances"]
    assert set(before.pred_classes.tolist()) == {0, 1}
    assert after.pred_classes.tolist() == [(0, 2)[k] for k in before.pred_classes.tolist()]
