"""The ICD head against its oracle, gradient isolation, odd batches, the ablation, settings."""

from __future__ import annotations

from types import SimpleNamespace

import kd_models
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from head_contract import HeadContract
from icd_toys import SMALL, STUDENT, TEACHER, build, context, features, gradients
from kd_testing import (
    STRIDES,
    ToyDetector,
    head_cfg,
    instances,
    random_boxes,
    toy_info,
)

from projects.kd.analysis.measure import peak_bytes
from projects.kd.commands.benchmark import icd_full_maps
from projects.kd.engine.optim import MAIN, build_optimizations
from projects.kd.errors import ConfigError, DataError
from projects.kd.functional.icd_values import value_distance
from projects.kd.heads.icd import ICD
from projects.kd.heads.icd_decoder import Cells, project


class TestICD(HeadContract):
    name = "ICD"
    node = SMALL

    @staticmethod
    def run(head, ctx):
        torch.manual_seed(11)  # the same draws for all contexts that are compared
        return HeadContract.run(head, ctx)

    def make_equal(self, head):
        head.student_values[0].load_state_dict(head.decoder.layers[0].value.state_dict())


class TestCentredICD(TestICD):
    node = {**SMALL, "CENTER": True}


# --- against the straightforward implementation -------------------------------------------------


@pytest.mark.parametrize(
    ("node", "boxes", "iteration"),
    [({}, 3, 0), ({"LAYERS": 2}, 3, 0), ({"MASK_PADDING": False}, 3, 0), ({}, 1, 0)]
    + [({"CENTER": True}, 3, 0), ({"CENTER": True, "MASK_PADDING": False, "LAYERS": 2}, 3, 0)]
    + [({"DETACH_ITERS": 5}, 3, 4), ({"NEGATIVES_PER_BOX": 0.0, "MAX_QUERIES": 2}, 4, 0)],
)
def test_values_and_gradients_equal_the_oracle(node, boxes, iteration):
    head, ctx = build(**node), context(boxes=boxes)
    ctx.iteration = iteration
    ctx.gt[1] = ctx.gt[1][:1]  # lists of different length
    torch.manual_seed(7)
    queries = head.queries(ctx)
    torch.manual_seed(7)
    found, expected = head(ctx), icd_full_maps.losses(head, ctx, queries)
    assert found.keys() == expected.keys()
    parameters = [*head.parameters(), *features(ctx)]
    if head.center:  # these cancel: their gradient is rounding
        parameters = [p for p in parameters if all(p is not x.bias for x in head.student_values)]
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(
            gradients(found[key], parameters), gradients(expected[key], parameters), strict=True
        ):
            if theirs is None or ours is None:
                assert ours is theirs
            else:
                scale = theirs.abs().max().item()
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * scale)


def test_the_oracle_masks_what_lies_in_the_padding():
    """The head cuts it off instead; both must be blind to it."""
    head, ctx = build(), context()
    torch.manual_seed(7)
    queries = head.queries(ctx)
    torch.manual_seed(7)
    before = head(ctx), icd_full_maps.losses(head, ctx, queries)
    for level in STRIDES:
        outside = ~ctx.valid_mask(level)
        for side in (ctx.student_features, ctx.teacher_features):
            side[level] = side[level].detach().masked_fill(outside, 1e4)
    torch.manual_seed(7)
    after = head(ctx), icd_full_maps.losses(head, ctx, queries)
    for old, new in zip(before, after, strict=True):
        for key in old:
            torch.testing.assert_close(old[key], new[key])


@pytest.mark.parametrize("size", [(3, 4), (2, 3)])
def test_projections_of_cells_are_linear_layers(size):
    torch.manual_seed(0)
    feature = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def run(feature, weight, bias):
        linear = SimpleNamespace(weight=weight, bias=bias)
        return project(linear, [Cells(feature, size)], 2).flatten(1)

    cut = feature[:, : size[0], : size[1]].flatten(1).T
    expected = torch.nn.functional.linear(cut, weight, bias)
    torch.testing.assert_close(run(feature, weight, bias), expected)
    assert torch.autograd.gradcheck(run, (feature, weight, bias))


