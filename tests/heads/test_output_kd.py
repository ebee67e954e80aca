"""OutputKD keeps to the contract; both families of detectors, and what it refuses."""

from __future__ import annotations

import kd_models
import pytest
import torch
from detectron2.utils.events import EventStorage
from kd_testing import CHANNELS, STRIDES, head_cfg, toy_info, toy_retinanet
from prediction_contract import LARGER, PredictionContract, enlarged, prediction_context
from torch import nn

from projects.kd.errors import ConfigError
from projects.kd.functional.output_kd import dense_class_loss
from projects.kd.heads import build_imitation_heads
from projects.kd.predict import predictor_for


class TestOutputKD(PredictionContract):
    name = "OutputKD"
    adapts = False

    def padded(self, ctx):
        """A teacher's features are what its own head reads; of the rest, the student's logits."""
        levels = zip(
            ctx.student_features, *ctx.student_outputs["dense"].parts().values(), strict=True
        )
        return [(level, x) for level, *both in levels for x in both]

    @pytest.mark.parametrize("mask_padding", [True, False])
    def test_a_teacher_of_double_resolution(self, mask_padding):
        """With anchors of twice the size, every second of its cells is one of the student's."""
        node = {"MASK_PADDING": mask_padding, "PRESET": "balanced"}
        coarse = prediction_context()
        expected = self.run(build(teacher=toy_retinanet(), **node), coarse)[0]
        fine = prediction_context(teacher_scale=2.0)
        fine.gt = coarse.gt
        given = (ctx.student_outputs["dense"].parts().values() for ctx in (coarse, fine))
        for ours, theirs in zip(*given, strict=True):
            for x, y in zip(ours, theirs, strict=True):
                y.data.copy_(x)
        for level, x in coarse.teacher_features.items():
            fine.student_features[level].data.copy_(coarse.student_features[level])
            blocks = x.detach().repeat_interleave(2, 2).repeat_interleave(2, 3)
            fine.teacher_features[level].data.copy_(blocks)
        found = self.run(build(teacher=enlarged(), common=LARGER, **node), fine)[0]
        for key, loss in expected.items():
            assert loss > 0
            torch.testing.assert_close(found[key], loss)

    def test_teachers_of_other_sizes_give_finite_losses(self):
        """With the student's own anchors, the teacher's next coarser level predicts for them."""
        head = build(teacher=toy_retinanet(), common=LARGER)
        assert head.levels == ("p3", "p4") and [head.match[x].index for x in head.levels] == [1, 2]
        ctx = prediction_context(teacher_scale=2.0)
        losses, total = self.run(head, ctx)
        total.backward()
        assert all(loss.isfinite() and loss > 0 for loss in losses.values())
        assert not ctx.student_outputs["dense"].logits[2].grad
        logits, _ = ctx.teacher.model.head(list(ctx.teacher_features.values()))
        again = dense_class_loss(
            [
                (*(x.unflatten(1, (4, 2)) for x in pair), None)
                for pair in zip(ctx.student_outputs["dense"].logits[:2], logits[1:], strict=True)
            ]
        )
        open_head = build(
            *(toy_retinanet(), toy_retinanet(), LARGER), MASK_PADDING=False, CLS_WEIGHT=1.0
        )
        ctx.gt = [x[:0] for x in ctx.gt]  # without boxes no anchor is ignored
        loss = self.run(open_head, ctx)[0]["loss_kd_outputkd_cls"]
        torch.testing.assert_close(loss, again)


def build(student=None, teacher=None, common=None, **node):
    infos = (
        toy_info(CHANNELS, model=student or toy_retinanet()),
        toy_info(CHANNELS + 2, model=teacher or toy_retinanet(CHANNELS + 2)),
    )
    return build_imitation_heads(head_cfg("OutputKD", common, **node), *infos)["OutputKD"]


def test_teachers_of_other_widths_are_as_good():
    ctx = prediction_context(channels=(CHANNELS, CHANNELS + 2))
    with EventStorage():
        losses = build()(ctx)
    sum(losses.values()).backward()
    assert all(x.grad.any() for x in ctx.student_outputs["dense"].logits)
    assert all(x.grad is None for x in ctx.teacher_features.values())
    assert all(p.grad is None for p in ctx.teacher.model.parameters())


def test_class_term_is_that_of_the_teachers_logits_without_ignored_anchors():
    ctx = prediction_context(channels=(CHANNELS, CHANNELS + 2))
    head = build(CLS_WEIGHT=3.0, WEIGHT=2.0)
    loss = head(ctx)["loss_kd_outputkd_cls"]
    logits, _ = ctx.teacher.model.head(list(ctx.teacher_features.values()))
    model, levels = ctx.student, []
    anchors = model.anchor_generator(list(ctx.student_features.values()))
    labels, _ = model.label_anchors(anchors, ctx.gt)
    assert any((x == -1).any() for x in labels)
    start = 0
    for level, ours, theirs in zip(
        STRIDES, ctx.student_outputs["dense"].logits, logits, strict=True
    ):
        count, _, rows, columns = ours.shape
        counted = torch.zeros(count, 4, rows, columns, dtype=torch.bool)
        inside = ctx.valid_mask(level)
        for n in range(count):  # anchors count on along columns, rows last, shapes first
            place = start
            for i in range(rows):
                for j in range(columns):
                    for a in range(4):
                        counted[n, a, i, j] = labels[n][place] >= 0 and inside[n, 0, i, j]
                        place += 1
        start = place
        levels.append((*(x.unflatten(1, (4, 2)) for x in (ours, theirs)), counted))
    torch.testing.assert_close(loss, 6.0 * dense_class_loss(levels))


