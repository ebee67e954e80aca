"""KD.TEACHER.CACHE: the teacher's own answers, once each, in 16 bits, and never another's."""

import glob
import logging
import os

import kd_models
import kd_runs
import pytest
import torch
import toy_data
from kd_models import make_batch, tiny_cfg

from projects.kd import ConfigError
from projects.kd.config.key_checks import check_each
from projects.kd.taps import TapSpec
from projects.kd.teacher import Teacher
from projects.kd.teacher_cache import (
    MIB,
    FeatureCache,
    build_cache,
    check_cache,
    digest,
    expected_size,
)
from projects.kd.teacher_link import with_digests

CANVAS = (96, 96)
CPU = torch.device("cpu")
TOY = {"MODEL__BACKBONE__NAME": "build_toy_fpn_backbone"}


@pytest.fixture(params=["ram", "disk"])
def folder(request, tmp_path):
    return str(tmp_path / "answers") if request.param == "disk" else ""


def make_teacher(cache=None, seed=0, levels=None, **overrides):
    teacher = Teacher(kd_models.build(tiny_cfg(**{**TOY, **overrides}), seed), cache=cache)
    teacher.tap({"features"}, levels=levels)
    teacher.ran = []
    teacher.model.backbone.register_forward_pre_hook(lambda _, x: teacher.ran.append(len(x[0])))
    return teacher


def observe(teacher, batch, canvas=CANVAS, form="BGR"):
    return teacher.observe([x["image"] for x in batch], canvas, form)["features"]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() and len(theirs) > 0
    assert all(ours[x].dtype == theirs[x].dtype for x in theirs)
    assert all(torch.equal(ours[x], theirs[x]) for x in theirs)


def rounded(features):
    return {level: value.half().float() for level, value in features.items()}


def test_an_answer_is_the_teachers_in_16_bits_whether_new_or_kept(folder):
    cache = FeatureCache(8 * MIB, folder)
    teacher, plain = make_teacher(cache), make_teacher()
    batch = make_batch()
    expected = rounded(observe(plain, batch))
    assert_equal(observe(teacher, batch), expected)
    assert teacher.ran == [2] and cache.hits() == 0.0
    assert_equal(observe(teacher, batch), expected)
    assert teacher.ran == [2] and cache.hits() == 1.0 and cache.hits() is None


def test_only_images_that_are_not_there_are_computed(folder):
    teacher, plain = make_teacher(FeatureCache(8 * MIB, folder)), make_teacher()
    first, second, third = make_batch(((64, 96), (96, 64), (80, 80)))
    observe(teacher, [first, second])
    batch = [third, second, {"image": first["image"].flip(-1)}, first]
    found = observe(teacher, batch)
    assert teacher.ran == [2, 2], "the new one and the flipped one"
    for level, value in observe(plain, batch).items():
        torch.testing.assert_close(found[level], value, rtol=1e-3, atol=1e-6)


def test_what_an_answer_depends_on_is_not_mixed_up(folder):
    cache = FeatureCache(64 * MIB, folder)
    teacher = make_teacher(cache)
    batch = make_batch()
    seen = [observe(teacher, batch)]

    def is_new(found):
        assert cache.hits() == 0.0
        for other in seen:
            assert not all(torch.equal(found[level], other[level]) for level in found)
        seen.append(found)

    cache.hits()
    is_new(observe(teacher, batch, form="RGB"))
    is_new({x: v[..., :12, :12] for x, v in observe(teacher, batch, (128, 128)).items()})
    with torch.autocast("cpu", torch.bfloat16):
        is_new(observe(teacher, batch))
    is_new(observe(make_teacher(cache, seed=1), batch))
    is_new(observe(make_teacher(cache, MODEL__PIXEL_STD=[2.0, 2.0, 2.0]), batch))
    with torch.no_grad():
        next(teacher.model.backbone.parameters()).mul_(2)
    is_new(observe(teacher, batch))
    # other levels are other answers, of the same values
    part = observe(make_teacher(cache, levels={"p4"}), batch)
    assert cache.hits() == 0.0 and torch.equal(part["p4"], seen[0]["p4"])


