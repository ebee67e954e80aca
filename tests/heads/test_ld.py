"""LD keeps to the contract on GFL; normalisers, levels, and what it refuses."""

from __future__ import annotations

import functools

import pytest
import torch
from dense_toys import toy_fcos, toy_gfl
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from kd_testing import CHANNELS, STRIDES, head_cfg, toy_info
from prediction_contract import DenseContract, prediction_context

from projects.kd.errors import ConfigError
from projects.kd.functional.atss import atss_assign, atss_candidates
from projects.kd.functional.ld import class_divergence, side_divergence, valuable_region
from projects.kd.heads import build_imitation_heads

gfl_context = functools.partial(prediction_context, toy=toy_gfl)


class TestLD(DenseContract):
    name = "LD"
    toy = staticmethod(toy_gfl)
    may_skip_levels = True
    blind_to_canvas = "none"  # candidates of the assignment lie in the padding too


def build(student=None, teacher=None, common=None, **node):
    infos = [toy_info(CHANNELS, model=x or toy_gfl()) for x in (student, teacher)]
    return build_imitation_heads(head_cfg("LD", common, **node), *infos)["LD"]


def run(head, ctx):
    with EventStorage():
        return head(ctx)


def by_rows(ctx, distance="paper"):
    """Sums of the terms, over levels: main, its weights, region, its weights; classes a level."""
    model = ctx.student
    anchors = [x.tensor for x in model.anchor_generator(list(ctx.student_features.values()))]
    every = torch.cat(anchors)
    main, vlr, weights, near = (torch.zeros(()) for _ in range(4))
    classes = []
    index, region = [], []
    for instances in ctx.gt:
        truth = instances.gt_boxes.tensor
        index.append(atss_assign(anchors, truth))
        candidates = atss_candidates(anchors, truth)
        region.append(valuable_region(every, truth, candidates, distance))
    counts = [len(x) for x in anchors]
    positive = torch.stack(index).ge(0).split(counts, 1)
    region = torch.stack(region).split(counts, 1)
    both = [x["dense"] for x in (ctx.student_outputs, ctx.teacher_outputs)]
    for place, level in enumerate(STRIDES):
        inside = ctx.valid_mask(level).flatten(1)
        rows = [x.bins[place].permute(0, 2, 3, 1).unflatten(3, (4, 5)).flatten(1, 2) for x in both]
        logits = [x.logits[place].permute(0, 2, 3, 1).flatten(1, 2) for x in both]
        found = positive[place] & inside
        weight = logits[0][found].detach().sigmoid().amax(1)
        main = main + side_divergence(*(x[found] for x in rows), weight)
        weights = weights + weight.sum()
        value = region[place] * inside
        vlr = vlr + side_divergence(*(x[value > 0] for x in rows), value[value > 0])
        near = near + value.sum()
        term = class_divergence(*(x[found] for x in logits))
        classes.append(term / max(found.sum(), 1))
    return main, weights, vlr, near, sum(classes)


@pytest.mark.parametrize("distance", ["paper", "released"])
def test_terms_with_both_normalisers(distance):
    ctx = gfl_context(boxes=5)
    main, weights, vlr, near, classes = by_rows(ctx, distance)
    assert weights > 0 and near > 0
    node = {"WEIGHT": 2.0, "DISTANCE": distance}
    found = run(build(**node), ctx)
    # two images, as published
    torch.testing.assert_close(found["loss_kd_ld_main"], 2 * 0.25 * main / 4)
    torch.testing.assert_close(found["loss_kd_ld_vlr"], 2 * 0.25 * vlr / 16)
    torch.testing.assert_close(found["loss_kd_ld_cls"], 2 * 10.0 * classes)
    found = run(build(NORMALISER="weights", **node), ctx)
    torch.testing.assert_close(found["loss_kd_ld_main"], 2 * 0.25 * main / 4 / weights)
    torch.testing.assert_close(found["loss_kd_ld_vlr"], 2 * 0.25 * vlr / 16 / near)


def test_by_images_the_terms_are_those_of_two_images():
    """The same image once and four times."""
    one, four = (gfl_context(sizes=((64, 64),) * count) for count in (1, 4))
    for outputs, many in (
        (one.student_outputs, four.student_outputs),
        (one.teacher_outputs, four.teacher_outputs),
    ):
        for name, part in outputs["dense"].parts().items():
            for x, y in zip(part, many["dense"].parts()[name], strict=True):
                y.data.copy_(x.detach().expand_as(y))
    four.gt = list(one.gt) * 4
    small, large = (run(build(), ctx) for ctx in (one, four))
    for key, value in small.items():
        assert value > 0
        torch.testing.assert_close(large[key], value)


def test_teacher_gets_no_gradient_and_boxes_without_area_are_finite():
    ctx = gfl_context()
    ctx.gt[0].gt_boxes = Boxes(torch.tensor([[8.0, 8, 8, 8], [0, 0, 30, 30], [3, 3, 4, 60]]))
    sum(run(build(), ctx).values()).backward()
    assert any(x.grad.any() for x in ctx.student_outputs["dense"].bins)
    assert all(x.grad.isfinite().all() for x in ctx.student_outputs["dense"].bins)
    assert all(x.grad is None for x in ctx.teacher_outputs["dense"].bins)


def test_classes_are_left_to_bckd_where_both_are_used():
    assert build().weights == (0.25, 0.25, 10.0)
    infos = [toy_info(CHANNELS, model=toy_gfl()) for _ in range(2)]
    heads = build_imitation_heads(head_cfg("LD", {"HEADS": ("LD", "BCKD")}), *infos)
    assert heads["LD"].weights == (0.25, 0.25, 0.0)
    losses = run(heads["LD"], gfl_context())
    assert losses.keys() == {"loss_kd_ld_main", "loss_kd_ld_vlr"}


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"TEMPERATURE": 0.0}, "KD.LD.TEMPERATURE is 0"),
        ({"KD_TEMPERATURE": -1.0}, "KD.LD.KD_TEMPERATURE is -1"),
        ({"NORMALISER": "none"}, "KD.LD.NORMALISER.*images, weights"),
        ({"DISTANCE": "iou"}, "KD.LD.DISTANCE.*paper, released"),
        ({"VLR_WEIGHT": -2.0}, "KD.LD.VLR_WEIGHT is -2"),
    ],
)
def test_wrong_keys(node, words):
    with pytest.raises(ConfigError, match=words):
        build(**node)


def test_other_bins_and_detectors_are_refused():
    with pytest.raises(ConfigError, match=r"KD.LD: .* 5 bins and the teacher's 9.*REG_MAX"):
        build(teacher=toy_gfl(bins=9))
    with pytest.raises(ConfigError, match="LD does not work with a FCOS student.*GFL"):
        build(student=toy_fcos(), teacher=toy_fcos())
    with pytest.raises(ConfigError, match="same family"):
        build(teacher=toy_fcos())
