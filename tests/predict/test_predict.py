"""What detectors offer to heads on predictions: fixed functions, anchors, orders, registration."""

from __future__ import annotations

import copy

import kd_models
import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from heads.test_csa import build
from kd_detectors import detector_cfg
from kd_testing import toy_retinanet
from torch import nn

from projects.kd import detectors
from projects.kd.detectors import register_detector
from projects.kd.errors import ConfigError
from projects.kd.predict import (
    AnchorMatch,
    Predictor,
    call_constant,
    predictor_for,
    with_modules,
)
from projects.kd.predict.dense import decode, flatten_cells, match_anchors, unflatten_cells
from projects.kd.predict.retinanet import RetinaNetPredictor, normaliser_at_rest


def test_a_constant_call_passes_gradients_and_leaves_the_module_alone():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(2, 2, 6, 6, requires_grad=True)
    constant = call_constant(module, x)
    constant.square().sum().backward()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    other = x.detach().clone().requires_grad_()
    free = call_constant(module, other, constant=False)
    free.square().sum().backward()
    torch.testing.assert_close(free, constant)
    torch.testing.assert_close(other.grad, x.grad)
    assert all(p.grad.any() for p in module[0].parameters())
    assert not torch.equal(before["1.running_mean"], module[1].running_mean)


def test_cells_and_anchors_are_in_detectron2s_order():
    torch.manual_seed(0)
    maps = [torch.randn(2, 3 * 5, 4, 6), torch.randn(2, 3 * 5, 2, 3)]
    flat = flatten_cells(maps, 5)
    for ours, x in zip(flat, maps, strict=True):
        assert torch.equal(ours, permute_to_N_HWA_K(x, 5))
    labels, grids = torch.cat(flat, dim=1)[..., 2], [x.shape[-2:] for x in maps]
    for x, level in zip(maps, unflatten_cells(labels, grids), strict=True):
        assert torch.equal(level, x.unflatten(1, (3, 5))[:, :, 2])


def test_boxes_are_decoded_in_their_places():
    torch.manual_seed(0)
    generator = anchors((8,), [[16.0, 24.0]])
    deltas = torch.randn(2, 2 * 4, 3, 5)
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    mask[1, :, 2] = False
    spoiled = deltas.masked_fill(~mask, float("inf"))
    (own,) = generator([deltas])
    found = decode(spoiled, own, Box2BoxTransform((1.0, 1.0, 1.0, 1.0)), mask)
    assert found.shape == (2, 2, 3, 5, 4) and found.isfinite().all()
    for n, a, i, j in ((0, 0, 0, 0), (0, 1, 2, 3), (1, 1, 1, 4), (1, 0, 2, 2)):
        dx, dy, dw, dh = (deltas[n, 4 * a : 4 * a + 4, i, j] * mask[n, 0, i, j]).tolist()
        x, y, side = 8 * j, 8 * i, (16.0, 24.0)[a]
        width, height = (side * torch.tensor(d).exp().item() for d in (dw, dh))
        x, y = x + dx * side, y + dy * side
        expected = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        torch.testing.assert_close(found[n, a, i, j], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def anchors(strides, sizes, ratios=(1.0,), offset=0.0):
    return DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[list(ratios)], strides=list(strides), offset=offset
    )


STRIDES, SIZES = (8, 16, 32), [[32.0], [64.0], [128.0]]


@pytest.mark.parametrize(
    ("teacher", "scale", "expected"),
    [
        # equal resolution
        (anchors(STRIDES, SIZES), 1.0, {"p3": (0, 1), "p4": (1, 1), "p5": (2, 1)}),
        # double: the next level, whose cells are the student's
        (anchors(STRIDES, SIZES), 2.0, {"p3": (1, 1), "p4": (2, 1)}),
        # double, with anchors of twice the size: every second cell
        (
            anchors(STRIDES, [[64.0], [128.0], [256.0]]),
            2.0,
            {"p3": (0, 2), "p4": (1, 2), "p5": (2, 2)},
        ),
        # half: the level before
        (anchors(STRIDES, SIZES), 0.5, {"p4": (0, 1), "p5": (1, 1)}),
        (anchors(STRIDES, [[32.0], [60.0], [128.0]]), 1.0, {"p3": (0, 1), "p5": (2, 1)}),
    ],
)
def test_where_a_teacher_predicts_for_the_students_anchors(teacher, scale, expected):
    student = anchors(STRIDES, SIZES)
    found = match_anchors(student, teacher, ("p3", "p4", "p5"), scale, "KD.OUTPUTKD")
    assert {level: (match.index, match.step) for level, match in found.items()} == expected
    # the very same boxes
    grids = {8: (8, 12), 16: (4, 6), 32: (2, 3)}
    ours = student([torch.zeros(1, 1, *grids[s]) for s in STRIDES])
    sizes = [[round(scale * x) for x in grids[s]] for s in STRIDES]
    theirs = teacher([torch.zeros(1, 1, *size) for size in sizes])
    for level, match in found.items():
        place = ("p3", "p4", "p5").index(level)
        grid = theirs[match.index].tensor.view(*sizes[match.index], 4).permute(2, 0, 1)[None]
        own = ours[place].tensor.view(*grids[STRIDES[place]], 4).permute(2, 0, 1)[None]
        torch.testing.assert_close(match.select(grid) / scale, own)