# --- who learns from what -----------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["decoder", "uniform", "fgfi"])
@pytest.mark.parametrize(("iteration", "reaches_student"), [(9, False), (10, True)])
def test_gradients_are_isolated(attention, iteration, reaches_student):
    head, ctx = build(DETACH_ITERS=10, ATTENTION=attention), context()
    ctx.iteration = iteration
    losses = head(ctx)
    decoder = list(head.decoder.parameters())
    projection = list(head.student_values.parameters())
    teacher = list(ctx.teacher_features.values())

    def learns(loss, tensors):
        return [g is not None for g in gradients(loss, tensors)]

    distillation = losses["loss_kd_icd"]
    assert all(learns(distillation, projection))
    assert not any(learns(distillation, [*decoder, *teacher]))
    assert any(learns(distillation, features(ctx))) == reaches_student
    auxiliary = losses["loss_aux_icd_conf"] + losses["loss_aux_icd_box"]
    assert all(learns(auxiliary, decoder))
    assert not any(learns(auxiliary, [*projection, *teacher, *features(ctx)]))


def test_the_optimizer_of_the_head_has_the_decoder_and_the_student_projection(tmp_path):
    teacher = kd_models.write_teacher(tmp_path)
    cfg = kd_models.distill_cfg(
        teacher, heads=("ICD", "Mimic"), **{f"KD__ICD__{k}": v for k, v in SMALL.items()}
    )
    model = kd_models.build_wrapper(cfg)
    found = build_optimizations(cfg, model)
    assert list(found) == [MAIN, "ICD"]
    own = found["ICD"]
    assert type(own.optimizer) is torch.optim.AdamW
    parameters = [p for group in own.optimizer.param_groups for p in group["params"]]
    assert set(parameters) == set(model.heads["ICD"].parameters())
    assert own.optimizer.param_groups[0]["weight_decay"] == 1e-4
    assert (own.clip.kind, own.clip.limit) == ("full_model", 0.01)
    main = found[MAIN].optimizer
    assert not set(parameters) & {p for group in main.param_groups for p in group["params"]}
    losses = kd_models.losses_at(model, kd_models.make_batch())
    assert {"loss_kd_icd", "loss_aux_icd_conf", "loss_aux_icd_box"} <= losses.keys()
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["decoder", "uniform", "fgfi"])
def test_images_without_objects(attention):
    head, ctx = build(ATTENTION=attention), context(boxes=0)
    losses = head(ctx)
    assert losses["loss_aux_icd_box"] == 0
    assert losses["loss_aux_icd_conf"] > 0  # one fake an image
    assert (losses["loss_kd_icd"] == 0) == (attention != "uniform")
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_an_image_without_objects_counts_in_the_mean():
    head, ctx = build(), context()
    ctx.gt[1] = ctx.gt[1][:0]
    torch.manual_seed(3)
    alone = context(sizes=((40, 56),))
    for level in STRIDES:
        alone.student_features[level] = ctx.student_features[level][:1]
        alone.teacher_features[level] = ctx.teacher_features[level][:1]
    alone.gt = ctx.gt[:1]
    expected = head(alone)["loss_kd_icd"] / 2
    torch.manual_seed(3)
    torch.testing.assert_close(head(ctx)["loss_kd_icd"], expected)


def test_no_annotations_is_an_error():
    head, ctx = build(), context()
    ctx.gt = None
    with pytest.raises(DataError, match="KD.HEADS: ICD needs boxes"):
        head(ctx)


def test_sparse_images_do_not_pay_for_crowded_ones():
    head, ctx = build(), context()
    generator = torch.Generator().manual_seed(0)
    crowd = random_boxes(40, 40, 56, generator)
    ctx.gt = [instances((40, 56), crowd), ctx.gt[1][:0]]
    queries = head.queries(ctx)
    assert queries.counts == [(40, 200), (0, 1)]
    assert len(queries.encoded.vectors) == 241


