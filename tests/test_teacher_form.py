"""The form in which a teacher runs: the same features, and the teacher untouched."""

import logging

import kd_models
import pytest
import torch
from kd_models import make_batch, tiny_cfg
from test_fusing import TIMM, stirred
from torch import nn

from projects.kd import ConfigError
from projects.kd.config.key_checks import check_each
from projects.kd.fusing import is_batch_norm
from projects.kd.taps import TapSpec
from projects.kd.teacher import Teacher
from projects.kd.teacher_form import TOLERANCE, choose_form
from projects.kd.teacher_link import on_device

RETINA_TIMM = {**TIMM, "MODEL__BACKBONE__NAME": "build_retinanet_timm_fpn_backbone"}
FAMILIES = {
    "ResNet, frozen": ("RetinaNet", {"MODEL__RESNETS__NORM": "FrozenBN"}),
    "ResNet, BN": ("GeneralizedRCNN", {"MODEL__RESNETS__NORM": "BN", "MODEL__FPN__NORM": "BN"}),
    "timm, BN": ("RetinaNet", RETINA_TIMM),
    "timm, frozen": ("GeneralizedRCNN", {**TIMM, "MODEL__TIMM__NORM": "FrozenBN"}),
    "no pyramid": ("ConditionalDETR", {"MODEL__RESNETS__NORM": "FrozenBN"}),
}


def make_teacher(family="ResNet, frozen", fuse=True, **overrides):
    arch, own = FAMILIES[family]
    return Teacher(stirred(kd_models.build(tiny_cfg(arch, **{**own, **overrides}))), fuse=fuse)


def observe(teacher, batch=None):
    batch = batch or make_batch()
    return teacher.observe([x["image"] for x in batch], (96, 96), "BGR")["features"]


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys() and len(theirs) > 0
    for level, value in theirs.items():
        assert (ours[level] - value).abs().max() <= TOLERANCE * value.abs().max(), level


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_plain_teacher(family, caplog):
    teacher = make_teacher(family)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    norms = sum(map(is_batch_norm, teacher.model.backbone.modules()))
    with caplog.at_level(logging.INFO, logger="projects.kd.teacher_form"):
        teacher.tap({"features"})
    lines = [x for x in caplog.messages if x.startswith("the teacher's backbone runs ")]
    assert [f"runs with {norms} of {norms} batch norms" in x for x in lines] == [True]
    assert not any(map(is_batch_norm, teacher.form.backbone.modules())) and norms > 10
    plain = make_teacher(family, fuse=False)
    plain.tap({"features"})
    assert plain.form.backbone is plain.model.backbone and plain.form.text == "as it is"
    assert_close(observe(teacher), observe(plain))
    # the detector, which is inherited from, copied and evaluated, is as it was
    after = teacher.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    with torch.no_grad():
        image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
        ours, theirs = teacher.model.backbone(image), plain.model.backbone(image)
    assert all(torch.equal(ours[level], theirs[level]) for level in theirs)


@pytest.mark.parametrize(
    ("family", "levels", "computed"),
    [
        ("ResNet, frozen", {"p3", "p4", "p5"}, {"p3", "p4", "p5"}),
        ("ResNet, frozen", {"p4", "p6"}, {"p4", "p6", "p7"}),
        ("ResNet, frozen", {"p7"}, {"p6", "p7"}),
        ("ResNet, BN", {"p3", "p4", "p5"}, {"p3", "p4", "p5"}),
        ("ResNet, BN", {"p6"}, {"p5", "p6"}),
        ("timm, BN", {"p5"}, {"p5"}),
        ("timm, frozen", {"p2"}, {"p2"}),
    ],
)
def test_levels_that_nothing_reads_are_left_out_and_the_others_are_the_same(
    family, levels, computed, caplog
):
    plain = make_teacher(family, fuse=False)
    plain.tap({"features"})
    lean = make_teacher(family, fuse=False)
    with caplog.at_level(logging.INFO, logger="projects.kd.teacher_form"):
        lean.tap({"features"}, levels=levels)
    seen, whole = observe(lean), observe(plain)
    assert set(seen) == computed >= levels
    assert all(torch.equal(value, whole[level]) for level, value in seen.items())
    gone = [level for level in whole if level not in seen]
    assert gone and f"without {', '.join(gone)}, which no head reads" in caplog.text
    shapes = lean.model.backbone.output_shape()
    assert set(shapes) == set(whole), "the detector itself has all of its levels"
    # with both forms at once
    both = make_teacher(family)
    both.tap({"features"}, levels=levels)
    assert_close(observe(both), seen)


def test_unread_convolutions_do_not_run():
    teacher = make_teacher("ResNet, BN")
    calls = []
    for name in ("fpn_output2", "fpn_output3", "fpn_output4", "fpn_lateral2", "fpn_lateral3"):
        getattr(teacher.model.backbone, name).register_forward_hook(
            lambda *_, name=name: calls.append(name)
        )
    teacher.tap({"features"}, levels={"p3"})
    calls.clear()
    observe(teacher)
    assert calls == ["fpn_lateral3", "fpn_output3"]


def test_stages_behind_the_last_one_read_do_not_run():
    overrides = {"MODEL__RESNETS__OUT_FEATURES": ["res3", "res4"]}
    teacher = make_teacher("no pyramid", **overrides)
    calls = []
    teacher.model.backbone.res4.register_forward_hook(lambda *_: calls.append(1))
    whole = make_teacher("no pyramid", fuse=False, **overrides)
    whole.tap({"features"})
    teacher.tap({"features"}, levels={"res3"})
    calls.clear()
    features = observe(teacher)
    assert set(features) == {"res3"} and not calls
    assert_close(features, {"res3": observe(whole)["res3"]})