def test_bfloat16_stays_what_it_is(folder):
    teacher, plain = make_teacher(FeatureCache(8 * MIB, folder)), make_teacher()
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = observe(plain, batch)
        assert any(x.dtype == torch.bfloat16 for x in expected.values())
        for _ in range(2):
            assert_equal(observe(teacher, batch), expected)


def test_what_float16_cannot_hold_is_not_kept_and_not_changed(folder, caplog):
    cache = FeatureCache(MIB, folder)
    calls = []

    def compute(missing):
        calls.append(missing)
        return {"p3": torch.tensor([[[[7e4]]], [[[1.0]]]])[missing]}

    for _ in range(2):
        assert cache.features(["ab1", "cd2"], compute, CPU)["p3"].flatten().tolist() == [7e4, 1.0]
    assert calls == [[0, 1], [0]] and caplog.text.count("beyond the range of float16") == 1


def test_no_more_than_the_bound_is_kept(folder, caplog):
    value = torch.arange(5 * 32.0).reshape(5, 2, 4, 4)
    keys = [f"{n}{n}{n}" for n in range(5)]
    one = FeatureCache(MIB, folder and f"{folder}/one")
    one.features(keys[:1], lambda missing: {"p3": value[missing]}, CPU)
    assert one.taken >= 2 * 4 * 4 * 2
    cache = FeatureCache(3 * one.taken, folder and f"{folder}/three")
    for _ in range(2):
        found = cache.features(keys, lambda missing: {"p3": value[missing]}, CPU)
        assert torch.equal(found["p3"], value)
    assert cache.taken == cache.capacity and cache.hits() == 0.3
    assert caplog.text.count("no more fit") == 1


def test_answers_go_to_the_device_of_the_teacher(folder):
    cache, value = FeatureCache(MIB, folder), torch.ones(2, 1, 2, 2)
    cache.features(["ab", "cd"], lambda missing: {"p3": value[missing]}, CPU)
    found = cache.features(["cd", "ab"], lambda missing: 1 / 0, torch.device("meta"))["p3"]
    assert found.is_meta and found.shape == (2, 1, 2, 2) and found.dtype == torch.float32


def test_files_serve_other_runs_and_may_be_cut_or_deleted(tmp_path):
    batch, folder = make_batch(), str(tmp_path)
    first = make_teacher(FeatureCache(8 * MIB, folder))
    expected = observe(first, batch)
    again = FeatureCache(8 * MIB, folder)
    assert again.taken == first.cache.taken > 0, "both count what is there"
    second = make_teacher(again)
    assert_equal(observe(second, batch), expected)
    assert second.ran == []
    one, other = sorted(glob.glob(f"{folder}/*/*.safetensors"))
    os.truncate(one, os.path.getsize(one) - 1)
    os.remove(other)
    assert_equal(observe(second, batch), expected)
    assert second.ran == [2] and not glob.glob(f"{folder}/*/*.tmp*")
    assert_equal(observe(second, batch), expected)
    assert second.ran == [2]


def test_a_full_disk_costs_time_alone(tmp_path, monkeypatch, caplog):
    def full(path, content):
        with open(f"{path}.tmp{os.getpid()}", "wb") as file:
            file.write(content[:8])
        raise OSError(28, "No space left on device")

    teacher, plain = make_teacher(FeatureCache(8 * MIB, str(tmp_path))), make_teacher()
    monkeypatch.setattr("projects.kd.teacher_cache.write_atomically", full)
    for _ in range(2):
        assert_equal(observe(teacher, make_batch()), rounded(observe(plain, make_batch())))
    assert teacher.ran == [2, 2] and caplog.text.count("No space left on device") == 1
    assert not [x for _, _, files in os.walk(tmp_path) for x in files]