def test_a_crowd_needs_no_attention_maps():
    size, boxes = (512, 512), 900
    generator = torch.Generator().manual_seed(0)
    ctx = context(sizes=(size,), canvas=size, boxes=0)
    ctx.gt = [instances(size, random_boxes(boxes, *size, generator))]
    head = build()
    tokens = sum((512 // stride) ** 2 for stride in STRIDES.values())

    def step():
        sum(head(ctx).values()).backward()

    one_map = 4 * boxes * tokens * SMALL["HEADS"]
    assert peak_bytes(step) < 0.6 * one_map


def test_the_teacher_may_have_finer_levels():
    head, ctx = build(), context()
    torch.manual_seed(3)
    expected = head(ctx)
    for level, feature in ctx.teacher_features.items():
        ctx.teacher_features[level] = feature.repeat_interleave(2, 2).repeat_interleave(2, 3)
        ctx.teacher_strides[level] = STRIDES[level] // 2
    torch.manual_seed(3)
    found = head(ctx)
    for key in found:
        torch.testing.assert_close(found[key], expected[key])


# --- the ablation -------------------------------------------------------------------------------


def test_uniform_attention_weighs_all_valid_cells_alike():
    head, ctx = build(ATTENTION="uniform"), context()
    student, teacher = head.tokens(ctx)
    expected = 0.0
    for own, other in zip(student, teacher, strict=True):
        values = project(head.student_values[0], own, 4)
        target = project(head.decoder.layers[0].value, other, 4)
        expected += value_distance(values, target, torch.ones(4, len(values))) / 2
    torch.testing.assert_close(head(ctx)["loss_kd_icd"], head.weight * expected)


def test_fgfi_attention_is_its_mask():
    head, ctx = build(ATTENTION="fgfi"), context()
    masks = head.imitation_mask.masks(ctx)
    flat = torch.cat([masks[level].flatten(1) for level in STRIDES], dim=1).float()
    assert 0 < flat.mean() < 1
    queries = head.queries(ctx)
    oracle = icd_full_maps.losses(head, ctx, queries)["loss_kd_icd"]
    before = [f.clone() for f in features(ctx)]
    found = head(ctx)["loss_kd_icd"]
    assert found != oracle
    # cells outside of the mask do not matter
    for level, old in zip(STRIDES, before, strict=True):
        ctx.student_features[level] = old.masked_fill(~masks[level][:, None], 5.0)
    torch.testing.assert_close(head(ctx)["loss_kd_icd"], found)


def test_fgfi_attention_is_nothing_where_there_are_no_anchors():
    cfg = head_cfg("ICD", **SMALL, ATTENTION="fgfi")
    student = ToyDetector()
    del student.head_in_features[-1]
    student.anchor_generator = DefaultAnchorGenerator(
        sizes=[[16.0], [32.0]], aspect_ratios=[[1.0]], strides=[8, 16]
    )
    infos = toy_info(cfg=cfg, model=student), toy_info(TEACHER)
    # by default the levels that the student's head reads
    assert ICD(**ICD.from_config(cfg, *infos)).levels == ("p3", "p4")
    cfg.KD.ICD.LEVELS = ("p3", "p4", "p5")
    head, ctx = ICD(**ICD.from_config(cfg, *infos)), context()
    assert head.levels == ("p3", "p4", "p5")
    head(ctx)["loss_kd_icd"].backward()
    assert [bool(feature.grad.any()) for feature in features(ctx)] == [True, True, False]
    cfg.KD.ICD.LEVELS = ("p5",)
    with pytest.raises(ConfigError, match="KD.ICD.LEVELS .*which are p3, p4"):
        ICD.from_config(cfg, *infos)


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("HEADS", 3), ("HEADS", 0), ("HEADS", 16), ("JITTER", 0.5), ("JITTER", -0.1), ("LAYERS", 0)]
    + [("ATTENTION", "all"), ("PRIORS", "coco"), ("MAX_QUERIES", 0), ("DETACH_ITERS", -1)]
    + [("NEGATIVES_PER_BOX", -1.0), ("FFN_DIM", 0)],
)
def test_settings_that_cannot_work(key, value):
    with pytest.raises(ConfigError, match=f"KD.ICD.{key}"):
        build(**{key: value})


def test_levels_of_different_width_are_refused():
    cfg = head_cfg("ICD", **SMALL)
    teacher = ToyDetector(TEACHER)
    teacher.backbone.output_shape()["p4"] = ShapeSpec(channels=7, stride=16)
    cfg.MODEL.RETINANET.NUM_CLASSES = 5
    with pytest.raises(ConfigError, match="teacher's differ in width: p3 10, p4 7, p5 10"):
        ICD.from_config(cfg, toy_info(STUDENT, cfg), toy_info(model=teacher))


def test_weights_multiply_their_losses():
    ctx, factors = context(), {"WEIGHT": 3.0, "CONF_WEIGHT": 5.0, "BOX_WEIGHT": 7.0}
    found = []
    for node in (dict.fromkeys(factors, 1.0), factors):
        head = build(**node)
        torch.manual_seed(3)
        found.append(list(head(ctx).values()))
    for (one, other), factor in zip(zip(*found, strict=True), factors.values(), strict=True):
        torch.testing.assert_close(factor * one, other)