def test_jitter_moves_the_targets_only():
    ctx = prediction_context(same=True)
    head = build(teacher=toy_retinanet(), BOX_JITTER=6.0)
    losses = head(ctx)
    assert losses["loss_kd_outputkd_cls"].item() == pytest.approx(0, abs=1e-6)
    assert losses["loss_kd_outputkd_box"].item() > 1e-3


def test_presets_and_weights_in_their_place():
    weights = {
        (preset, kind): build_for(kind, PRESET=preset).weights[:3]
        for preset in ("paper", "balanced")
        for kind in ("RetinaNet", "GeneralizedRCNN")
    }
    assert weights["paper", "RetinaNet"] == (0.2, 0.05, 0.2)
    assert weights["paper", "GeneralizedRCNN"] == (0.5, 0.2, 0.2)
    assert weights["balanced", "RetinaNet"] != weights["paper", "RetinaNet"]
    own = build_for("GeneralizedRCNN", CLS_WEIGHT=2.0, BOX_WEIGHT=0.0, RPN_WEIGHT=1.0).weights
    assert own[:3] == (2.0, 0.0, 1.0)


def build_for(kind: str, **node):
    model = kd_models.build(kd_models.tiny_cfg(kind))
    shapes = model.backbone.output_shape()
    info = toy_info(model=model)
    info = type(info)(model=model, shapes=shapes, taps=info.taps)
    return build_imitation_heads(head_cfg("OutputKD", **node), info, info)["OutputKD"]


# --- whole training steps ------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_a_teacher_that_equals_the_student_says_what_it_says(arch, tmp_path):
    cfg = kd_models.tiny_cfg(arch)
    teacher = kd_models.write_teacher(tmp_path, cfg)
    for same in (True, False):
        model = kd_models.build_wrapper(kd_models.distill_cfg(teacher, arch, ("OutputKD",)))
        if same:
            model.student.load_state_dict(model.teacher.model.state_dict())
            model.student.eval()  # batch norms as in the teacher
            for module in (model.student, *model.student.modules()):
                module.training = not isinstance(module, torch.nn.BatchNorm2d)
        losses = kd_models.losses_at(model, kd_models.make_batch())
        scheduled = {k: v.item() for k, v in losses.items() if k.startswith("loss_kd")}
        assert len(scheduled) == (2 if arch == "RetinaNet" else 3)
        if same:
            assert all(value == pytest.approx(0, abs=1e-5) for value in scheduled.values())
        else:
            assert all(value > 1e-7 for value in scheduled.values())


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_the_teachers_regions_are_the_students(arch, tmp_path):
    teacher = kd_models.write_teacher(
        tmp_path, kd_models.tiny_cfg(arch, MODEL__FPN__OUT_CHANNELS=8)
    )
    cfg = kd_models.distill_cfg(teacher, arch, ("OutputKD",), KD__OUTPUTKD__BOX_JITTER=6.0)
    model = kd_models.build_wrapper(cfg)
    losses = kd_models.losses_at(model, kd_models.make_batch())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.student.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"BOX_JITTER": -1.0}, "KD.OUTPUTKD.BOX_JITTER"),
        ({"PRESET": "best"}, "KD.OUTPUTKD.PRESET.*paper, balanced"),
        ({"TEMPERATURE": 0.0}, "KD.OUTPUTKD.TEMPERATURE"),
        ({"CLS_WEIGHT": -2.0}, "KD.OUTPUTKD.CLS_WEIGHT"),
        ({"LEVELS": ("p9",)}, "KD.OUTPUTKD.LEVELS"),
    ],
)
def test_wrong_keys(node, words):
    with pytest.raises(ConfigError, match=words):
        build(**node)


def test_other_classes_anchors_units_and_families_are_refused():
    teacher = toy_retinanet(CHANNELS + 2)
    teacher.num_classes = 3
    with pytest.raises(ConfigError, match="2 classes and the teacher 3"):
        build(teacher=teacher)
    teacher = toy_retinanet(CHANNELS + 2)
    for anchors in teacher.anchor_generator.cell_anchors:
        anchors.mul_(1.3)
    with pytest.raises(ConfigError, match=r"KD.OUTPUTKD.*anchors.*stride 8: .*ANCHOR_GENERATOR"):
        build(teacher=teacher)
    teacher = toy_retinanet(CHANNELS + 2)
    teacher.box2box_transform.weights = (10.0, 10.0, 5.0, 5.0)
    with pytest.raises(ConfigError, match="BBOX_REG_WEIGHTS"):
        build(teacher=teacher)
    with pytest.raises(ConfigError, match=r"not on p5"):
        build(teacher=toy_retinanet(), common=LARGER, LEVELS=("p3", "p5"))
    rcnn = kd_models.build(kd_models.tiny_cfg("GeneralizedRCNN", MODEL__ROI_HEADS__NUM_CLASSES=2))
    with pytest.raises(ConfigError, match="same family"):
        build(teacher=rcnn)


def test_detectors_without_a_predictor_are_refused_by_name():
    model = kd_models.build(kd_models.tiny_cfg("GeneralizedRCNN"))
    model.roi_heads = nn.Identity()
    words = "CSA does not work with the student GeneralizedRCNN with Identity.*RetinaNet"
    with pytest.raises(ConfigError, match=words):
        predictor_for(model, "CSA")


@pytest.mark.parametrize(
    "key", ["MODEL__ROI_BOX_HEAD__USE_SIGMOID_CE", "MODEL__ROI_BOX_HEAD__TRAIN_ON_PRED_BOXES"]
)
def test_settings_with_which_regions_cannot_be_compared(key):
    model = kd_models.build(kd_models.tiny_cfg("GeneralizedRCNN", **{key: True}))
    with pytest.raises(ConfigError, match=key.replace("__", ".")):
        predictor_for(model).check_student()
