"""torchvision's detectors as teachers: their features, their detections, their class numbers."""

import os
from pathlib import Path

import foreign_models  # noqa: F401  # registers kd_tiny_frcnn and others
import kd_models
import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn
from torchvision.models import get_model_weights

from projects.kd import ConfigError, build_teacher
from projects.kd.commands.evaluate import teacher as evaluate_teacher
from projects.kd.foreign import build_foreign, torchvision_teacher
from projects.kd.foreign.torchvision_teacher import norm_epsilon

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("KD_TEST_DATA", ROOT.parent / "shared" / "data"))
RANDOM = {"KD__TEACHER__ALLOW_MISSING": True}


def cfg_of(name: str, weights: str = "", heads=("Mimic",), **overrides):
    """Of a student with the levels p2..p6."""
    overrides = RANDOM | overrides if not weights else overrides
    teacher = (f"torchvision://{name}", weights)
    return kd_models.distill_cfg(teacher, "GeneralizedRCNN", heads=heads, **overrides)


def teacher_of(name: str, seed: int = 0, **overrides):
    torch.manual_seed(seed)
    teacher = build_teacher(cfg_of(name, **overrides))
    teacher.tap({"features"})
    return teacher


@pytest.fixture(scope="module")
def tiny():
    return teacher_of("kd_tiny_frcnn")


def test_features_equal_torchvisions_own_run(tiny):
    model = tiny.model.backbone.model
    images = [x["image"] for x in kd_models.make_batch(sizes=((64, 96), (50, 64)))]
    found = tiny.observe(images, (64, 96), "BGR")["features"]
    model.transform.min_size, model.transform.max_size = (64,), 128
    batch, _ = model.transform([images[0].flip(0) / 255])
    assert batch.tensors.shape == (1, 3, 64, 96), "its own resizing leaves this image as it is"
    with torch.no_grad():
        expected = model.backbone(batch.tensors)
    assert list(found) == ["p2", "p3", "p4", "p5", "p6"]
    for value, own in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(value[:1], own, rtol=1e-5, atol=1e-5)


def test_levels_pair_with_detectron2s_by_kind(tiny):
    wrapper = kd_models.build_wrapper(cfg_of("kd_tiny_frcnn"))
    assert wrapper.level_map == {level: level for level in ("p2", "p3", "p4", "p5", "p6")}
    teacher = wrapper.teacher
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    kd_models.train_steps(wrapper, kd_models.make_batch(), steps=2)
    assert all(torch.equal(v, before[n]) for n, v in teacher.model.state_dict().items())
    assert not any(module.training for module in teacher.model.modules())


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("fasterrcnn_resnet50_fpn", "p2 p3 p4 p5 p6"),
        ("maskrcnn_resnet50_fpn_v2", "p2 p3 p4 p5 p6"),
        ("keypointrcnn_resnet50_fpn", "p2 p3 p4 p5 p6"),
        ("retinanet_resnet50_fpn", "p3 p4 p5 p6 p7"),
        ("fcos_resnet50_fpn", "p3 p4 p5 p6 p7"),
    ],
)
def test_every_published_kind_has_detectron2s_levels(name, levels):
    with torch.device("meta"):
        model = build_foreign(cfg_of(name).KD.TEACHER, "cpu", outline=True)
    shapes = model.backbone.output_shape()
    assert list(shapes) == levels.split()
    assert all(x == ShapeSpec(channels=256, stride=2 ** int(n[1:])) for n, x in shapes.items())
    masks, keypoints = (model.evaluated_with[f"MODEL.{x}_ON"] for x in ("MASK", "KEYPOINT"))
    assert (masks, keypoints) == ("mask" in name, "keypoint" in name)
    kind = type(model.backbone.top_block).__name__
    assert kind == ("LastLevelMaxPool" if "p2" in levels else "LastLevelP6P7")
    assert len(model.names["thing_classes"]) == (1 if keypoints else 80)
    assert ("keypoint_names" in model.names) == keypoints


def as_detectron2(state):
    """torchvision's names of a ResNet-FPN to detectron2's."""
    found = {}
    for name, value in state.items():
        name = name.replace("body.layer", "bottom_up.res").replace("body.", "bottom_up.stem.")
        if "bottom_up.res" in name:
            stage = int(name.split("bottom_up.res")[1][0])
            name = name.replace(f"bottom_up.res{stage}", f"bottom_up.res{stage + 1}")
        for k in "123":
            name = name.replace(f"bn{k}.", f"conv{k}.norm.")
        name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        for kind, own in (("inner", "fpn_lateral"), ("layer", "fpn_output")):
            for place in range(4):
                name = name.replace(f"fpn.{kind}_blocks.{place}.0.", f"{own}{place + 2}.")
        found[name] = value
    return found


