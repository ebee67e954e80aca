"""ScoreL2 keeps to the contract; values of the head, its weights, and what it refuses."""

import kd_models
import pytest
import torch
from kd_testing import CHANNELS, STRIDES, ToyDetector, head_cfg, toy_info, toy_retinanet
from prediction_contract import PredictionContract, prediction_context
from torch import nn

from projects.kd.errors import ConfigError
from projects.kd.functional.score_l2 import score_l2_loss
from projects.kd.heads import build_imitation_heads
from projects.kd.predict import predictor_for
from projects.kd.predict.outputs import DenseOutputs


class TestScoreL2(PredictionContract):
    name = "ScoreL2"
    reads = "features"
    half = {"rtol": 1e-5, "atol": 1e-7}

    def test_floor_when_student_equals_teacher(self):
        """With convolutions that give back what they read: ReLU(x + 100) - 100."""
        head = self.head()
        for adapter in head.adapters.values():
            pass_through(adapter)
        losses, _ = self.run(head, self.context(same=True))
        assert losses["loss_kd_scorel2"].item() == pytest.approx(0, abs=1e-6)
        assert self.run(head, self.context())[0]["loss_kd_scorel2"] > 1


def pass_through(adapter: nn.Sequential) -> None:
    with torch.no_grad():
        for convolution, bias in ((adapter[0], 100.0), (adapter[2], -100.0)):
            nn.init.dirac_(convolution.weight)
            convolution.bias.fill_(bias)


def build(student=None, teacher=None, common=None, **node):
    infos = (
        toy_info(CHANNELS, model=student or toy_retinanet()),
        toy_info(CHANNELS, model=teacher or toy_retinanet()),
    )
    return build_imitation_heads(head_cfg("ScoreL2", common, **node), *infos)["ScoreL2"]


def test_levels_are_summed_each_weighted_by_the_teachers_scores():
    ctx = prediction_context()
    head = build(WEIGHT=2.0, MASK_PADDING=False)
    total = 0.0
    for place, level in enumerate(STRIDES):
        weight = ctx.teacher_outputs["dense"].logits[place].sigmoid().amax(1, keepdim=True)
        student = head.adapters[level](ctx.student_features[level])
        total = total + score_l2_loss(student, ctx.teacher_features[level].detach(), weight)
    torch.testing.assert_close(head(ctx)["loss_kd_scorel2"], 2 * total)
    assert [type(x) for x in head.adapters["p3"]] == [nn.Conv2d, nn.ReLU, nn.Conv2d]


def test_a_student_without_a_predictor_learns_from_a_teacher_with_one():
    head = build(student=ToyDetector())
    assert head.requires == {"features", "dense"}
    ctx = prediction_context()
    ctx.student = None
    head(ctx)["loss_kd_scorel2"].backward()
    assert all(x.grad.any() for x in ctx.student_features.values())


def test_objectness_weighs_with_region_proposals():
    model = kd_models.build(kd_models.tiny_cfg("GeneralizedRCNN"))
    info = toy_info(model=model, taps=("features", "rpn"))
    head = build_imitation_heads(head_cfg("ScoreL2"), info, info)["ScoreL2"]
    assert head.requires == {"features", "rpn"} and head.levels == ("p2", "p3", "p4", "p5", "p6")
    logits = [torch.randn(2, 1, 8, 8), torch.randn(2, 1, 4, 4)]
    predictor = predictor_for(model)
    predictor.model.proposal_generator.in_features = ["p2", "p3"]
    scores = predictor.confidence(DenseOutputs(logits))
    assert list(scores) == ["p2", "p3"] and torch.equal(scores["p3"], logits[1].sigmoid())


def test_levels_that_the_teacher_does_not_score():
    teacher = toy_retinanet()
    teacher.head_in_features = ["p3", "p4"]
    assert build(teacher=teacher).levels == ("p3", "p4")
    with pytest.raises(
        ConfigError, match="KD.SCOREL2.LEVELS .*scores objects on p3, p4, not on p5"
    ):
        build(teacher=teacher, LEVELS=("p4", "p5"))


def test_teachers_without_dense_scores_are_refused():
    with pytest.raises(
        ConfigError, match="ScoreL2 does not work with the teacher ToyDetector.*Ret"
    ):
        build(teacher=ToyDetector())


def test_training_step_of_a_two_stage_pair(tmp_path):
    teacher = kd_models.write_teacher(tmp_path, kd_models.tiny_cfg("GeneralizedRCNN"))
    model = kd_models.build_wrapper(kd_models.distill_cfg(teacher, "GeneralizedRCNN", ("ScoreL2",)))
    losses = kd_models.losses_at(model, kd_models.make_batch())
    assert losses["loss_kd_scorel2"] > 0
    losses["loss_kd_scorel2"].backward()
    assert all(p.grad is None for p in model.teacher.model.parameters())
    assert all(p.grad is None for p in model.student.roi_heads.parameters())
    assert all(p.grad is not None for p in model.heads.parameters())
