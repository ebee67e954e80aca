"""A teacher that sees every image at another size: grids, masks, losses, and what is refused."""

import kd_models
import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from projects.kd import (
    ConfigError,
    DataError,
    DistillMetaArch,
    ImitationHead,
    build_training_model,
)
from projects.kd.schedule import Ramp


class Probe(ImitationHead):
    """Keeps the context of the last step; asks for all taps."""

    requires = frozenset({"features", "dense", "bottom_up"})

    def __init__(self):
        super().__init__(levels=("p3",), weight=1.0, mask_padding=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = None

    def forward(self, ctx):
        self.seen = ctx
        return {"loss_kd_x": self.scale * 1.0}


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory):
    return kd_models.write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def parts(teacher_files):
    kwargs = DistillMetaArch.from_config(kd_models.distill_cfg(teacher_files))
    return {name: kwargs[name] for name in ("student", "teacher", "level_map")}


def wrap(parts, scale: float) -> DistillMetaArch:
    heads = nn.ModuleDict({"X": Probe()})
    return DistillMetaArch(**parts, heads=heads, ramps={"X": Ramp()}, teacher_scale=scale).train()


@pytest.mark.parametrize(
    ("scale", "canvas"), [(2.0, (128, 128)), (3.0, (128, 128)), (0.5, (256, 256))]
)
def test_a_teacher_of_another_resolution(parts, scale, canvas):
    """Grids are exact multiples, in training only; the teacher sees its own images."""
    wrapper = wrap(parts, scale)
    shown = []
    handle = wrapper.teacher.model.backbone.register_forward_pre_hook(
        lambda module, inputs: shown.append(inputs[0])
    )
    batch = kd_models.make_batch(sizes=((60, 90), (97, 64)), teacher_scale=scale)
    kd_models.losses_at(wrapper, batch)
    handle.remove()
    ctx = wrapper.heads["X"].seen
    assert ctx.canvas == canvas and ctx.teacher_scale == scale
    assert ctx.image_sizes == [(60, 90), (97, 64)]
    images = [x["image_teacher"] for x in batch]
    assert ctx.teacher_image_sizes == [tuple(x.shape[-2:]) for x in images]
    theirs = tuple(int(scale * side) for side in canvas)
    assert torch.equal(shown[0], wrapper.teacher.preprocess(images, theirs, "BGR"))
    for level, stride in (("p3", 8), ("p4", 16), ("p5", 32), ("p6", 64), ("p7", 128)):
        ours = ctx.student_features[level].shape[-2:]
        other = ctx.teacher_features[level].shape[-2:]
        assert ours == tuple(side // stride for side in canvas)
        assert other == tuple(int(scale * side) for side in ours)
        assert ctx.teacher_valid_mask(level).shape == (2, 1, *other)
    for outputs, factor in ((ctx.student_outputs, 1), (ctx.teacher_outputs, scale)):
        assert outputs["bottom_up"]["res5"].shape[-2:] == (canvas[0] * factor // 32,) * 2
        assert outputs["dense"].logits[0].shape[-2:] == (canvas[0] * factor // 8,) * 2
    assert wrapper.student.backbone.size_divisibility == 32


def test_the_students_own_losses_do_not_see_the_second_image(teacher_files):
    """But for the larger canvas: with images that fill it they are those of a plain student."""
    cfg = kd_models.distill_cfg(teacher_files, KD__TEACHER__INPUT_SCALE=2.0)
    wrapper = kd_models.build_wrapper(cfg)
    plain = kd_models.build(cfg, seed=9).train()
    plain.load_state_dict(wrapper.student.state_dict())
    batch = kd_models.make_batch(sizes=((128, 256),), teacher_scale=2.0)
    losses, expected = kd_models.losses_at(wrapper, batch), kd_models.losses_at(plain, batch)
    for name, value in expected.items():
        assert torch.equal(losses[name], value)
    wrapper.eval()
    batch = kd_models.make_batch(sizes=((60, 90),))  # evaluation has no second image
    with torch.no_grad():
        ours, other = wrapper(batch)[0]["instances"], plain.eval()(batch)[0]["instances"]
    assert len(ours) and torch.equal(ours.pred_boxes.tensor, other.pred_boxes.tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("image_teacher"), r"is 2, and .* no 'image_teacher'; use .*Mapper"),
        (
            lambda x: x.update(image_teacher=x["image_teacher"][:, :, :-1]),
            r"is 2: .*\(96, 64\) .*\(192, 127\) pixels, not \(192, 128\)",
        ),
    ],
)
def test_a_mapper_without_the_teachers_image_is_refused_at_the_first_batch(parts, change, message):
    wrapper = wrap(parts, 2.0)
    batch = kd_models.make_batch(teacher_scale=2.0)
    change(batch[1])
    with pytest.raises(DataError, match=r"^KD\.TEACHER\.INPUT_SCALE " + message) as error:
        kd_models.losses_at(wrapper, batch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [1.3, 0.0, -1.0])
def test_scales_that_cannot_work_are_refused_when_building(teacher_files, scale):
    cfg = kd_models.distill_cfg(teacher_files, KD__TEACHER__INPUT_SCALE=scale)
    with pytest.raises(ConfigError, match=r"^KD\.TEACHER\.INPUT_SCALE") as error:
        build_training_model(cfg)
    assert "\n" not in str(error.value)


def test_levels_may_be_shifted_for_a_teacher_of_double_resolution(teacher_files):
    """Level l of the student with l + 1 of the teacher: cells that show the same pixels."""
    cfg = kd_models.distill_cfg(
        teacher_files,
        heads=("Mimic", "CWD"),
        KD__TEACHER__INPUT_SCALE=2.0,
        KD__LEVEL_MAP=[["p3", "p4"], ["p4", "p5"], ["p5", "p6"]],
        KD__CWD__TARGET="dense",
    )
    wrapper = kd_models.build_wrapper(cfg)
    with EventStorage(0):
        ctx, _ = wrapper.observe(kd_models.make_batch(teacher_scale=2.0))
        losses = wrapper.imitate(ctx)
    assert ctx.canvas == (96, 96), "no level asks for more than the padding of 32"
    for level, ours in ctx.student_features.items():
        if level in ctx.teacher_features:
            assert ctx.teacher_features[level].shape == ours.shape
            assert torch.equal(ctx.teacher_valid_mask(level), ctx.valid_mask(level))
    assert all(loss > 0 for loss in losses.values())


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_every_head_trains_with_a_teacher_of_another_resolution(teacher_files, scale):
    cfg = kd_models.distill_cfg(
        teacher_files,
        heads=("FGFI", "CWD", "PKD", "ICD", "Mimic"),
        MODEL__FPN__OUT_CHANNELS=8,
        KD__TEACHER__INPUT_SCALE=scale,
        KD__ICD__PRIORS="uniform",
    )
    wrapper = kd_models.build_wrapper(cfg)
    batch = kd_models.make_batch(sizes=((60, 90), (97, 64)), teacher_scale=scale)
    losses = kd_models.losses_at(wrapper, batch)
    sum(losses.values()).backward()
    distillation = [v for k, v in losses.items() if k.startswith(("loss_kd", "loss_aux"))]
    assert len(distillation) == 7 and all(x.isfinite() and x > 0 for x in distillation)
    assert all(p.grad.isfinite().all() for p in wrapper.parameters() if p.grad is not None)
