"""DKD on the regions of two-stage detectors: values, stages, and what it refuses."""

import functools
from types import SimpleNamespace

import kd_models
import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from kd_detectors import DETECTORS
from modern_inputs import rows

from projects.kd.context import ModelInfo
from projects.kd.detectors import taps_for
from projects.kd.errors import ConfigError
from projects.kd.functional.dkd import dkd_loss
from projects.kd.heads import build_imitation_heads
from projects.kd.heads.region_logits import RegionLogits

RCNN = "GeneralizedRCNN"


@functools.cache
def detector(kind="Faster R-CNN", device="meta", **overrides):
    """An outline: nothing is computed with it, unless ``device`` says so."""
    arch, changes = DETECTORS[kind]
    changes = {key.replace(".", "__"): value for key, value in changes.items()}
    with torch.device(device):
        cfg = kd_models.tiny_cfg(arch, **{**changes, **overrides, "MODEL__DEVICE": device})
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


@pytest.mark.parametrize("kind", ["Faster R-CNN", "Cascade R-CNN"])
def test_the_teachers_logits_are_those_of_the_students_regions(written, kind):
    """And the gradient is in the class branch and below, never in boxes or in the teacher."""
    model = wrapper(written, kind, kind)
    batch = kd_models.make_batch()
    with EventStorage():
        ctx, _ = model.observe(batch)
        stages = model.heads["DKD"].regions.read(ctx)
        loss = model.heads["DKD"](ctx)["loss_kd_dkd"]
    assert len(stages) == (3 if kind == "Cascade R-CNN" else 1)
    roi_heads = model.teacher.model.roi_heads
    heads = roi_heads.box_head, roi_heads.box_predictor
    regions = ctx.student_outputs["sampled_proposals"]
    with torch.no_grad():
        maps = [ctx.teacher_features[x] for x in roi_heads.box_in_features]
        pooled = roi_heads.box_pooler(maps, [x.proposal_boxes for x in regions])
        head, predictor = heads if len(stages) == 1 else (heads[0][0], heads[1][0])
        expected, _ = predictor(head(pooled))
    torch.testing.assert_close(stages[0][1], expected)
    assert torch.equal(stages[0][2], torch.cat([x.gt_classes for x in regions]))
    assert not any(target.requires_grad for _, target, _ in stages)
    loss.backward()
    predictors = model.student.roi_heads.box_predictor
    for own in predictors if len(stages) > 1 else [predictors]:
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


def test_a_teacher_of_double_resolution_reads_scaled_regions(written):
    model = wrapper(written, KD__TEACHER__INPUT_SCALE=2.0)
    pooled = []
    pooler = model.teacher.model.roi_heads.box_pooler
    pooler.register_forward_pre_hook(lambda module, args: pooled.append(args[1]))
    with EventStorage():
        ctx, _ = model.observe(kd_models.make_batch(teacher_scale=2.0))
        loss = model.heads["DKD"](ctx)["loss_kd_dkd"]
    assert loss.isfinite() and loss > 0
    own = [2 * x.proposal_boxes.tensor for x in ctx.student_outputs["sampled_proposals"]]
    assert all(torch.equal(a.tensor, b) for a, b in zip(pooled[0], own, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_without_boxes_and_half_precision(written, dtype):
    """Then every proposal is background."""
    model = wrapper(written)
    batch = kd_models.make_batch(boxes=0)
    with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        ctx, _ = model.observe(batch)
        loss = model.imitate(ctx)["loss_kd_dkd"]
    assert loss.dtype == torch.float32 and loss.isfinite() and loss > 0
    loss.backward()
    assert model.student.roi_heads.box_predictor.cls_score.weight.grad.isfinite().all()


def test_a_step_without_regions_gives_zero():
    student = detector(device="cpu")
    head = build(student, student)
    nothing = Instances((64, 64), proposal_boxes=Boxes(torch.zeros(0, 4)))
    nothing.gt_classes = torch.zeros(0, dtype=torch.long)
    logits = torch.zeros(0, kd_models.CLASSES + 1, requires_grad=True)
    features = {f"p{k}": torch.zeros(1, 16, 2 ** (6 - k), 2 ** (6 - k)) for k in range(2, 7)}
    ctx = SimpleNamespace(
        student=student,
        teacher=SimpleNamespace(model=student),
        teacher_features=features,
        student_outputs={"box": (logits, None), "sampled_proposals": [nothing]},
    )
    loss = head(ctx)["loss_kd_dkd"]
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None


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
