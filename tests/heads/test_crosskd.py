"""CrossKD keeps to the contract; its chain, its depths, and where its gradient ends."""

from __future__ import annotations

import logging

import pytest
import torch
from dense_toys import deep_retinanet, toy_fcos, toy_gfl
from detectron2.utils.events import EventStorage
from head_contract import RAGGED, SPOILERS
from kd_detectors import detector_cfg, detector_distill_cfg, full_batch
from kd_models import build_wrapper, write_teacher
from kd_testing import CHANNELS, STRIDES, head_cfg, leaves, toy_info, toy_retinanet
from prediction_contract import LARGER, DenseContract, prediction_context
from torch import nn

from projects.kd.errors import ConfigError
from projects.kd.functional.bckd import confidence, giou_kd, qfl_kd
from projects.kd.functional.crosskd import align_channels, bins_kd, channel_statistics, log_iou_kd
from projects.kd.heads import build_imitation_heads
from projects.kd.predict.base import step_precision
from projects.kd.predict.dense import decode
from projects.kd.taps import TapSpec
from projects.kd.teacher_link import extra_taps


class OnDemand(dict):
    """Outputs with the maps after a tower's first convolution, from the features of the moment."""

    def __init__(self, outputs, model, features):
        super().__init__(outputs)
        self.model, self.features = model, features

    def __missing__(self, tap):
        tower = getattr(
            self.model.head, {"tower_cls": "cls_subnet", "tower_box": "bbox_subnet"}[tap]
        )
        with step_precision(next(iter(self.features.values()))):
            return [tower[:2](x) for x in self.features.values()]


def tower_context(toy=deep_retinanet, **kwargs):
    ctx = prediction_context(toy=toy, **kwargs)
    ctx.student_outputs = OnDemand(ctx.student_outputs, ctx.student, ctx.student_features)
    with torch.no_grad():
        ctx.teacher_outputs = OnDemand(
            ctx.teacher_outputs, ctx.teacher.model.requires_grad_(False), ctx.teacher_features
        )
    return ctx


class CrossContract(DenseContract):
    name = "CrossKD"
    reads = "features"  # and not the student's own predictions
    adapts = True
    averages_teacher = False  # an unbiased deviation knows how many cells there are
    tolerance = 1e-3  # the least divisor of a deviation moves the maps by 1e-6


class TestFromTheLevels(CrossContract):
    """Towers of one convolution: it is the teacher's."""


class TestFromInsideOfATower(CrossContract):
    toy = staticmethod(deep_retinanet)

    def context(self, **kwargs):
        return tower_context(**kwargs)

    def padded(self, ctx):
        """Not the features: the kernels' zeros spread what is infinite."""
        return [x for side in vars(leaves(ctx)).values() for x in side[len(STRIDES) :]]

    @pytest.mark.parametrize("spoiler", SPOILERS)
    def test_padding_of_the_maps_in_the_towers_does_not_matter(self, spoiler):
        results = []
        for fill in (0.0, spoiler):
            head, ctx = self.head(MASK_PADDING=True), self.context(**RAGGED)
            maps = []
            for outputs in (ctx.student_outputs, ctx.teacher_outputs):
                for tap in ("tower_cls", "tower_box"):
                    levels = zip(STRIDES, outputs[tap], strict=True)
                    spoilt = [x.detach().masked_fill(~ctx.valid_mask(k), fill) for k, x in levels]
                    outputs[tap] = [x.requires_grad_() for x in spoilt]
                    maps += spoilt
            losses, total = self.run(head, ctx)
            total.backward()
            assert all(x.grad is None for x in maps[6:])
            results.append([*losses.values(), *(x.grad for x in maps[:6])])
        for clean, found in zip(*results, strict=True):
            assert clean.any() and torch.equal(clean, found)


def build(student=None, teacher=None, common=None, **node):
    infos = [toy_info(model=x or toy_retinanet()) for x in (student, teacher)]
    infos = [type(x)(x.model, x.model.backbone.output_shape(), x.taps) for x in infos]
    return build_imitation_heads(head_cfg("CrossKD", common, **node), *infos)["CrossKD"]


def run(head, ctx):
    with EventStorage():
        return head(ctx)


