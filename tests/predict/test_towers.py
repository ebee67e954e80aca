"""Heads resumed from inside their towers give what they give from features."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from projects.kd.errors import ConfigError
from projects.kd.modeling.gfl import GFLHead
from projects.kd.predict.fcos import FCOSPredictor
from projects.kd.predict.gfl import GFLPredictor
from projects.kd.predict.retinanet import RetinaNetPredictor
from projects.kd.predict.towers import cycles, tower_depth, tower_width
from projects.kd.taps import FeatureTaps

CONVS, WIDTH, LEVELS = 3, 8, 3


def head_of(kind, norm, eval_mode=False):
    torch.manual_seed(0)
    shared = {
        "input_shape": [ShapeSpec(channels=6, stride=8)] * LEVELS,
        "num_classes": 2,
        "conv_dims": [8, 7, WIDTH],
        "norm": norm,
    }
    if kind is RetinaNetPredictor:
        head = RetinaNetHead(num_anchors=3, **shared)
    elif kind is FCOSPredictor:
        head = FCOSHead(**shared)
    else:
        head = GFLHead(reg_max=4, **shared)
        head.scales.data.copy_(torch.tensor([0.5, 1.0, 2.0]))
    for parameter in head.parameters():
        parameter.data.normal_(std=0.3)
    return head.train(not eval_mode)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        (RetinaNetPredictor, ""),
        (RetinaNetPredictor, "BN"),
        (FCOSPredictor, ""),
        (GFLPredictor, ""),
    ],
)
def test_resuming_gives_what_the_head_gives(kind, norm, depth):
    model = nn.Module()
    model.head = head_of(kind, norm, eval_mode=True)
    if norm:  # other statistics at every level
        for place, module in enumerate(model.head.modules()):
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.fill_(0.1 * place)
    assert cycles(model.head) == bool(norm)
    predictor = kind(model)
    features = [torch.randn(2, 6, 5 - x, 4) for x in range(LEVELS)]
    taps = FeatureTaps(model, predictor.tower_taps(depth))
    with taps.record():
        expected = model.head(features)
    towers = {tap: taps[tap] if depth else features for tap in ("tower_cls", "tower_box")}
    found = predictor.resume(towers, depth)
    assert list(found.parts()) == list(kind.outputs)
    for part, own in zip(found.parts().values(), expected, strict=True):
        for x, y in zip(part, own, strict=True):
            torch.testing.assert_close(x, y)
    if not norm:  # one level alone, at its place
        one = {tap: [None, maps[1]] for tap, maps in towers.items()}
        alone = predictor.resume(one, depth, places=(0, 1))
        for part, own in zip(alone.parts().values(), expected, strict=True):
            assert part[0] is None
            torch.testing.assert_close(part[1], own[1])


def test_before_the_relu_is_what_the_relu_reads():
    model = nn.Module()
    model.head = head_of(RetinaNetPredictor, "BN")
    predictor = RetinaNetPredictor(model)
    before = FeatureTaps(model, predictor.tower_taps(2, before_relu=True))
    after = FeatureTaps(model, predictor.tower_taps(2))
    with before.record(), after.record():
        model.head([torch.randn(2, 6, 4, 4) for _ in range(LEVELS)])
    for tap in ("tower_cls", "tower_box"):
        assert len(before[tap]) == LEVELS
        for x, y in zip(before[tap], after[tap], strict=True):
            assert x.lt(0).any() and torch.equal(x.relu(), y)


def test_the_rest_of_a_head_is_a_fixed_function():
    model = nn.Module()
    model.head = head_of(RetinaNetPredictor, "BN")
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    maps = [torch.randn(2, 8, 4, 4, requires_grad=True) for _ in range(LEVELS)]
    towers = {"tower_cls": maps, "tower_box": maps}
    found = RetinaNetPredictor(model).resume(towers, 1)
    sum(x.square().sum() for part in found.parts().values() for x in part).backward()
    assert all(x.grad.any() for x in maps)
    assert all(p.grad is None for p in model.head.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.head.state_dict().items())


def test_depths_widths_and_heads_without_towers():
    head = head_of(GFLPredictor, "")
    assert tower_depth(head, "student") == CONVS
    assert [tower_width(head, k) for k in range(CONVS + 1)] == [6, 8, 7, WIDTH]
    with pytest.raises(ConfigError, match="teacher head with the towers cls_subnet and bbox_subn"):
        tower_depth(nn.Linear(2, 2), "teacher")
    head.bbox_subnet = head.bbox_subnet[:2]
    with pytest.raises(ConfigError, match="equal depth in the student's head"):
        tower_depth(head, "student")
    assert (
        RetinaNetPredictor(SimpleNamespace(head=head_of(RetinaNetPredictor, ""))).tower_taps(0)
        == {}
    )