def pictures():
    """Parts of photographs where there are some, else noise."""
    files = sorted((DATA / "coco_subset" / "val").glob("*.jpg"))[:2]
    if not files:
        return [x["image"] for x in kd_models.make_batch()]
    images = [torch.from_numpy(read_image(str(x), "BGR").copy()).permute(2, 0, 1) for x in files]
    return [image[:, 100:196, 100:196] for image in images]


def test_faster_rcnn_equals_a_detectron2_backbone_with_its_weights():
    """A training cannot tell them apart: the same weights on both sides give the same features."""
    teacher = teacher_of("fasterrcnn_resnet50_fpn", seed=3)
    cfg = get_cfg()
    cfg.merge_from_list(
        ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.STRIDE_IN_1X1", False]
        + ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]]
        + ["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]]
    )
    with torch.device("meta"):
        backbone = build_backbone(cfg, ShapeSpec(channels=3))
    state = as_detectron2(teacher.model.backbone.model.backbone.state_dict())
    missing, unexpected = backbone.load_state_dict(state, strict=False, assign=True)
    assert not missing and all(name.endswith("num_batches_tracked") for name in unexpected)
    images = pictures()
    tensor = teacher.preprocess(images, (96, 96), "BGR")
    with torch.no_grad():
        expected = backbone.eval()(tensor)
    found = teacher.observe(images, (96, 96), "BGR")["features"]
    for level, value in found.items():
        largest = expected[level].abs().max().item()
        torch.testing.assert_close(value, expected[level], rtol=0, atol=1e-5 * largest)


def test_detections_are_torchvisions_with_classes_from_0(tiny):
    model, own = tiny.model, tiny.model.backbone.model
    image = kd_models.make_batch(sizes=((40, 60),))[0]["image"]
    with torch.no_grad():
        (expected,) = own([image / 255])
    before = model.class_of.clone()
    model.class_of.copy_(torch.arange(91) % 5)
    model.class_of[expected["labels"][-1]] = -1  # a label that means nothing
    kept = expected["labels"] != expected["labels"][-1]
    try:
        found = model([{"image": image, "height": 40, "width": 60}])[0]["instances"]
    finally:
        model.class_of.copy_(before)
    assert len(expected["labels"]) and len(found) == kept.sum() < len(kept)
    assert torch.equal(found.pred_boxes.tensor, expected["boxes"][kept])
    assert torch.equal(found.scores, expected["scores"][kept])
    assert torch.equal(found.pred_classes, expected["labels"][kept] % 5)
    assert found.image_size == (40, 60)


def test_with_the_students_input_it_does_not_resize_again(tiny):
    image = kd_models.make_batch(sizes=((80, 120),))[0]["image"]
    seen, own = [], tiny.model.backbone.model
    transform = own.transform
    tiny.model.resizes = False
    handle = own.backbone.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[-2:]))
    sizes = transform.min_size, transform.max_size
    try:
        found = tiny.model([{"image": image, "height": 160, "width": 180}])[0]["instances"]
        assert (transform.min_size, transform.max_size) == sizes
        own([image / 255])
        transform.min_size, transform.max_size = (80,), 120
        with torch.no_grad():
            (expected,) = own([image / 255])
    finally:
        transform.min_size, transform.max_size = sizes
        handle.remove()
        tiny.model.resizes = True
    assert seen[0] == seen[2] == (96, 128), "80x120 padded to multiples of 32"
    assert seen[1] == (64, 96), "its own rule"
    kept = tiny.model.class_of[expected["labels"]] >= 0
    scaled = expected["boxes"][kept] * torch.tensor([1.5, 2.0, 1.5, 2.0])
    torch.testing.assert_close(found.pred_boxes.tensor, scaled)
    assert found.image_size == (160, 180)


def test_labels_of_coco_are_its_80_classes(tiny):
    class_of = tiny.model.class_of.tolist()
    assert class_of[0] == -1 and class_of[1] == 0 and class_of[12] == -1 and class_of[90] == 79
    assert sorted(set(class_of)) == list(range(-1, 80))
    assert tiny.names["thing_classes"][:2] == ["person", "bicycle"]
    own = teacher_of("kd_tiny_frcnn", KD__TEACHER__OPTS=["CLASSES", ["cat", "dog"]])
    assert own.names == {"thing_classes": ["cat", "dog"]}
    assert own.model.class_of.tolist() == [-1, 0, 1]
    other = teacher_of("kd_tiny_frcnn", KD__TEACHER__OPTS=["NUM_CLASSES", 4])
    assert other.names == {} and other.model.class_of.tolist() == [-1, 0, 1, 2]