def crossed_by_hand(ctx, before_relu=False):
    """Outputs of the teacher's second convolution and predictors for the student's aligned maps."""
    logits, boxes = [], []
    ours, theirs = ctx.student.head, ctx.teacher.model.head
    for level in STRIDES:
        maps = ctx.student_features[level], ctx.teacher_features[level]
        outputs = []
        for name in ("cls_subnet", "bbox_subnet"):
            stop = 1 if before_relu else 2
            own, other = (
                getattr(h, name)[:stop](x) for h, x in zip((ours, theirs), maps, strict=True)
            )
            crossed = align_channels(own, channel_statistics(other.detach())).relu()
            outputs.append(getattr(theirs, name)[2:](crossed))
        logits.append(theirs.cls_score(outputs[0]))
        boxes.append(theirs.bbox_pred(outputs[1]))
    return logits, boxes


@pytest.mark.parametrize("activation", ["post", "pre"])
def test_terms_are_those_of_the_crossed_predictions(activation):
    ctx = tower_context(sizes=((64, 64),) * 2)
    if activation == "pre":
        for outputs, model, features in (
            (ctx.student_outputs, ctx.student, ctx.student_features),
            (ctx.teacher_outputs, ctx.teacher.model, ctx.teacher_features),
        ):
            for tap, name in (("tower_cls", "cls_subnet"), ("tower_box", "bbox_subnet")):
                outputs[tap] = [getattr(model.head, name)[0](x) for x in features.values()]
    found = run(build(deep_retinanet(), deep_retinanet(), ACTIVATION=activation, WEIGHT=2.0), ctx)
    logits, boxes = crossed_by_hand(ctx, activation == "pre")
    model, target = ctx.student, ctx.teacher_outputs["dense"]
    anchors = model.anchor_generator(list(ctx.student_features.values()))
    labels = torch.stack(model.label_anchors(anchors, ctx.gt)[0])
    total = ((labels >= 0) & (labels < 2)).sum(1).clamp(min=1).sum()
    classes, pairs = [], []
    parts = labels.split([len(x) for x in anchors], dim=1)
    for place, (label, anchor) in enumerate(zip(parts, anchors, strict=True)):
        grid = (*logits[place].shape[-2:], 4)
        counted = (label >= 0).unflatten(1, grid).permute(0, 3, 1, 2)
        pair = [x.unflatten(1, (4, 2)) for x in (logits[place], target.logits[place])]
        classes.append((*pair, counted))
        both = [
            decode(x, anchor, model.box2box_transform, None)
            for x in (boxes[place], target.boxes[place])
        ]
        pairs.append((*both, confidence(pair[1], counted)))
    torch.testing.assert_close(found["loss_kd_crosskd_cls"], 2 * qfl_kd(classes, total))
    torch.testing.assert_close(found["loss_kd_crosskd_box"], 2 * giou_kd(pairs, total))