def test_digests_tell_type_shape_and_order_apart():
    image = torch.arange(12, dtype=torch.uint8)
    found = [
        digest(image),
        digest(image.reshape(3, 4)),
        digest(image.reshape(4, 3)),
        digest(image.to(torch.int8)),
        digest("a", "bc"),
        digest("ab", "c"),
        digest(b"abc"),
    ]
    assert len(set(found)) == len(found) and {len(x) for x in found} == {32}
    turned = image.reshape(3, 4).t().contiguous().t()  # the same values, laid out otherwise
    assert digest(turned) == digest(image.reshape(3, 4))


def wrapper_of(tmp_path, heads, cache, arch="RetinaNet", **overrides):
    own = TOY if arch == "RetinaNet" else {}
    cfg = tiny_cfg(arch, **own)
    files = kd_models.write_teacher(tmp_path, cfg, kd_models.build(cfg, 1))
    overrides = {"KD__TEACHER__CACHE": cache, "OUTPUT_DIR": str(tmp_path / "out")} | overrides | own
    return kd_models.build_wrapper(kd_models.distill_cfg(files, arch, heads=heads, **overrides))


@pytest.mark.parametrize(
    ("heads", "arch", "overrides"),
    [
        (("CWD", "FGFI"), "RetinaNet", {}),
        (("OutputKD", "ScoreL2"), "RetinaNet", {}),
        (("PKD", "DKD"), "GeneralizedRCNN", {}),
        (("CWD",), "RetinaNet", {"KD__TEACHER__INPUT_SCALE": 2.0}),
    ],
)
def test_losses_are_those_without_a_cache(tmp_path, heads, arch, overrides):
    batch = make_batch(teacher_scale=overrides.get("KD__TEACHER__INPUT_SCALE", 1.0))
    found = []
    for cache in ("off", "disk"):
        model = wrapper_of(tmp_path, heads, cache, arch, **overrides)
        for _ in range(1 if cache == "off" else 2):
            torch.manual_seed(0)
            found.append(kd_models.losses_at(model, batch))
    assert model.teacher.cache.hits() == 0.5
    plain, new, kept = found
    assert plain.keys() == new.keys() == kept.keys()
    assert any(name.startswith("loss_kd_") and value > 0 for name, value in plain.items())
    for name, value in plain.items():
        torch.testing.assert_close(new[name], value, rtol=2e-3, atol=1e-6)
        if name.startswith("loss_kd_"):  # RetinaNet's own have a running normaliser
            torch.testing.assert_close(kept[name], new[name], rtol=1e-6, atol=1e-7)


def test_images_are_known_before_they_go_to_the_device(tmp_path, monkeypatch):
    model = wrapper_of(tmp_path, ("CWD",), "ram", KD__TEACHER__INPUT_SCALE=2.0)
    batch = make_batch(teacher_scale=2.0)
    marked = with_digests(batch, model.links)
    expected = [{"": digest(x["image_teacher"])} for x in batch]
    assert [x["teacher_digests"] for x in marked] == expected

    def of_texts(*parts):
        assert not any(isinstance(x, torch.Tensor) for x in parts)
        return digest(*parts)

    monkeypatch.setattr("projects.kd.teacher.digest", of_texts)
    kd_models.losses_at(model, batch)
    assert model.teacher.cache.hits() == 0.0
    plain = wrapper_of(tmp_path, ("CWD",), "off")
    assert with_digests(batch, plain.links) is batch


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"INPUT__CROP__ENABLED": True}, "INPUT.CROP.ENABLED cuts another part"),
        ({"INPUT__DETR_AUGMENTATION": True}, "INPUT.DETR_AUGMENTATION cuts another part"),
        (
            {"INPUT__MIN_SIZE_TRAIN_SAMPLING": "range", "INPUT__MIN_SIZE_TRAIN": (32, 64)},
            "INPUT.MIN_SIZE_TRAIN_SAMPLING 'range' draws another size",
        ),
    ],
)
def test_images_that_never_come_again_are_refused(overrides, words):
    cfg = tiny_cfg(KD__TEACHER__CACHE="disk", **overrides)
    with pytest.raises(ConfigError, match="KD.TEACHER.CACHE is 'disk': ") as error:
        check_cache(cfg)
    assert words in str(error.value)
    check_cache(tiny_cfg(**overrides))


