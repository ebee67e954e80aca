"""KD.TEACHER.CLASS_MAP with torchvision's detectors, which count labels from the background on."""

import copy

import foreign_models  # noqa: F401  # registers kd_tiny_frcnn and others
import kd_models
import pytest
import torch
from detectron2.data import MetadataCatalog

from projects.kd import ConfigError, build_teacher
from projects.kd.commands.evaluate import teacher as evaluate_teacher
from projects.kd.detectors import class_layers
from projects.kd.foreign import build_foreign
from projects.kd.modeling.class_layers import choose_classes, classes_of

OWN = ["cat", "heart", "dog", "house", "bus"]
CHOSEN = [3, 0]  # labels 4 and 1


def cfg_of(name, classes=(), **overrides):
    opts = ["CLASSES", list(classes)] if classes else []
    return kd_models.distill_cfg(
        (f"torchvision://{name}", ""),
        KD__TEACHER__ALLOW_MISSING=True,
        KD__TEACHER__OPTS=opts,
        **overrides,
    )


def model_of(name, classes=OWN):
    torch.manual_seed(4)
    return build_foreign(cfg_of(name, classes).KD.TEACHER, "cpu")


@pytest.mark.parametrize(
    ("name", "number"), [("kd_tiny_mask_rcnn", 3), ("kd_tiny_retinanet", 1), ("kd_tiny_fcos", 1)]
)
def test_layers_keep_the_background_and_the_labels_of_the_chosen_classes(name, number):
    model = model_of(name)
    layers = class_layers(model)
    assert len(layers) == number and classes_of(model) == {"thing_classes": 5}
    before = {path: copy.deepcopy(model.get_submodule(path)) for path in layers}
    choose_classes(model, {"thing_classes": CHOSEN})
    assert model.class_of.tolist() == [-1, 0, 1] and classes_of(model) == {"thing_classes": 2}
    for path, layer in layers.items():
        old, new = before[path].weight, model.get_submodule(path).weight
        per_label = old.unflatten(0, (-1, 6, layer.inner))
        assert torch.equal(new, per_label[:, [0, 4, 1]].flatten(0, 2))
    own = model.backbone.model
    if hasattr(own, "head"):
        assert own.head.classification_head.num_classes == 3


def test_a_dense_detector_finds_of_the_chosen_classes_what_it_found_before():
    model, image = model_of("kd_tiny_retinanet"), kd_models.make_batch(sizes=((64, 64),))[0]
    own = model.backbone.model
    own.detections_per_img = own.topk_candidates = 10_000
    own.nms_thresh = 1.0  # every box stays
    torch.nn.init.normal_(own.head.classification_head.cls_logits.weight, std=0.3)
    (before,) = model([image])
    choose_classes(model, {"thing_classes": CHOSEN})
    (after,) = model([image])
    before, after = before["instances"], after["instances"]
    for place, index in enumerate(CHOSEN):
        old, new = before[before.pred_classes == index], after[after.pred_classes == place]
        assert len(old) == len(new) > 0
        torch.testing.assert_close(new.scores, old.scores)
        # equal scores have no order
        mean = [(x.scores[:, None] * x.pred_boxes.tensor).mean(0) for x in (new, old)]
        torch.testing.assert_close(*mean)
    assert set(after.pred_classes.tolist()) == {0, 1}


def test_all_of_coco_in_its_order_leaves_the_labels_without_a_class():
    model = model_of("kd_tiny_frcnn", ())
    before, labels = dict(model.named_parameters()), model.class_of.tolist()
    choose_classes(model, {"thing_classes": list(range(80))})
    assert all(before[name] is value for name, value in model.named_parameters())
    assert model.class_of.tolist() == labels and len(labels) == 91
    choose_classes(model, {"thing_classes": [79, 11]})  # ids 90 and 13
    rows = before["backbone.model.roi_heads.box_predictor.cls_score.weight"][[0, 90, 13]]
    assert torch.equal(model.backbone.model.roi_heads.box_predictor.cls_score.weight, rows)


def test_by_name_the_teacher_predicts_in_the_students_numbers():
    names = MetadataCatalog.get("shapes_train").thing_classes
    cfg = cfg_of("kd_tiny_mask_rcnn", OWN, KD__TEACHER__CLASS_MAP=["by_name"])
    shared = [names.index("heart"), names.index("house")]
    teacher = build_teacher(cfg)
    assert teacher.names["thing_classes"] == [names[k] for k in sorted(shared)]
    assert teacher.shared["thing_classes"].known == tuple(sorted(shared))
    detector = evaluate_teacher.build(cfg, student_input=False)
    assert detector.names["thing_classes"] == names
    image = kd_models.make_batch(sizes=((64, 64),))[0]
    found = detector.model([{**image, "height": 64, "width": 64}])[0]["instances"]
    assert set(found.pred_classes.tolist()) == set(shared)
    assert found.pred_masks.shape == (len(found), 64, 64)


@pytest.mark.parametrize(
    ("name", "pairs", "line"),
    [
        ("torchvision://kd_tiny_frcnn", ["by_name"], "no class has the same name on both sides"),
        ("torchvision://kd_tiny_frcnn", [["drop", "carr"]], "teacher has no class 'carr'; did you"),
        ("torchvision://kd_tiny_frcnn", [["drop", 80]], "teacher has no class 80; it has 0 to 79"),
        ("timm://resnet10t", ["by_name"], "the teacher predicts none of the student's kinds of"),
    ],
)
def test_maps_that_match_nothing_are_one_line(name, pairs, line):
    cfg = cfg_of("", KD__TEACHER__CLASS_MAP=pairs)
    cfg.KD.TEACHER.CONFIG_FILE = name
    with pytest.raises(ConfigError, match=line) as error:
        build_teacher(cfg)
    assert "\n" not in str(error.value)