def test_terms_on_gfl_and_fcos():
    """Weights of the family; bins with another n than the student's; centre-ness as divisor."""
    ctx = prediction_context(toy=toy_gfl, sizes=((64, 64),) * 2)
    ctx.teacher.model = toy_gfl(bins=7)
    target = ctx.teacher_outputs["dense"]
    bins = [torch.randn(2, 28, *x.shape[-2:]) for x in target.logits]
    ctx.teacher_outputs["dense"] = type(target)(logits=target.logits, bins=bins)
    found = run(build(toy_gfl(), ctx.teacher.model), ctx)
    aligned = [
        align_channels(ctx.student_features[x], channel_statistics(ctx.teacher_features[x]))
        for x in STRIDES
    ]
    logits, crossed = ctx.teacher.model.head(aligned)
    levels = [
        (
            *(y.unflatten(1, (4, 7)) for y in pair),
            confidence(z[:, None], None)[:, 0],
        )
        for *pair, z in zip(crossed, bins, target.logits, strict=True)
    ]
    total, weight = bins_kd(levels)
    torch.testing.assert_close(found["loss_kd_crosskd_box"], 4 * total / weight)

    ctx = prediction_context(toy=toy_fcos, sizes=((64, 64),) * 2)
    model, target = ctx.teacher.model, ctx.teacher_outputs["dense"]
    anchors = model.anchor_generator(list(ctx.student_features.values()))
    labels, boxes = model.label_anchors(anchors, ctx.gt)
    positive = torch.stack(labels) < 8
    for gt in (True, False):
        if not gt:
            ctx.gt = [x[:0] for x in ctx.gt]
        divisor = model.compute_ctrness_targets(anchors, boxes)[positive].sum() if gt else 2.0
        # two convolutions remain, or all there are
        found = run(build(toy_fcos(), model), ctx)
        aligned = [
            align_channels(ctx.student_features[x], channel_statistics(ctx.teacher_features[x]))
            for x in STRIDES
        ]
        logits, crossed, _ = model.head(aligned)
        classes = [
            (x[:, None], y[:, None], None) for x, y in zip(logits, target.logits, strict=True)
        ]
        torch.testing.assert_close(
            found["loss_kd_crosskd_cls"], 0.4 * qfl_kd(classes, divisor), rtol=1e-4, atol=1e-6
        )
        pairs = [
            (
                *(decode(z, a, model.box2box_transform, None) for z in (x, y)),
                confidence(t[:, None], None),
            )
            for x, y, t, a in zip(crossed, target.boxes, target.logits, anchors, strict=True)
        ]
        torch.testing.assert_close(
            found["loss_kd_crosskd_box"], 0.75 * log_iou_kd(pairs, divisor), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("family", ["RetinaNet", "FCOS", "GFL"])
def test_the_students_later_layers_and_the_teacher_get_exactly_nothing(family, tmp_path):
    """A whole step, GFL's in bfloat16: towers of two, crossed after the first by DEPTH; a deeper,
    wider teacher."""
    node = {"RetinaNet": "RETINANET"}.get(family, family)
    convs = {f"MODEL__{node}__NUM_CONVS": 2}
    teacher = detector_cfg(
        family, **{f"MODEL__{node}__NUM_CONVS": 3, "MODEL__FPN__OUT_CHANNELS": 8}
    )
    overrides = {**convs, "KD__CROSSKD__DEPTH": 1, "KD__LOG_PERIOD": 1}
    cfg = detector_distill_cfg(family, write_teacher(tmp_path, teacher), ("CrossKD",), **overrides)
    model = build_wrapper(cfg)
    head = model.heads["CrossKD"]
    for parameter in model.teacher.model.head.parameters():
        if parameter.dim() == 4:
            parameter.data.normal_(std=0.1)  # as if it had been trained
    assert (head.depth, head.teacher_depth) == (1, 2)
    half = torch.autocast("cpu", torch.bfloat16, enabled=family == "GFL")
    with EventStorage(0) as storage, half:
        losses = model(full_batch(sizes=((64, 64),)))
        assert storage.latest()["kd/crosskd_gain"][0] > 0
    own = {key: loss for key, loss in losses.items() if key.startswith("loss_kd_crosskd")}
    assert len(own) == 2 and all(loss.isfinite() and loss > 0 for loss in own.values())
    sum(own.values()).backward()
    for name, parameter in model.student.head.named_parameters():
        place = name.split(".")
        first = place[0].endswith("subnet") and int(place[1]) == 0
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == first, name
    assert all(p.grad.any() for _, p in head.named_parameters())
    assert model.student.backbone.fpn_output3.weight.grad.any()
    assert all(p.grad is None for p in model.teacher.model.parameters())


def test_a_level_of_one_cell():
    for toy in (toy_retinanet, toy_gfl, toy_fcos):
        ctx = prediction_context(toy=toy, sizes=((32, 32),), canvas=(32, 32))
        losses = run(build(toy(), toy()), ctx)
        sum(losses.values()).backward()
        assert all(x.isfinite() for x in losses.values())
        assert not ctx.student_features["p5"].grad.any()
        assert all(x.grad.isfinite().all() for x in ctx.student_features.values())


# --- depths and refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convs", "node", "depths"),
    [
        ((4, 4), {}, (3, 3)),
        ((4, 2), {}, (3, 1)),
        ((2, 4), {}, (1, 3)),
        ((4, 4), {"DEPTH": 0}, (0, 0)),
        ((4, 4), {"DEPTH": 4}, (4, 4)),
        ((4, 3), {"DEPTH": 2, "TEACHER_DEPTH": 3}, (2, 3)),
    ],
)
def test_as_many_convolutions_remain_as_in_the_student(convs, node, depths):
    head = build(*(deep_retinanet(convs=x) for x in convs), **node)
    assert (head.depth, head.teacher_depth) == depths
    for side, depth in zip(("student", "teacher"), depths, strict=True):
        paths = {tap: spec.path for tap, spec in head.extra_taps[side].items()}
        place = 2 * depth - 1
        expected = {
            "tower_cls": f"head.cls_subnet.{place}",
            "tower_box": f"head.bbox_subnet.{place}",
        }
        assert paths == (expected if depth else {})
    four = [toy(convs=4) for toy in (toy_fcos, toy_gfl)]
    assert [build(x, x).depth for x in four] == [2, 3]


