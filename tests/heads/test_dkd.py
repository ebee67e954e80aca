"""DKD on the regions of two-stage detectors: values, stages, and what it refuses."""

import functools

import kd_models
import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from kd_detectors import DETECTORS
from kd_regions import REGION_CLASSES, region_context, region_info, toy_rcnn
from kd_testing import CHANNELS, head_cfg
from modern_inputs import rows

from projects.kd.context import ModelInfo
from projects.kd.detectors import taps_for
from projects.kd.errors import ConfigError
from projects.kd.functional.dkd import dkd_loss
from projects.kd.heads import build_imitation_heads
from projects.kd.heads.region_logits import RegionLogits

RCNN = "GeneralizedRCNN"


@functools.cache
def detector(kind="Faster R-CNN", **overrides):
    """An outline: nothing is computed with it."""
    arch, changes = DETECTORS[kind]
    changes = {key.replace(".", "__"): value for key, value in changes.items()}
    with torch.device("meta"):
        cfg = kd_models.tiny_cfg(arch, **{**changes, **overrides, "MODEL__DEVICE": "meta"})
        return kd_models.build(cfg)


def info(model):
    shapes = model.backbone.output_shape()
    return ModelInfo(model=model, shapes=shapes, taps=frozenset(taps_for(model)))


def build(student=None, teacher=None, **node):
    cfg = kd_models.tiny_cfg(RCNN, KD__HEADS=("DKD",))
    cfg.KD.DKD.merge_from_other_cfg(type(cfg)(node))
    infos = (info(detector() if x is None else x) for x in (student, teacher))
    return build_imitation_heads(cfg, *infos)["DKD"]


@pytest.mark.parametrize(("temperature", "golden"), [(1.0, 0.74120075), (4.0, 0.91201534)])
def test_golden_numbers_through_the_head(monkeypatch, temperature, golden):
    student, teacher, classes = rows()
    monkeypatch.setattr(RegionLogits, "read", lambda self, ctx: [(student, teacher, classes)])
    head = build(WEIGHT=2.0, TEMPERATURE=temperature)
    assert head(None)["loss_kd_dkd"].item() == pytest.approx(2 * golden, abs=2e-8)