def test_heads_of_the_detector_get_all_levels():
    teacher = make_teacher()
    teacher.tap({"features", "dense"}, levels={"p3"})
    assert teacher.form.levels is None
    assert set(observe(teacher)) == {"p3", "p4", "p5", "p6", "p7"}


def test_a_tap_below_the_pyramid_sees_what_it_saw():
    taps = {"bottom_up": TapSpec("backbone.bottom_up"), "block": TapSpec("backbone.bottom_up.res3")}
    seen = []
    for fuse in (True, False):
        teacher = make_teacher(fuse=fuse)
        teacher.tap({"features"}, extra=taps, levels=())
        found = teacher.observe([x["image"] for x in make_batch()], (96, 96), "BGR")
        seen.append({**found["bottom_up"], "block": found["block"]})
    assert "without p3, p4, p5, p6, p7" in teacher.form.text  # either way
    assert_close(*seen)


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("ResNet, frozen", "backbone.bottom_up.stem.conv1.norm"),
        ("timm, BN", "backbone.bottom_up.model.bn1"),
        ("timm, BN", "backbone.bottom_up.model.conv_stem"),
    ],
)
def test_a_tap_at_a_norm_or_before_it_keeps_the_norms(family, path, caplog):
    extra = {"inner": TapSpec(path)}
    with caplog.at_level(logging.INFO, logger="projects.kd.teacher_form"):
        teacher = make_teacher(family)
        teacher.tap({"features"}, extra=extra)
    assert f"a tap or hook reads {path}" in caplog.text
    plain = make_teacher(family, fuse=False)
    plain.tap({"features"}, extra=extra)
    images = [x["image"] for x in make_batch()]
    ours, theirs = (x.observe(images, (96, 96), "BGR")["inner"] for x in (teacher, plain))
    assert torch.equal(ours, theirs)


def test_changes_of_the_teacher_are_noticed():
    """Weights that are loaded later, and hooks on norms."""
    teacher, other = make_teacher(), make_teacher()
    teacher.tap({"features"})
    for value in other.model.state_dict().values():
        value.copy_(value * 1.5 if value.is_floating_point() else value)
    other.tap({"features"})
    wanted = observe(other)
    teacher.model.load_state_dict(other.model.state_dict())
    assert teacher.form.is_stale()
    assert_close(observe(teacher), wanted)
    assert not teacher.form.is_stale()
    sums = []
    norm = teacher.model.backbone.bottom_up.stem.conv1.norm
    handle = norm.register_forward_hook(lambda module, inputs, output: sums.append(output.sum()))
    assert_close(observe(teacher), wanted)
    assert len(sums) >= 1 and "a tap or hook" in teacher.form.text
    handle.remove()
    observe(teacher)
    assert "batch norms in the convolutions" in teacher.form.text


def test_a_result_that_differs_is_not_used(monkeypatch, caplog):
    model = stirred(kd_models.build(tiny_cfg()))

    def worse(holder):
        next(holder.backbone.parameters()).requires_grad_(False)
        conv = holder.backbone.bottom_up.stem.conv1
        conv.weight = nn.Parameter(conv.weight * 1.001)
        return 1

    monkeypatch.setattr("projects.kd.teacher_form.fuse_batch_norms", worse)
    with caplog.at_level(logging.INFO, logger="projects.kd.teacher_form"):
        form = choose_form(model, {}, None, True)
    assert form.backbone is model.backbone
    assert "with its batch norms, since on an image of noise the result differs by" in caplog.text
    monkeypatch.setattr("projects.kd.teacher_form.fuse_batch_norms", lambda x: 1 / 0)
    assert "ZeroDivisionError" in choose_form(model, {}, None, True).text


def test_distillation_with_fused_norms_gives_the_same_losses_and_checkpoint(tmp_path):
    cfg = tiny_cfg("GeneralizedRCNN", MODEL__RESNETS__NORM="FrozenBN")
    files = kd_models.write_teacher(tmp_path, cfg, stirred(kd_models.build(cfg)))
    seen = []
    for fuse in (True, False):
        student = kd_models.distill_cfg(
            files,
            "GeneralizedRCNN",
            heads=("PKD", "CWD"),
            KD__TEACHER__FUSE=fuse,
            KD__LEVELS=("p3", "p4"),
        )
        wrapper = kd_models.build_wrapper(student)
        assert wrapper.teacher.form.levels == {"p3", "p4"}
        torch.manual_seed(0)
        losses = kd_models.losses_at(wrapper, make_batch())
        seen.append((losses, wrapper.state_dict()))
    (ours, state), (theirs, other) = seen
    assert ours.keys() == theirs.keys() and state.keys() == other.keys()
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert not any("teacher" in name for name in state)


def test_images_go_to_the_device_once_and_nothing_else_does():
    batch = make_batch(teacher_scale=2.0)
    moved = on_device(batch, torch.device("meta"))
    for ours, theirs in zip(moved, batch, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if key in ("image", "image_teacher"):
                assert value.is_meta and value.shape == theirs[key].shape
            else:
                assert value is theirs[key]
    assert on_device(batch, torch.device("cpu")) is batch


def test_a_wrong_value_names_the_key():
    cfg = tiny_cfg()
    cfg.KD.TEACHER.FUSE = "yes"
    with pytest.raises(ConfigError, match=r"KD\.TEACHER\.FUSE is 'yes', it must be True or False"):
        check_each(cfg)
