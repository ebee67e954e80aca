"""The teacher stays as it was, sees what it was trained on, and says what is missing."""

import copy
import logging
import pickle

import kd_models
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from torch import nn

from projects.kd import ConfigError, DistillMetaArch, build_teacher


@META_ARCH_REGISTRY.register()
class DropoutRetinaNet(RetinaNet):
    """BatchNorm everywhere and dropout behind the stem."""

    def __init__(self, cfg):
        super().__init__(cfg)
        stem = self.backbone.bottom_up.stem
        stem.dropout = nn.Dropout(0.5)
        stem.register_forward_hook(lambda module, inputs, output: module.dropout(output))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return kd_models.write_teacher(tmp_path_factory.mktemp("teacher"))


def observe(teacher, batch, canvas=(96, 96), image_format="BGR"):
    if teacher.taps is None:
        teacher.tap({"features"})
    return teacher.observe([x["image"] for x in batch], canvas, image_format)["features"]


def test_bit_identical_after_training_and_evaluation(tmp_path):
    cfg = kd_models.tiny_cfg(MODEL__META_ARCHITECTURE="DropoutRetinaNet")
    model = kd_models.build(cfg)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    wrapper = kd_models.build_wrapper(
        kd_models.distill_cfg(kd_models.write_teacher(tmp_path, cfg, model))
    )
    teacher = wrapper.teacher
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    student = {name: value.clone() for name, value in wrapper.student.state_dict().items()}
    batch = kd_models.make_batch()
    features = observe(teacher, batch)
    kd_models.train_steps(wrapper, batch, steps=3)
    # detectron2's evaluation switches the whole model to eval mode and back
    inference_on_dataset(wrapper, [batch], DatasetEvaluators([]))
    wrapper.train()
    kd_models.train_steps(wrapper, batch, steps=1)

    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(module.training for module in teacher.model.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    for level, value in observe(teacher, batch).items():
        assert torch.equal(value, features[level]), "dropout or running statistics moved"
    changed = [n for n, v in wrapper.student.state_dict().items() if not torch.equal(v, student[n])]
    assert any("running_mean" in n for n in changed) and any(n.endswith("weight") for n in changed)


def test_unreachable_from_the_module_tree(files):
    wrapper = kd_models.build_wrapper(kd_models.distill_cfg(files))
    theirs = {id(x) for x in wrapper.teacher.model.state_dict(keep_vars=True).values()}
    assert theirs
    assert not theirs & {id(x) for x in wrapper.parameters()}
    assert not theirs & {id(x) for x in wrapper.buffers()}
    assert not theirs & {id(x) for x in wrapper.state_dict(keep_vars=True).values()}
    modules = set(wrapper.teacher.model.modules())
    assert not modules & set(wrapper.modules())
    wrapper.train()
    wrapper.requires_grad_(True)
    assert not any(module.training for module in modules)
    assert not any(p.requires_grad for p in wrapper.teacher.model.parameters())
    assert copy.deepcopy(wrapper.teacher) is wrapper.teacher
    assert copy.deepcopy({"teacher": wrapper.teacher})["teacher"] is wrapper.teacher


def test_only_the_backbone_runs(files):
    teacher = build_teacher(kd_models.distill_cfg(files))
    calls = []
    teacher.model.head.register_forward_hook(lambda *_: calls.append(1))
    features = observe(teacher, kd_models.make_batch())
    assert not calls
    assert not any(value.requires_grad or value.is_inference() for value in features.values())
    assert not teacher.taps._values, "observe() must not keep features"


def test_other_mean_std_and_channel_order(files, tmp_path):
    """The same network, written for RGB and in other units, sees the same features."""
    cfg = kd_models.tiny_cfg(
        MODEL__RESNETS__NORM="FrozenBN",
        MODEL__PIXEL_MEAN=[10.0, 20.0, 30.0],
        MODEL__PIXEL_STD=[2.0, 4.0, 8.0],
    )
    model = kd_models.build(cfg)
    other = cfg.clone()
    other.INPUT.FORMAT = "RGB"
    other.MODEL.PIXEL_MEAN = [30.0, 20.0, 10.0]
    other.MODEL.PIXEL_STD = [4.0, 4.0, 4.0]
    twin = kd_models.build(other, seed=1)
    state = copy.deepcopy(model.state_dict())
    weight = state["backbone.bottom_up.stem.conv1.weight"]  # (8, 3, 7, 7) on BGR / (2, 4, 8)
    weight *= (4.0 / torch.tensor([2.0, 4.0, 8.0]))[None, :, None, None]
    state["backbone.bottom_up.stem.conv1.weight"] = weight.flip(1)
    twin.load_state_dict(state)

    student = cfg.clone()
    student.KD = kd_models.distill_cfg(kd_models.write_teacher(tmp_path, other, twin)).KD
    wrapper = kd_models.build_wrapper(student)
    wrapper.student.load_state_dict(model.state_dict())
    assert wrapper.teacher.input_format == "RGB"
    with kd_models.EventStorage(0):
        ctx, _ = wrapper.observe(kd_models.make_batch(sizes=((64, 80), (50, 96))))
    for level, ours in ctx.student_features.items():
        theirs = ctx.teacher_features[level]
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * ours.abs().max().item())


