"""Students and teachers that pad by rules of their own: the maps of both sides meet."""

import kd_lazy
import kd_models
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.structures import ImageList
from torch import nn

from projects.kd import ConfigError, DataError, TapSpec, Teacher, register_detector
from projects.kd.detectors import padding_of
from projects.kd.distiller import DistillMetaArch
from projects.kd.levels import canvas_size, cut, needed_divisibility


class PadsTo96(RetinaNet):
    """As Mask2Former: the meta-arch has a number of its own, the backbone is not asked."""

    size_divisibility = 96

    def preprocess_image(self, batched_inputs):
        images = [
            (x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs
        ]
        return ImageList.from_tensors(images, self.size_divisibility)


register_detector(
    "PadsTo96", padding=lambda model, sizes: canvas_size(sizes, model.size_divisibility)
)


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory):
    return kd_models.write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def registered():
    META_ARCH_REGISTRY.register(PadsTo96)
    yield
    META_ARCH_REGISTRY._obj_map.pop("PadsTo96")


def teacher_maps(model, images: list[torch.Tensor], canvas) -> dict[str, torch.Tensor]:
    """A teacher's own features of images that lie on a canvas."""
    batch = [(image - model.pixel_mean) / model.pixel_std for image in images]
    padded = torch.stack(
        [
            nn.functional.pad(x, (0, canvas[1] - x.shape[2], 0, canvas[0] - x.shape[1]))
            for x in batch
        ]
    )
    with torch.no_grad():
        return model.backbone(padded)


def test_a_student_with_a_rule_of_its_own(registered, teacher_files):
    cfg = kd_models.distill_cfg(
        teacher_files, MODEL__META_ARCHITECTURE="PadsTo96", KD__TEACHER__CHANNELS_LAST=False
    )
    kwargs = DistillMetaArch.from_config(cfg)
    kwargs["teacher"].model.backbone._size_divisibility = 64
    wrapper = DistillMetaArch(**kwargs).train()
    batch = kd_models.make_batch(sizes=((50, 70), (64, 33)))
    with kd_models.EventStorage(0):
        ctx, losses = wrapper.observe(batch)
    assert ctx.canvas == (96, 96) and all(torch.isfinite(x) for x in losses.values())
    # the teacher saw 128 x 128, multiples of 64, and its cells beyond 96 are gone
    whole = teacher_maps(wrapper.teacher.model, [x["image"] for x in batch], (128, 128))
    for level, cells in (("p3", 12), ("p4", 6), ("p5", 3), ("p6", 2), ("p7", 1)):
        torch.testing.assert_close(
            ctx.teacher_features[level], whole[level][..., :cells, :cells], rtol=1e-5, atol=1e-5
        )
        assert ctx.student_features[level].shape[-2:] == (cells, cells)
    assert kd_models.losses_at(wrapper, batch)["loss_kd_mimic"] > 0


def test_other_scales_need_detectron2s_padding(registered, teacher_files):
    cfg = kd_models.distill_cfg(
        teacher_files, MODEL__META_ARCHITECTURE="PadsTo96", KD__TEACHER__INPUT_SCALE=2.0
    )
    with pytest.raises(ConfigError, match=r"KD\.TEACHER\.INPUT_SCALE is 2: PadsTo96"):
        kd_models.build_wrapper(cfg)


def test_subclasses_inherit_the_rule():
    class Sub(PadsTo96):
        pass

    model = Sub.__new__(Sub)
    assert padding_of(model)(model, [(97, 10)]) == (192, 96)
    assert padding_of(nn.Linear(1, 1)) is None