@pytest.mark.parametrize(
    "teacher",
    [
        anchors(STRIDES, [[40.0], [80.0], [160.0]]),
        anchors(STRIDES, SIZES, ratios=(0.5, 1.0)),
        anchors(STRIDES, SIZES, ratios=(2.0,)),
        anchors(STRIDES, SIZES, offset=0.5),
        anchors((16, 32, 64), SIZES),
    ],
)
def test_other_anchors_are_refused(teacher):
    with pytest.raises(ConfigError, match=r"KD\.X: .*none of the student's anchors.*32x32") as info:
        match_anchors(anchors(STRIDES, SIZES), teacher, ("p3", "p4", "p5"), 1.0, "KD.X")
    assert "\n" not in str(info.value)


def test_selecting_cells():
    values = torch.arange(24.0).view(1, 1, 4, 6)
    assert torch.equal(AnchorMatch(0).select(values), values)
    assert AnchorMatch(0, 2, 1).select(values).flatten().tolist() == [7, 9, 11, 19, 21, 23]


def test_the_normaliser_is_read_and_not_moved():
    model = toy_retinanet()
    model.loss_normalizer = 7.0
    with pytest.raises(RuntimeError), normaliser_at_rest(model):
        assert model._ema_update("loss_normalizer", 1000, 100) == 7.0
        assert model._ema_update("another", 1000, 100) == 100
        raise RuntimeError
    assert model._ema_update("loss_normalizer", 17, 100) == pytest.approx(8.0)
    assert model.loss_normalizer == pytest.approx(8.0)


def test_registration_by_meta_arch_base_class_and_fit(monkeypatch):
    class Arch(nn.Module):
        pass

    class Derived(Arch):
        roi_heads = nn.Identity()

    class Large(Predictor):
        name = "large detectors"

        @classmethod
        def fits(cls, model):
            return getattr(model, "large", False)

    class Any(Predictor):
        name = "detectors"

    monkeypatch.setattr(detectors, "_DETECTORS", {})
    with pytest.raises(ConfigError, match="CSA does not work with the student Derived with Ident"):
        predictor_for(Derived(), "CSA")
    register_detector("Arch", predictor=Large)
    with pytest.raises(ConfigError, match="the teacher Arch .*; it works with large detectors"):
        predictor_for(Arch(), "OutputKD", "teacher")
    register_detector("Arch", predictor=Any)
    assert type(predictor_for(Derived())) is Any
    model = Derived()
    model.large = True
    found = predictor_for(model)
    assert type(found) is Large and found.model is model
    assert predictor_for(model) is found, "made once"
    assert predictor_for(copy.deepcopy(model)).model is not model


def test_a_predictor_of_ones_own_may_name_no_modules(monkeypatch):
    class Silent(RetinaNetPredictor):
        name = "Silent"
        modules = ()

    monkeypatch.setattr(detectors, "_DETECTORS", {})
    register_detector("RetinaNet", predictor=Silent)
    assert build(HEAD="student").head.parts is None
    with pytest.raises(ConfigError, match=r"^KD\.CSA\.HEAD 'copy': .*Silent.*Predictor\.modules"):
        build(HEAD="copy")


def test_a_view_shares_all_but_the_exchanged_modules():
    model = kd_models.build(detector_cfg("Faster R-CNN"))
    before = dict(model.named_modules())
    paths = predictor_for(model).modules
    others = {path: nn.Identity() for path in paths}
    view = with_modules(model, others)
    assert dict(model.named_modules()) == before, "the model is as it was"
    for path, module in before.items():
        owners = [x for x in paths if x.startswith(f"{path}.") or path in ("", x)]
        if any(path.startswith(f"{x}.") for x in paths):
            continue
        assert (view.get_submodule(path) is module) == (not owners), path
    assert all(view.get_submodule(path) is others[path] for path in paths)
    assert view.roi_heads.box_pooler is model.roi_heads.box_pooler