def test_preprocessing_equals_detectron2s_and_pads_with_zeros(files):
    teacher = build_teacher(kd_models.distill_cfg(files))
    batch = kd_models.make_batch(sizes=((60, 96), (96, 64)))
    expected = teacher.model.preprocess_image(batch).tensor
    images = [x["image"] for x in batch]
    result = teacher.preprocess(images, (96, 96), "BGR")
    assert torch.equal(result, expected)
    larger = teacher.preprocess(images, (128, 160), "BGR")
    assert torch.equal(larger[:, :, :96, :96], expected)
    assert not larger[:, :, 96:].any() and not larger[..., 96:].any()
    flipped = teacher.preprocess([image.flip(0) for image in images], (96, 96), "RGB")
    assert torch.equal(flipped, expected)


def test_channels_last_gives_the_same_features(files):
    plain = build_teacher(kd_models.distill_cfg(files, KD__TEACHER__CHANNELS_LAST=False))
    fast = build_teacher(kd_models.distill_cfg(files))  # by itself, on a CPU
    batch = kd_models.make_batch()
    assert fast.preprocess([batch[0]["image"]], (64, 96), "BGR").is_contiguous(
        memory_format=torch.channels_last
    )
    for level, value in observe(plain, batch).items():
        torch.testing.assert_close(observe(fast, batch)[level], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "in_step", "expected"),
    [
        ("auto", None, torch.float32),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32),
        ("bfloat16", None, torch.bfloat16),
    ],
)
def test_precision(files, dtype, in_step, expected):
    teacher = build_teacher(kd_models.distill_cfg(files, KD__TEACHER__DTYPE=dtype))
    with torch.autocast("cpu", dtype=in_step, enabled=in_step is not None):
        features = observe(teacher, kd_models.make_batch())
    assert features["p3"].dtype == expected


def test_missing_parameters_are_listed(files, tmp_path):
    state = torch.load(files[1], weights_only=True)["model"]
    gone = ["backbone.fpn_output3.weight", "head.bbox_pred.bias"]
    for name in gone:
        del state[name]
    state["head.cls_score.weight"] = torch.zeros(1, 2, 3, 3)
    torch.save({"model": state}, tmp_path / "partial.pth")
    cfg = kd_models.distill_cfg((files[0], str(tmp_path / "partial.pth")))
    with pytest.raises(ConfigError) as error:
        build_teacher(cfg)
    message = str(error.value)
    assert (
        message.startswith("KD.TEACHER.WEIGHTS") and "partial.pth" in message and " 3 " in message
    )
    for name in (*gone, "head.cls_score.weight"):
        assert name.rpartition(".")[0] in message
    cfg.KD.TEACHER.ALLOW_MISSING = True
    assert torch.equal(
        build_teacher(cfg).model.state_dict()["head.cls_subnet.0.weight"],
        state["head.cls_subnet.0.weight"],
    )


def test_weights_of_another_architecture_are_refused(files, tmp_path):
    other = kd_models.tiny_cfg("GeneralizedRCNN")
    cfg = kd_models.distill_cfg((kd_models.write_config(other, tmp_path / "t.yaml"), files[1]))
    with pytest.raises(ConfigError, match=r"KD\.TEACHER\.WEIGHTS.*roi_heads\.box_predictor"):
        build_teacher(cfg)


def test_weights_come_from_the_teachers_config_when_the_key_is_empty(files, tmp_path):
    cfg = kd_models.tiny_cfg(MODEL__WEIGHTS=files[1])
    path = kd_models.write_config(cfg, tmp_path / "teacher.yaml")
    teacher = build_teacher(kd_models.distill_cfg((path, "")))
    state = torch.load(files[1], weights_only=True)["model"]
    assert all(torch.equal(value, state[n]) for n, value in teacher.model.state_dict().items())
    with pytest.raises(ConfigError, match=r"KD\.TEACHER\.WEIGHTS is empty"):
        build_teacher(kd_models.distill_cfg((files[0], "")))