def test_conditional_detr_learns_from_a_pyramid(tmp_path):
    """Its backbone pads to nothing and cannot be told; the teacher's FPN needs multiples of 32."""
    teacher = kd_models.write_teacher(tmp_path, kd_models.tiny_cfg("GeneralizedRCNN"))
    cfg = kd_models.distill_cfg(
        teacher, "ConditionalDETR", KD__LEVEL_MAP=[["res4", "p4"]], KD__ADAPTER__TYPE="conv1x1"
    )
    wrapper = kd_models.build_wrapper(cfg)
    batch = kd_models.make_batch(sizes=((50, 70), (64, 33)))
    with kd_models.EventStorage(0):
        ctx, _ = wrapper.observe(batch)
    assert ctx.canvas == (64, 70)
    whole = teacher_maps(wrapper.teacher.model, [x["image"] for x in batch], (64, 96))
    torch.testing.assert_close(
        ctx.teacher_features["res4"], whole["p4"][..., :4, :5], rtol=1e-5, atol=1e-5
    )
    assert ctx.student_features["res4"].shape[-2:] == (4, 5)
    assert kd_models.losses_at(wrapper, batch)["loss_kd_mimic"] > 0


def test_a_vitdet_teacher_sees_its_square_and_the_student_does_not(tmp_path):
    torch.manual_seed(0)
    model = instantiate(LazyConfig.load(kd_lazy.write_model(tmp_path, "vitdet")).model).eval()
    assert needed_divisibility(model.backbone) == 32 and model.backbone.size_divisibility == 0
    teacher = Teacher(model, input_format="RGB")
    teacher.tap({"features", "rpn"})
    images = [x["image"] for x in kd_models.make_batch(sizes=((32, 40), (20, 33)))]
    with torch.no_grad():
        found = teacher.observe(images, (32, 64), "RGB")
        # as detectron2 prepares them
        own = model.backbone(model.preprocess_image([{"image": x} for x in images]).tensor)
    for level, shape in model.backbone.output_shape().items():
        rows, columns = -(-32 // shape.stride), -(-64 // shape.stride)
        torch.testing.assert_close(
            found["features"][level], own[level][..., :rows, :columns], rtol=1e-5, atol=1e-5
        )
    assert [x.shape[-2:] for x in found["rpn"].logits] == [
        x.shape[-2:] for x in found["features"].values()
    ], "heads read the cut maps"
    with pytest.raises(DataError, match=r"32 x 72 pixels.*teacher.*square of 64 \(square_pad\)"):
        teacher.observe(images, (32, 72), "RGB")


def test_taps_without_levels_cannot_be_cut(tmp_path):
    model = instantiate(LazyConfig.load(kd_lazy.write_model(tmp_path, "vitdet")).model).eval()
    teacher = Teacher(model)
    teacher.tap({"features"}, extra={"inner": TapSpec("backbone.net.blocks.0")})
    with pytest.raises(ConfigError, match=r"tap 'inner' \(backbone\.net\.blocks\.0\)"):
        teacher.observe([torch.zeros(3, 32, 32)], (32, 32), "BGR")


def test_cutting_keeps_the_cells_that_start_inside():
    maps = {"a": torch.arange(64.0).view(1, 1, 8, 8), "b": torch.arange(16.0).view(1, 1, 4, 4)}
    found = cut(maps, {"a": 8, "b": 16}, (33, 16))
    torch.testing.assert_close(found["a"], maps["a"][..., :5, :2])
    torch.testing.assert_close(found["b"], maps["b"][..., :3, :1])


def test_an_image_beyond_the_students_square_is_refused_not_cut():
    with pytest.raises(DataError, match=r"30 x 90 pixels.*student.*square of 64.*MAX_SIZE_TRAIN"):
        canvas_size([(30, 90)], 32, 64)


def test_the_wrapper_says_where_a_rule_is_missing(teacher_files, monkeypatch):
    kwargs = DistillMetaArch.from_config(kd_models.distill_cfg(teacher_files))
    monkeypatch.setattr(
        kwargs["student"],
        "preprocess_image",
        lambda batch: ImageList.from_tensors([x["image"].float() for x in batch], 80),
    )
    wrapper = DistillMetaArch(**kwargs).train()
    with pytest.raises(ConfigError, match=r"saw \(128, 96\); say how.*register_detector\(padding"):
        kd_models.losses_at(wrapper, kd_models.make_batch(sizes=((100, 96),)))
