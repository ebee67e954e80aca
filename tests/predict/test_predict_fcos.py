"""Predictions of FCOS as heads on predictions see them."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from kd_detectors import detector_cfg, detector_distill_cfg, full_batch, trained_on_predictions
from kd_models import build_wrapper, write_teacher

from projects.kd.errors import ConfigError
from projects.kd.predict import predictor_for
from projects.kd.predict.fcos import FCOSPredictor


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {
        name: write_teacher(tmp_path_factory.mktemp("teacher"), detector_cfg(name))
        for name in ("FCOS", "RetinaNet")
    }


def observed(teachers, **overrides):
    model = build_wrapper(
        detector_distill_cfg("FCOS", teachers["FCOS"], ("OutputKD",), **overrides)
    )
    with EventStorage(0):
        ctx, losses = model.observe(full_batch())
    return model, ctx, losses


def test_losses_of_the_students_own_predictions_are_its_own(teachers):
    model, ctx, losses = observed(teachers)
    predictor = predictor_for(model.student)
    assert type(predictor) is FCOSPredictor
    before = model.student.loss_normalizer
    with EventStorage(0):
        found = predictor.losses(predictor.student(ctx), predictor.assign(ctx))
    assert model.student.loss_normalizer == before, "read, not moved"
    assert found.keys() == losses.keys()
    for key, loss in losses.items():
        torch.testing.assert_close(found[key], loss)


def test_predicting_from_the_students_features_gives_its_predictions(teachers):
    model, ctx, _ = observed(teachers)
    predictor = predictor_for(model.student)
    own = predictor.student(ctx)
    found = predictor.predict(ctx.student_features, predictor.assign(ctx))
    for part in ("logits", "boxes", "centreness"):
        for one, other in zip(getattr(own, part), getattr(found, part), strict=True):
            torch.testing.assert_close(one, other)


def test_pairs_hold_decoded_boxes_and_the_assigned_locations(teachers):
    model, ctx, _ = observed(teachers)
    predictor = predictor_for(model.student)
    assigned, own = predictor.assign(ctx), predictor.student(ctx)
    pairs = predictor.pairs(
        own, own, assigned, levels=predictor.levels, masks=dict.fromkeys(predictor.levels)
    ).dense
    positives = sum((labels < 3).sum().item() for labels in assigned.labels)
    assert positives > 0 and sum(pair.positive.sum().item() for pair in pairs) == positives
    # location (row 1, column 2) of the finest level: centre (20, 12), stride 8
    sides = own.boxes[0][0, :, 1, 2].relu() * 8
    box = torch.tensor([20, 12, 20, 12]) + sides * torch.tensor([-1, -1, 1, 1])
    torch.testing.assert_close(pairs[0].student_boxes[0, 0, 1, 2], box)


@pytest.mark.parametrize("head", ["OutputKD", "CSA"])
def test_heads_on_predictions_train(teachers, head):
    losses, own = trained_on_predictions("FCOS", teachers["FCOS"], head)
    assert own and all(loss.isfinite() for loss in losses)
    # before its first step the assistant agrees with the student
    assert (sum(own) > 0) == (head == "OutputKD")


@pytest.mark.parametrize("pair", [("FCOS", "RetinaNet"), ("RetinaNet", "FCOS")])
def test_other_families_are_refused(teachers, pair):
    student, teacher = pair
    with pytest.raises(ConfigError, match=f"{student} student and a {teacher} teacher"):
        build_wrapper(detector_distill_cfg(student, teachers[teacher], ("OutputKD",)))
