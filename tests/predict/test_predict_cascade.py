"""Predictions of Cascade R-CNN as heads on predictions see them."""

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from kd_detectors import detector_cfg, detector_distill_cfg, full_batch
from kd_models import build_wrapper, losses_at, train_steps, write_teacher

from projects.kd.errors import ConfigError
from projects.kd.predict import predictor_for
from projects.kd.predict.cascade import CascadePredictor

NAME = "Cascade Mask R-CNN"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {
        name: write_teacher(tmp_path_factory.mktemp("teacher"), detector_cfg(name))
        for name in (NAME, "Faster R-CNN")
    }


def student_of(teachers, heads=("OutputKD",), **overrides):
    return build_wrapper(detector_distill_cfg(NAME, teachers[NAME], heads, **overrides))


def observed(teachers, monkeypatch):
    """The wrapper, its context and losses, and the regions that each stage of the student got."""
    model, seen = student_of(teachers), []
    heads = model.student.roi_heads
    run_stage = heads._run_stage

    def spy(features, proposals, stage):
        seen.append(proposals)
        return run_stage(features, proposals, stage)

    monkeypatch.setattr(heads, "_run_stage", spy)
    with EventStorage(0):
        ctx, losses = model.observe(full_batch())
    return model, ctx, losses, seen


def test_regions_labels_and_losses_are_the_students_own(teachers, monkeypatch):
    model, ctx, losses, seen = observed(teachers, monkeypatch)
    predictor = predictor_for(model.student)
    assert type(predictor) is CascadePredictor and len(seen) == 3
    with EventStorage(0):
        assigned = predictor.assign(ctx)
        own = predictor.student(ctx)
        found = predictor.losses(own, assigned)
        again = predictor.predict(ctx.student_features, assigned)
    for ours, theirs in zip(assigned.regions, seen, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
            assert torch.equal(a.gt_classes, b.gt_classes)
            assert torch.equal(a.gt_boxes.tensor, b.gt_boxes.tensor)
    assert not torch.equal(seen[0][0].proposal_boxes.tensor, seen[1][0].proposal_boxes.tensor)
    staged = {key for key in losses if "_stage" in key}
    assert len(staged) == 6 and staged < found.keys()
    for key in staged:
        torch.testing.assert_close(found[key], losses[key])
    for ours, theirs in zip(own.stages, again.stages, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_features_get_the_mean_of_the_stages_gradients(teachers, monkeypatch):
    """As in detectron2: otherwise three stages would pull three times as hard."""
    model, ctx, *_ = observed(teachers, monkeypatch)
    predictor = predictor_for(model.student)
    with EventStorage(0):
        assigned = predictor.assign(ctx)
    features = {k: v.detach().requires_grad_() for k, v in ctx.student_features.items()}
    maps = [features[level] for level in model.student.roi_heads.box_in_features]
    boxes = [x.proposal_boxes for x in assigned.regions[0]]
    (scaled,) = torch.autograd.grad(predictor.pool(maps, boxes).sum(), maps[0])
    (whole,) = torch.autograd.grad(model.student.roi_heads.box_pooler(maps, boxes).sum(), maps[0])
    torch.testing.assert_close(scaled * 3, whole)


def test_a_stage_without_regions_gives_no_loss(teachers, monkeypatch):
    """Boxes of the stage before that shrink to nothing are dropped in training."""
    model, ctx, *_ = observed(teachers, monkeypatch)
    predictor = predictor_for(model.student)

    def nothing(outputs, proposals):
        return [torch.zeros(len(x), 4) for x in proposals]

    monkeypatch.setattr(model.student.roi_heads.box_predictor[1], "predict_boxes", nothing)
    with EventStorage(0):
        assigned = predictor.assign(ctx)
        predictions = predictor.predict(ctx.student_features, assigned)
        losses = predictor.losses(predictions, assigned)
    assert [len(x) for x in assigned.regions[2]] == [0, 0]
    assert predictions.stages[2][0].shape == (0, 4)
    assert losses["loss_cls_stage2"] == 0 and losses["loss_box_reg_stage2"] == 0
    pairs = predictor.pairs(
        predictions, predictions, assigned, levels=(), masks=dict.fromkeys(predictor.levels)
    )
    assert [len(pair.foreground) for pair in pairs.regions[2:]] == [0]


@pytest.mark.parametrize("head", ["OutputKD", "CSA"])
def test_heads_on_predictions_train(teachers, head):
    model = student_of(teachers, (head,), KD__CSA__DIM=16, KD__CSA__HEADS=4)
    batch = full_batch()
    losses = losses_at(model, batch, iteration=10**5)
    own = [v for k, v in losses.items() if k.startswith(f"loss_kd_{head.lower()}")]
    assert len(own) == 3 and all(loss.isfinite() for loss in losses.values())
    if head == "OutputKD":
        assert all(loss > 0 for loss in own)
    else:  # before its first step the assistant agrees with the student, stage by stage
        assert sum(own).item() == pytest.approx(0, abs=1e-5)
        auxiliary = {key for key in losses if key.startswith("loss_aux_csa")}
        assert {"loss_aux_csa_cls_stage2", "loss_aux_csa_box_reg_stage0"} <= auxiliary
    train_steps(model, batch, steps=2, lr=1e-3)


def test_targets_of_each_stage_are_the_teachers_on_the_students_regions(teachers, monkeypatch):
    model, ctx, *_ = observed(teachers, monkeypatch)
    ours, theirs = predictor_for(model.student), predictor_for(model.teacher.model)
    with EventStorage(0):
        assigned = ours.assign(ctx)
        target = model.heads["OutputKD"].targets(ctx, theirs, assigned)
    heads = model.teacher.model.roi_heads
    maps = [ctx.teacher_features[level] for level in heads.box_in_features]
    with torch.no_grad():
        for stage, regions in enumerate(assigned.regions):
            boxes = [Boxes(x.proposal_boxes.tensor) for x in regions]
            pooled = heads.box_head[stage](heads.box_pooler(maps, boxes))
            for a, b in zip(heads.box_predictor[stage](pooled), target.stages[stage], strict=True):
                torch.testing.assert_close(a, b)


def test_other_families_and_other_numbers_of_stages_are_refused(teachers, tmp_path):
    with pytest.raises(ConfigError, match="StandardROIHeads student and a .*CascadeROIHeads teach"):
        build_wrapper(detector_distill_cfg("Faster R-CNN", teachers[NAME], ("OutputKD",)))
    two = {
        "MODEL__ROI_BOX_CASCADE_HEAD__IOUS": (0.5, 0.6),
        "MODEL__ROI_BOX_CASCADE_HEAD__BBOX_REG_WEIGHTS": ((10.0,) * 4, (20.0,) * 4),
    }
    other = write_teacher(tmp_path, detector_cfg(NAME, **two))
    with pytest.raises(ConfigError, match="3 box heads and the teacher 2.*CASCADE_HEAD.IOUS"):
        build_wrapper(detector_distill_cfg(NAME, other, ("OutputKD",)))
