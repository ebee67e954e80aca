"""A detector with some of its classes says of these what it said before."""

from __future__ import annotations

import copy

import kd_models
import pytest
import torch
from kd_detectors import detector_cfg
from segmentation import segmentor_cfg
from torch import nn

from projects.kd.detectors import ClassLayer, class_layers
from projects.kd.errors import ConfigError
from projects.kd.modeling.class_layers import choose_classes, classes_of

CHOSEN = [2, 0]


def model_of(name):
    if name == "ConditionalDETR":
        return kd_models.build(kd_models.tiny_cfg(name))
    if name == "SemanticSegmentor":
        return kd_models.build(segmentor_cfg())
    return kd_models.build(detector_cfg(name))


def expected_rows(channels: int, layer: ClassLayer, total: int) -> list[int]:
    """Rows by the words of ClassLayer, one after another."""
    found = [
        (o, CHOSEN.index(k), i, (o * total + k) * layer.inner + i)
        for o in range((channels - layer.background) // (total * layer.inner))
        for k in range(total)
        if k in CHOSEN
        for i in range(layer.inner)
    ]
    return [row for *_, row in sorted(found)] + [channels - 1] * layer.background


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("RetinaNet", 1),
        ("FCOS", 1),
        ("GFL", 1),
        ("RepPoints", 1),
        ("Mask R-CNN", 3),
        ("Cascade Mask R-CNN", 7),
        ("Panoptic FPN", 4),
        ("ConditionalDETR", 1),
        ("SemanticSegmentor", 1),
    ],
)
def test_layers_keep_the_rows_of_the_chosen_classes(name, number):
    model = model_of(name)
    totals = classes_of(model)
    layers = class_layers(model)
    assert len(layers) == number and "num_classes" not in str(layers)
    before = {path: copy.deepcopy(model.get_submodule(path)) for path in layers}
    choose_classes(model, dict.fromkeys(totals, CHOSEN))
    for path, layer in layers.items():
        old, new = before[path], model.get_submodule(path)
        rows = expected_rows(len(old.weight), layer, totals[layer.kind])
        if len(old.weight) == layer.inner:  # boxes of a cascade are those of all classes
            rows = list(range(layer.inner))
        assert new is not old and isinstance(new, type(old))
        assert torch.equal(new.weight, old.weight[rows]) and torch.equal(new.bias, old.bias[rows])
        size = new.out_features if isinstance(new, nn.Linear) else new.out_channels
        assert size == len(rows)
    assert classes_of(model) == dict.fromkeys(totals, len(CHOSEN))


def test_all_classes_in_their_order_change_nothing():
    model = model_of("Mask R-CNN")
    before = dict(model.named_parameters())
    choose_classes(model, {"thing_classes": [0, 1, 2]})
    assert all(before[name] is value for name, value in model.named_parameters())


@pytest.mark.parametrize("name", ["RetinaNet", "Mask R-CNN", "ConditionalDETR"])
def test_detections_are_those_of_the_chosen_classes(name):
    """Where scores of classes do not compete with each other, they are the same ones."""
    model = model_of(name).eval()
    narrow = copy.deepcopy(model)
    choose_classes(narrow, {"thing_classes": CHOSEN})
    batch = kd_models.make_batch(sizes=((64, 64),))
    with torch.no_grad():
        (whole,), (found,) = model(batch), narrow(batch)
    whole, found = whole["instances"], found["instances"]
    assert len(found) and set(found.pred_classes.tolist()) <= {0, 1}
    if name == "RetinaNet":
        kept = whole[torch.isin(whole.pred_classes, torch.tensor(CHOSEN))]
        own = torch.tensor(CHOSEN)[found.pred_classes]
        both = sorted(
            zip(kept.scores.tolist(), kept.pred_classes.tolist(), strict=True), reverse=True
        )
        mine = sorted(zip(found.scores.tolist(), own.tolist(), strict=True), reverse=True)
        shared = min(len(both), len(mine), 10)
        for (a, x), (b, y) in zip(both[:shared], mine[:shared], strict=True):
            assert x == y and abs(a - b) < 1e-6


def test_layers_of_unknown_form_are_refused():
    model = model_of("RetinaNet")
    model.num_classes = 2  # 3 channels
    with pytest.raises(ConfigError, match="head.cls_score has 3 channels.*multiple of 2 classes"):
        choose_classes(model, {"thing_classes": [1]})
    model = model_of("RetinaNet")
    model.head.cls_score = nn.Sequential(model.head.cls_score)
    with pytest.raises(ConfigError, match="KD.TEACHER.CLASS_MAP: .*head.cls_score is a Sequential"):
        choose_classes(model, {"thing_classes": [1]})