def test_overrides_reach_the_teachers_config(files):
    cfg = kd_models.distill_cfg(files, KD__TEACHER__OPTS=["INPUT.FORMAT", "RGB"])
    assert build_teacher(cfg).input_format == "RGB"
    for opts, part in ((["INPUT.FORMAT"], "odd"), (["INPUT.FORMATT", "RGB"], "INPUT.FORMATT")):
        cfg.KD.TEACHER.OPTS = opts
        with pytest.raises(ConfigError, match=rf"KD\.TEACHER\.OPTS.*{part}"):
            build_teacher(cfg)


def test_zoo_teacher_without_a_network_names_file_and_place(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("iopath.common.file_io.download", offline)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    cfg = kd_models.distill_cfg(
        ("model_zoo://COCO-Detection/retinanet_R_50_FPN_1x.yaml", ""),
        KD__TEACHER__OPTS=["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64],
    )
    with pytest.raises(ConfigError) as error:
        build_teacher(cfg)
    message = str(error.value)
    assert message.startswith("KD.TEACHER.WEIGHTS") and "\n" not in message
    assert "retinanet_R_50_FPN_1x/190397773/model_final_bfca0b.pkl" in message
    # the place that the message names is where the file is then found
    place = message.split("put it at ")[1].split(",")[0]
    assert place.startswith(str(tmp_path))
    model = kd_models.build(
        kd_models.tiny_cfg(MODEL__RESNETS__STEM_OUT_CHANNELS=64, MODEL__FPN__OUT_CHANNELS=256)
    )
    weights = {name: value.numpy() for name, value in model.backbone.state_dict().items()}
    weights = {f"backbone.{name}": value for name, value in weights.items()}
    with open(place, "wb") as file:
        pickle.dump({"model": weights, "__author__": "test"}, file)
    with pytest.raises(ConfigError, match="is not the model zoo's file: its MD5") as error:
        build_teacher(cfg)
    assert place in str(error.value)
    cfg.KD.ALLOW_PICKLE = True
    with pytest.raises(ConfigError, match=r"lacks .*head\..*; its \d+ entries are") as error:
        build_teacher(cfg)
    assert "backbone." not in str(error.value).split("; its")[0]


def test_empty_weights_in_the_overrides_win_over_the_zoo():
    cfg = kd_models.distill_cfg(
        ("model_zoo://COCO-Detection/retinanet_R_50_FPN_1x.yaml", ""),
        KD__TEACHER__OPTS=[
            *("MODEL.WEIGHTS", ""),
            *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
        ],
        KD__TEACHER__ALLOW_MISSING=True,
    )
    assert "random" in repr(build_teacher(cfg))


def test_unknown_meta_arch_of_the_teacher(files):
    opts = ["MODEL.META_ARCHITECTURE", "Unheard"]
    cfg = kd_models.distill_cfg(files, KD__TEACHER__OPTS=opts)
    with pytest.raises(ConfigError, match=r"KD\.TEACHER\.CONFIG_FILE.*'Unheard'.*KD\.IMPORTS"):
        build_teacher(cfg)


def test_compiling_is_refused_for_taps_inside_the_backbone(files):
    kwargs = DistillMetaArch.from_config(kd_models.distill_cfg(files))
    with pytest.raises(ConfigError, match=r"KD\.TEACHER\.COMPILE.*bottom_up"):
        kwargs["teacher"].tap({"features", "bottom_up"}, compile_backbone=True)


def test_other_class_names_are_said_in_one_warning(files, caplog):
    for name, classes in (("kd_test_a", ["cat", "dog"]), ("kd_test_b", ["dog", "horse"])):
        MetadataCatalog.get(name).thing_classes = classes
    opts = ["DATASETS.TRAIN", ("kd_test_a",)]
    cfg = kd_models.distill_cfg(files, KD__TEACHER__OPTS=opts, DATASETS__TRAIN=("kd_test_b",))
    source = "projects.kd.data.classes"
    with caplog.at_level(logging.WARNING, logger=source):
        DistillMetaArch.from_config(cfg)
    (record,) = [x for x in caplog.records if x.name == source]
    assert "only teacher has cat, only student has horse" in record.getMessage()
    caplog.clear()
    cfg.DATASETS.TRAIN = ("kd_test_a",)
    with caplog.at_level(logging.WARNING, logger=source):
        DistillMetaArch.from_config(cfg)
    assert not [x for x in caplog.records if x.name == source]