def test_stages_are_averaged(monkeypatch):
    student, teacher, classes = rows()
    stages = [(student, teacher, classes), (teacher, student, classes)]
    monkeypatch.setattr(RegionLogits, "read", lambda self, ctx: stages)
    expected = (dkd_loss(*stages[0]) + dkd_loss(*stages[1])) / 2
    torch.testing.assert_close(build()(None)["loss_kd_dkd"], expected)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Teachers by kind, written when first asked for."""
    folder, found = tmp_path_factory.mktemp("teachers"), {}

    def of(kind):
        if kind not in found:
            (folder / kind).mkdir()
            arch, changes = DETECTORS[kind]
            changes = {key.replace(".", "__"): value for key, value in changes.items()}
            cfg = kd_models.tiny_cfg(arch, **changes)
            found[kind] = kd_models.write_teacher(folder / kind, cfg)
        return found[kind]

    return of


def wrapper(written, student="Faster R-CNN", teacher="Faster R-CNN", **overrides):
    arch, changes = DETECTORS[student]
    changes = {key.replace(".", "__"): value for key, value in changes.items()}
    overrides = {**changes, **overrides}
    return kd_models.build_wrapper(
        kd_models.distill_cfg(written(teacher), arch, ("DKD",), **overrides)
    )


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_teachers_logits_are_those_of_the_students_regions(scale):
    """Of a teacher that sees the image at twice the size, on regions of twice the size."""
    student, teacher = toy_rcnn(), toy_rcnn(CHANNELS + 2, seed=1)
    ctx = region_context(student, teacher, teacher_scale=scale)
    regions = ctx.student_outputs["sampled_proposals"]
    cfg = head_cfg("DKD", {"TEACHER": {"INPUT_SCALE": scale}}, WEIGHT=2.0)
    head = build_imitation_heads(cfg, region_info(student), region_info(teacher))["DKD"]
    loss = head(ctx)["loss_kd_dkd"]
    with torch.no_grad():
        heads, maps = teacher.roi_heads, list(ctx.teacher_features.values())
        boxes = [Boxes(scale * x.proposal_boxes.tensor) for x in regions]
        expected, _ = heads.box_predictor(heads.box_head(heads.box_pooler(maps, boxes)))
    logits, _ = ctx.student_outputs["box"]
    classes = torch.cat([x.gt_classes for x in regions])
    torch.testing.assert_close(loss, 2 * dkd_loss(logits, expected, classes))
    loss.backward()
    assert logits.grad.any() and all(p.grad is None for p in teacher.parameters())
    assert all(x.grad is None for x in ctx.teacher_features.values())


def test_equal_detectors_give_zero():
    student = toy_rcnn()
    ctx = region_context(student, student, same=True)
    head = build_imitation_heads(head_cfg("DKD"), *[region_info(student)] * 2)["DKD"]
    ((_, target, _),) = head.regions.read(ctx)
    assert head(ctx)["loss_kd_dkd"] > 0.01
    ctx.student_outputs["box"] = (target.requires_grad_(), None)
    assert head(ctx)["loss_kd_dkd"].item() == pytest.approx(0, abs=1e-7)


def test_half_precision_features_and_images_without_boxes():
    student, teacher = toy_rcnn(), toy_rcnn(seed=1)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        ctx = region_context(student, teacher, boxes=0, dtype=dtype)
        for image in ctx.student_outputs["sampled_proposals"]:
            image.gt_classes.fill_(REGION_CLASSES)
        head = build_imitation_heads(head_cfg("DKD"), *map(region_info, (student, teacher)))["DKD"]
        losses.append(head(ctx)["loss_kd_dkd"])
        assert losses[-1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=0.05, atol=1e-3)


def test_every_stage_of_a_cascade_and_gradients_in_the_class_branch_alone(written):
    model = wrapper(written, "Cascade R-CNN", "Cascade R-CNN")
    with EventStorage():
        ctx, _ = model.observe(kd_models.make_batch())
        stages = model.heads["DKD"].regions.read(ctx)
        loss = model.heads["DKD"](ctx)["loss_kd_dkd"]
    assert len(stages) == 3
    loss.backward()
    for own in model.student.roi_heads.box_predictor:
        assert own.cls_score.weight.grad.any() and own.bbox_pred.weight.grad is None
    assert model.student.proposal_generator.rpn_head.conv.weight.grad is None
    assert model.student.backbone.fpn_output2.weight.grad.any()
    assert all(p.grad is None for p in model.teacher.model.parameters())


def test_of_a_cascade_teacher_a_plain_student_learns_from_the_first_stage(written):
    model = wrapper(written, "Faster R-CNN", "Cascade R-CNN")
    ran = []
    for place, head in enumerate(model.teacher.model.roi_heads.box_head):
        head.register_forward_hook(lambda *args, k=place: ran.append(k))
    losses = kd_models.losses_at(model, kd_models.make_batch())
    assert ran == [0] and losses["loss_kd_dkd"] > 0


def test_a_step_without_regions_gives_zero():
    student = toy_rcnn()
    ctx = region_context(student, student, count=0)
    loss = build_imitation_heads(head_cfg("DKD"), *[region_info(student)] * 2)["DKD"](ctx)
    sum(loss.values()).backward()
    assert loss["loss_kd_dkd"].item() == 0.0 and ctx.student_outputs["box"][0].grad is not None


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"ALPHA": -1.0}, "KD.DKD.ALPHA is -1, it must not be negative"),
        ({"BETA": -0.5}, "KD.DKD.BETA is -0.5"),
        ({"TEMPERATURE": 0.0}, "KD.DKD.TEMPERATURE is 0, it must be positive"),
        ({"LEVELS": ("p3",)}, "KD.DKD.LEVELS: regions are compared"),
        ({"MASK_PADDING": False}, "KD.DKD.MASK_PADDING: regions have no padding"),
    ],
)
def test_wrong_keys(node, words):
    with pytest.raises(ConfigError, match=words):
        build(**node)


def test_other_detectors_classes_and_classifiers_are_refused():
    with pytest.raises(
        ConfigError, match="KD.HEADS: DKD compares the classes of regions; .*Retina"
    ):
        build(student=detector("RetinaNet"))
    with pytest.raises(ConfigError, match="the teacher RetinaNet has no box head"):
        build(teacher=detector("RetinaNet"))
    with pytest.raises(ConfigError, match="KD.DKD: the student has 3 classes and the teacher 5"):
        build(teacher=detector(MODEL__ROI_HEADS__NUM_CLASSES=5))
    with pytest.raises(ConfigError, match="USE_SIGMOID_CE"):
        build(teacher=detector(MODEL__ROI_BOX_HEAD__USE_SIGMOID_CE=True))
    with pytest.raises(ConfigError, match="3 box heads and the teacher 1"):
        build(student=detector("Cascade R-CNN"))