def test_evaluation_takes_what_the_model_says_of_itself(tiny, monkeypatch):
    monkeypatch.setattr(evaluate_teacher, "build_teacher", lambda cfg: tiny)
    model, cfg, own, names = evaluate_teacher.build(cfg_of("kd_tiny_frcnn"), student_input=False)
    assert own is None and names == tiny.names
    assert model is tiny.model and cfg.INPUT.FORMAT == "RGB" and cfg.INPUT.MIN_SIZE_TEST == 0
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 7 and not cfg.MODEL.MASK_ON
    cfg = evaluate_teacher.build(cfg_of("kd_tiny_frcnn"), student_input=True).cfg
    assert not tiny.model.resizes
    tiny.model.resizes = True
    assert cfg.INPUT.MIN_SIZE_TEST == 64 and cfg.TEST.DETECTIONS_PER_IMAGE == 7


def test_one_stage_detectors_detect_as_well():
    teacher = teacher_of("kd_tiny_retinanet", KD__TEACHER__OPTS=["NUM_CLASSES", 3])
    image = kd_models.make_batch(sizes=((64, 64),))[0]["image"]
    found = teacher.model([{"image": image, "height": 64, "width": 64}])[0]["instances"]
    assert teacher.model.evaluated_with["TEST.DETECTIONS_PER_IMAGE"] == 6
    assert len(found) <= 6 and set(found.pred_classes.tolist()) <= {0, 1}


def test_published_weights_have_norms_without_epsilon_where_torchvision_says_so():
    published = list(get_model_weights("fasterrcnn_resnet50_fpn"))
    file = "any/folder/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    assert norm_epsilon("fasterrcnn_resnet50_fpn", file, published, -1) == 0
    assert norm_epsilon("fasterrcnn_resnet50_fpn", file, published, 1e-3) == 1e-3
    assert norm_epsilon("fasterrcnn_resnet50_fpn", "mine.pth", published, -1) is None
    fcos = list(get_model_weights("fcos_resnet50_fpn"))
    assert norm_epsilon("fcos_resnet50_fpn", fcos[0].url, fcos, -1) is None
    norm = nn.BatchNorm2d(3).eval()
    norm.running_var.copy_(torch.tensor([1e-6, 0.3, 2.0]))
    frozen = torchvision.ops.FrozenBatchNorm2d(3, eps=0.0)
    frozen.load_state_dict(norm.state_dict())
    x = torch.rand(2, 3, 4, 4)
    torchvision_teacher._set_epsilon(norm, 0.0)
    torch.testing.assert_close(norm(x), frozen(x), rtol=1e-6, atol=1e-6)


def test_weights_from_a_file_and_what_is_refused(tiny, tmp_path):
    path = tmp_path / "mine.pth"
    torch.save({"model": tiny.model.backbone.model.state_dict()}, path)
    teacher = build_teacher(cfg_of("kd_tiny_frcnn", str(path)))
    own, other = (x.model.backbone.model.state_dict() for x in (teacher, tiny))
    assert all(torch.equal(value, other[name]) for name, value in own.items())
    classes = {"KD__TEACHER__OPTS": ["CLASSES", ["cat"]]}
    for cfg, line in (
        (cfg_of("kd_tiny_frcnn", str(path), **classes), "with 2 labels: roi_heads.box_predictor"),
        (cfg_of("kd_tiny_frcnn", KD__TEACHER__ALLOW_MISSING=False), "WEIGHTS is empty, and torchv"),
        (cfg_of("fasterrcnn_resnet50"), "no model 'fasterrcnn_resnet50'; its detectors are .*mean"),
        (cfg_of("ssdlite320_mobilenet_v3_large"), "ssdlite320_mobilenet_v3_large has no FPN"),
        (cfg_of("squeezenet1_1"), "cannot build the detector squeezenet1_1 with"),
        (cfg_of("kd_tiny_frcnn", KD__TEACHER__OPTS=["CLASS", 1]), "no option 'CLASS'; it has"),
    ):
        with pytest.raises(ConfigError, match=line) as error:
            build_teacher(cfg)
        assert "\n" not in str(error.value)


def test_heads_on_predictions_are_refused_by_name(tiny):
    for head in ("OutputKD", "ScoreL2", "DKD"):
        cfg = cfg_of("kd_tiny_frcnn", heads=(head,))
        with pytest.raises(ConfigError, match=rf"{head}.*TorchvisionDetector") as error:
            kd_models.build_wrapper(cfg)
        assert "\n" not in str(error.value)


def test_published_weights_without_a_network_say_where_to_put_the_file(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("iopath.common.file_io.download", offline)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(
        torchvision_teacher,
        "_published",
        lambda name: [torchvision.models.get_model_weights("retinanet_resnet50_fpn").DEFAULT],
    )
    cfg = cfg_of("kd_tiny_retinanet", KD__TEACHER__ALLOW_MISSING=False)
    with pytest.raises(ConfigError, match="KD.TEACHER.WEIGHTS: .*could not be downloaded") as error:
        build_teacher(cfg)
    assert f"put it at {tmp_path}" in str(error.value)
    assert "retinanet_resnet50_fpn_coco-eeacb38b.pth" in str(error.value)