@pytest.mark.parametrize(
    ("convs", "node", "words"),
    [
        ((2, 2), {"DEPTH": 3}, "KD.CROSSKD.DEPTH is 3; the student's towers have 2"),
        ((4, 1), {"DEPTH": 1}, "KD.CROSSKD.DEPTH: after 1 of its 4 .* set DEPTH to 3 or more"),
        ((2, 2), {"TEACHER_DEPTH": 5}, "KD.CROSSKD.TEACHER_DEPTH is 5; .* have 2"),
        ((2, 2), {"ACTIVATION": "both"}, "KD.CROSSKD.ACTIVATION.*post, pre"),
        ((2, 2), {"CLS_WEIGHT": -3.0}, "KD.CROSSKD.CLS_WEIGHT is -3"),
    ],
)
def test_wrong_keys_and_towers(convs, node, words):
    with pytest.raises(ConfigError, match=words):
        build(*(deep_retinanet(convs=x) for x in convs), **node)


def test_widths_need_an_adapter_that_the_config_allows():
    with pytest.raises(ConfigError, match="KD.ADAPTER.TYPE"):
        build(teacher=toy_retinanet(CHANNELS + 2), common={"ADAPTER": {"TYPE": "none"}})


def test_norms_that_count_their_calls_need_all_levels_in_order():
    teacher = deep_retinanet(norm="BN")
    assert build(teacher=teacher, LEVELS=("p4",)).all_levels
    with pytest.raises(ConfigError, match=r"KD.CROSSKD: the norms.*INPUT_SCALE"):
        build(teacher=teacher, common=LARGER)
    ctx = prediction_context(toy=lambda channels=CHANNELS: deep_retinanet(channels, norm="BN"))
    ctx.teacher.model.eval()
    head = build(ctx.student, ctx.teacher.model, LEVELS=("p4",), DEPTH=0)
    sum(run(head, ctx).values()).backward()
    assert [x.grad is not None and bool(x.grad.any()) for x in ctx.student_features.values()] == [
        False,
        True,
        False,
    ]


def test_other_detectors_and_classes_are_refused():
    with pytest.raises(ConfigError, match="same family"):
        build(toy_gfl(), toy_fcos())
    teacher = toy_retinanet()
    teacher.num_classes = 3
    with pytest.raises(
        ConfigError, match="KD.CROSSKD: the student has 2 classes and the teacher 3"
    ):
        build(teacher=teacher)


def test_beside_other_heads_on_predictions_it_warns(caplog):
    with caplog.at_level(logging.WARNING, logger="projects.kd.heads.crosskd"):
        build(common={"HEADS": ("CrossKD", "BCKD")})
    assert "KD.HEADS: CrossKD" in caplog.text and "BCKD" in caplog.text


def test_two_heads_cannot_tap_different_places_by_one_name():
    one, other = build(deep_retinanet(), deep_retinanet()), build()
    other.extra_taps = {"student": {"tower_cls": TapSpec("head.cls_score")}}
    assert extra_taps(nn.ModuleDict({"A": one}), "student") == one.extra_taps["student"]
    with pytest.raises(ConfigError, match="KD.HEADS: B and another head tap different tower_cls"):
        extra_taps(nn.ModuleDict({"A": one, "B": other}), "student")
