"""Predictions of GFL as heads on predictions see them."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from kd_detectors import detector_cfg, detector_distill_cfg, full_batch, trained_on_predictions
from kd_models import build_wrapper, write_teacher

from projects.kd.errors import ConfigError
from projects.kd.predict import predictor_for
from projects.kd.predict.gfl import GFLPredictor

BINS = 16  # n of the students


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    configs = {name: detector_cfg(name) for name in ("GFL", "FCOS")}
    configs["fewer bins"] = detector_cfg("GFL", MODEL__GFL__REG_MAX=8)
    return {
        name: write_teacher(tmp_path_factory.mktemp("teacher"), cfg)
        for name, cfg in configs.items()
    }


@pytest.fixture(scope="module")
def observed(teachers):
    model = build_wrapper(detector_distill_cfg("GFL", teachers["GFL"], ("OutputKD",)))
    with EventStorage(0):
        ctx, losses = model.observe(full_batch())
    return model, ctx, losses


def test_losses_of_the_students_own_predictions_are_its_own(observed):
    model, ctx, losses = observed
    predictor = predictor_for(model.student)
    assert type(predictor) is GFLPredictor
    with EventStorage(0):
        found = predictor.losses(predictor.student(ctx), predictor.assign(ctx))
    assert found.keys() == losses.keys()
    for key, loss in losses.items():
        torch.testing.assert_close(found[key], loss)


def test_predicting_from_the_students_features_gives_its_predictions(observed):
    model, ctx, _ = observed
    predictor = predictor_for(model.student)
    own = predictor.student(ctx)
    found = predictor.predict(ctx.student_features, predictor.assign(ctx))
    for part in ("logits", "bins"):
        for one, other in zip(getattr(own, part), getattr(found, part), strict=True):
            torch.testing.assert_close(one, other)


def test_pairs_hold_decoded_boxes_and_the_assigned_locations(observed):
    model, ctx, _ = observed
    predictor = predictor_for(model.student)
    assigned, own = predictor.assign(ctx), predictor.student(ctx)
    bins = own.bins[0].detach()
    bins[0].view(4, BINS + 1, *bins.shape[-2:])[:, :, 1, 2] = -50.0
    for side, distance in enumerate((1, 2, 3, 4)):  # a sure distribution: left, top, right, bottom
        bins[0].view(4, BINS + 1, *bins.shape[-2:])[side, distance, 1, 2] = 50.0
    pairs = predictor.pairs(
        own, own, assigned, levels=predictor.levels, masks=dict.fromkeys(predictor.levels)
    ).dense
    positives = sum((labels < 3).sum().item() for labels in assigned.labels)
    assert positives > 0 and sum(pair.positive.sum().item() for pair in pairs) == positives
    # location (row 1, column 2) of the finest level: stride 8, centre by the anchors' offset
    offset = model.student.anchor_generator.offset
    centre = torch.tensor([(2 + offset) * 8, (1 + offset) * 8]).repeat(2)
    sides = torch.tensor([-1.0, -2.0, 3.0, 4.0]) * 8
    torch.testing.assert_close(pairs[0].student_boxes[0, 0, 1, 2], centre + sides)


@pytest.mark.parametrize("head", ["OutputKD", "CSA"])
@pytest.mark.parametrize("teacher", ["GFL", "fewer bins"])
def test_heads_on_predictions_train(teachers, teacher, head):
    losses, own = trained_on_predictions("GFL", teachers[teacher], head)
    assert own and all(loss.isfinite() for loss in losses)
    # before its first step the assistant agrees with the student
    assert (sum(own) > 0) == (head == "OutputKD")


def test_other_families_are_refused(teachers):
    with pytest.raises(ConfigError, match="GFL student and a FCOS teacher"):
        build_wrapper(detector_distill_cfg("GFL", teachers["FCOS"], ("OutputKD",)))