def test_a_tap_inside_the_backbone_is_refused():
    inner = {"stem": TapSpec(("backbone.bottom_up",))}
    model = kd_models.build(tiny_cfg())
    with pytest.raises(ConfigError, match=r"KD\.TEACHER\.CACHE: tap stem lies inside the backbone"):
        Teacher(model, cache=FeatureCache(MIB)).tap({"features"}, extra=inner)
    Teacher(model).tap({"features"}, extra=inner)


def test_wrong_values_and_folders_are_one_line(tmp_path):
    cfg = tiny_cfg(KD__TEACHER__CACHE="yes")
    with pytest.raises(ConfigError, match=r"KD\.TEACHER\.CACHE is 'yes', it must be"):
        check_each(cfg)
    blocked = tmp_path / "file"
    blocked.write_text("")
    cfg = tiny_cfg(KD__TEACHER__CACHE="disk", KD__TEACHER__CACHE_DIR=str(blocked))
    with pytest.raises(ConfigError, match=r"KD\.TEACHER\.CACHE_DIR '.*file': the folder cannot"):
        build_cache(cfg)


def test_little_room_makes_it_smaller(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("projects.kd.teacher_cache.free_memory", lambda: 10 * MIB)
    assert build_cache(tiny_cfg(KD__TEACHER__CACHE="ram")).capacity == 5 * MIB
    assert "KD.TEACHER.CACHE ram: 5 MiB (CACHE_MB is 4096), of what is free" in caplog.text
    cfg = tiny_cfg(KD__TEACHER__CACHE="disk", KD__TEACHER__CACHE_MB=7, OUTPUT_DIR=str(tmp_path))
    assert build_cache(cfg).capacity == 7 * MIB
    assert build_cache(tiny_cfg()) is None


def test_a_run_says_what_it_needs_and_finds_and_resumes_to_the_bit(tmp_path, caplog):
    toy_data.register_noise(tmp_path, "noise_teacher_cache")
    cfg = tiny_cfg(**TOY)
    files = kd_models.write_teacher(tmp_path, cfg)

    def make(folder, **overrides):
        own = kd_runs.run_settings(tmp_path, folder, "noise_teacher_cache") | overrides
        own |= {"INPUT__MIN_SIZE_TRAIN": (32,), "KD__LOG_PERIOD": 2}
        return kd_models.distill_cfg(files, heads=("CWD",), **own)

    shared = {"KD__TEACHER__CACHE": "disk", "KD__TEACHER__CACHE_DIR": str(tmp_path / "answers")}
    weights, hits = [], []
    with caplog.at_level(logging.INFO, logger="projects.kd.engine.cache_report"):
        for folder in ("first", "second"):
            trainer = kd_runs.start(make(folder, **shared))
            if folder == "second":
                kd_runs.interrupt(trainer, at=3)
                trainer = kd_runs.start(make(folder, **shared), resume=True)
            trainer.train()
            hits.append(trainer.storage.history("kd/teacher_cache_hits").values())
            weights.append(trainer.student.state_dict())
    assert {x[0] for x in hits[1]} == {1.0} and hits[0][0][0] < 1, "the second found all"
    one, other = weights
    assert all(torch.equal(one[name], other[name]) for name in one)
    teacher = trainer._unwrapped.teacher
    forms, size = expected_size(trainer.cfg, teacher.model.backbone.output_shape(), (32, 64))
    assert forms == 2
    images = trainer._trainer.data_loader.images
    line = next(x for x in caplog.messages if x.startswith("KD.TEACHER.CACHE: "))
    assert line.startswith(f"KD.TEACHER.CACHE: {images} images in 2 forms (flips, sizes), up to ")
    kept = [os.path.getsize(x) for x in glob.glob(f"{tmp_path}/answers/*/*.safetensors")]
    assert len(kept) > 2 and max(kept) <= size + 1000
