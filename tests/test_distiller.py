"""The training wrapper: losses, schedules, canvas, evaluation, and what is saved."""

import copy
import gc
import weakref

import kd_models
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage
from torch import nn

from projects.kd import (
    ConfigError,
    DataError,
    DistillMetaArch,
    ImitationHead,
    Teacher,
    build_training_model,
    student_of,
)
from projects.kd.schedule import Ramp


class Constant(ImitationHead):
    """Returns given losses; its parameter lets a gradient flow."""

    def __init__(self, **losses):
        super().__init__(levels=("p3",), weight=1.0, mask_padding=False)
        self.losses = losses
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = None

    def forward(self, ctx):
        self.seen = ctx
        return {name: self.scale * value for name, value in self.losses.items()}


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory):
    return kd_models.write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def parts(teacher_files):
    """Student, teacher and level map; tests build wrappers with heads of their own around them."""
    kwargs = DistillMetaArch.from_config(kd_models.distill_cfg(teacher_files))
    return {name: kwargs[name] for name in ("student", "teacher", "level_map")}


def wrap(parts, heads: dict, ramps: dict | None = None, **kwargs) -> DistillMetaArch:
    ramps = {name: Ramp() for name in heads} | (ramps or {})
    wrapper = DistillMetaArch(**parts, heads=nn.ModuleDict(heads), ramps=ramps, **kwargs)
    return wrapper.train()


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_loss_names_and_agreement_with_the_plain_student(arch, tmp_path):
    teacher = kd_models.write_teacher(tmp_path, kd_models.tiny_cfg(arch))
    cfg = kd_models.distill_cfg(teacher, arch)
    wrapper = kd_models.build_wrapper(cfg)
    plain = kd_models.build(cfg, seed=9).train()
    plain.load_state_dict(wrapper.student.state_dict())
    batch = kd_models.make_batch()
    torch.manual_seed(0)
    losses = kd_models.losses_at(wrapper, batch)
    torch.manual_seed(0)
    expected = kd_models.losses_at(plain, batch)
    assert set(losses) == set(expected) | {"loss_kd_mimic"}
    for name, value in expected.items():
        assert torch.equal(losses[name], value), "the student's own losses changed"
    assert all(value.ndim == 0 and value.requires_grad for value in losses.values())


def test_ramp_multiplies_kd_losses_only(parts):
    head = Constant(loss_kd_x=2.0, loss_aux_x=3.0)
    wrapper = wrap(parts, {"X": head}, {"X": Ramp(start=5, warmup=3, end=12)})
    batch = kd_models.make_batch()
    factors = {4: 0.0, 5: 0.25, 7: 0.75, 8: 1.0, 11: 1.0, 12: 0.0}
    for iteration, factor in factors.items():
        losses = kd_models.losses_at(wrapper, batch, iteration)
        assert losses["loss_kd_x"].item() == pytest.approx(2.0 * factor)
        assert losses["loss_aux_x"].item() == 3.0
        assert losses["loss_kd_x"].requires_grad, "the head dropped out of the graph"
        assert head.seen.iteration == iteration, "the head did not run"


def test_each_head_follows_its_own_ramp(parts):
    heads = {"A": Constant(loss_kd_a=1.0), "B": Constant(loss_kd_b=1.0)}
    wrapper = wrap(parts, heads, {"A": Ramp(end=1), "B": Ramp(start=1)})
    losses = [kd_models.losses_at(wrapper, kd_models.make_batch(), i) for i in (0, 1)]
    assert [(x["loss_kd_a"].item(), x["loss_kd_b"].item()) for x in losses] == [(1, 0), (0, 1)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_loss_counts_for_nothing_until_its_ramp_starts(parts, bad):
    wrapper = wrap(parts, {"X": Constant(loss_kd_x=bad)}, {"X": Ramp(start=1)})
    wrapper.zero_grad()
    losses = kd_models.losses_at(wrapper, kd_models.make_batch(), 0)
    assert losses["loss_kd_x"].item() == 0.0
    sum(losses.values()).backward()
    gradients = [p.grad for p in wrapper.student.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    # while it counts it is never mended, so that training stops
    losses = kd_models.losses_at(wrapper, kd_models.make_batch(), 1)
    assert not losses["loss_kd_x"].isfinite()


def test_equal_loss_names_are_refused(parts):
    twice = {"A": Constant(loss_kd_x=1.0), "B": Constant(loss_kd_x=1.0)}
    with pytest.raises(ConfigError, match=r"KD\.HEADS.*loss_kd_x"):
        kd_models.losses_at(wrap(parts, twice), kd_models.make_batch())
    with pytest.raises(ConfigError, match=r"KD\.HEADS.*loss_cls"):
        wrapper = wrap(parts, {"A": Constant(loss_cls=1.0)})
        kd_models.losses_at(wrapper, kd_models.make_batch())


def test_what_heads_see(parts):
    head = Constant(loss_kd_x=1.0)
    head.requires = frozenset({"features", "dense"})
    wrapper = wrap(parts, {"X": head}, log_period=4)
    batch = kd_models.make_batch(sizes=((64, 90), (50, 96)))
    kd_models.losses_at(wrapper, batch, 8)
    ctx = head.seen
    assert ctx.image_sizes == [(64, 90), (50, 96)] and ctx.canvas == (64, 96)
    assert set(ctx.teacher_features) == {"p3", "p4", "p5", "p6", "p7"}
    for level, theirs in ctx.teacher_features.items():
        ours = ctx.student_features[level]
        stride = ctx.stride(level)
        assert ours.shape[-2:] == theirs.shape[-2:] == (-(-64 // stride), -(-96 // stride))
        assert ours.requires_grad and not theirs.requires_grad
    assert ctx.student_outputs["dense"].logits[0].requires_grad
    assert not ctx.teacher_outputs["dense"].logits[0].requires_grad
    assert len(ctx.gt) == 2 and torch.equal(
        ctx.gt[0].gt_boxes.tensor, batch[0]["instances"].gt_boxes.tensor
    )
    assert ctx.log_scalars
    kd_models.losses_at(wrapper, batch, 9)
    assert not head.seen.log_scalars


def test_the_dense_head_of_the_teacher_runs_only_where_it_is_needed(parts):
    calls = []
    handle = parts["teacher"].model.head.register_forward_hook(lambda *_: calls.append(1))
    kd_models.losses_at(wrap(parts, {"X": Constant(loss_kd_x=1.0)}), kd_models.make_batch())
    assert not calls
    head = Constant(loss_kd_x=1.0)
    head.requires = frozenset({"features", "dense"})
    kd_models.losses_at(wrap(parts, {"X": head}), kd_models.make_batch())
    handle.remove()
    assert len(calls) == 1


def test_nothing_of_a_step_outlives_it(teacher_files):
    wrapper = kd_models.build_wrapper(kd_models.distill_cfg(teacher_files))
    seen = []

    def note(module, inputs, output):
        seen.extend(weakref.ref(tensor.untyped_storage()) for tensor in output.values())

    wrapper.student.backbone.register_forward_hook(note)
    wrapper.teacher.model.backbone.register_forward_hook(note)
    losses = kd_models.losses_at(wrapper, kd_models.make_batch())
    assert len(seen) == 10 and any(ref() is not None for ref in seen), "the graph holds them"
    sum(losses.values()).backward()
    gc.collect()
    assert all(ref() is None for ref in seen)


def test_evaluation_is_the_plain_student_and_leaves_no_trace(teacher_files):
    cfg = kd_models.distill_cfg(teacher_files)
    wrapper = kd_models.build_wrapper(cfg).eval()
    plain = kd_models.build(cfg, seed=9).eval()
    plain.load_state_dict(wrapper.student.state_dict())
    calls = []
    wrapper.teacher.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    batch = kd_models.make_batch()
    with torch.no_grad():
        ours, theirs = wrapper(batch), plain(batch)
    for a, b in zip(ours, theirs, strict=True):
        assert len(a["instances"]) > 0
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)
    assert not calls, "the teacher ran in evaluation"
    assert "features" not in wrapper._taps


def test_a_student_without_ground_truth_boxes(parts):
    head = Constant(loss_kd_x=1.0)
    wrapper = wrap(parts, {"X": head})
    batch = kd_models.make_batch(boxes=0)
    losses = kd_models.losses_at(wrapper, batch)
    assert [len(x) for x in head.seen.gt] == [0, 0]
    assert all(value.isfinite() for value in losses.values())


def test_a_head_that_needs_boxes_gets_a_batch_without_annotations(parts):
    head = Constant(loss_kd_x=1.0)
    wrapper = wrap(parts, {"X": head})
    with EventStorage(0):
        ctx, _ = wrapper.observe(kd_models.make_batch())
        ctx.gt = None
        assert wrapper.imitate(ctx)["loss_kd_x"] == 1.0
        head.needs_boxes = True
        with pytest.raises(DataError, match=r"KD\.HEADS: X needs boxes"):
            wrapper.imitate(ctx)


def test_teacher_with_coarser_padding_raises_the_students_in_training_only(teacher_files):
    cfg = kd_models.distill_cfg(teacher_files)
    kwargs = DistillMetaArch.from_config(cfg)
    kwargs["teacher"].model.backbone._size_divisibility = 64
    head = Constant(loss_kd_x=1.0)
    kwargs |= {"heads": nn.ModuleDict({"X": head}), "ramps": {"X": Ramp()}}
    wrapper = DistillMetaArch(**kwargs).train()
    kd_models.losses_at(wrapper, kd_models.make_batch(sizes=((64, 96), (96, 64))))
    assert head.seen.canvas == (128, 128)
    assert head.seen.student_features["p3"].shape[-2:] == (16, 16)
    assert head.seen.teacher_features["p3"].shape[-2:] == (16, 16)
    assert wrapper.student.backbone.size_divisibility == 32


def test_student_with_coarser_padding_than_the_teacher(teacher_files):
    kwargs = DistillMetaArch.from_config(kd_models.distill_cfg(teacher_files))
    kwargs["student"].backbone._size_divisibility = 96
    head = Constant(loss_kd_x=1.0)
    kwargs |= {"heads": nn.ModuleDict({"X": head}), "ramps": {"X": Ramp()}}
    kd_models.losses_at(DistillMetaArch(**kwargs).train(), kd_models.make_batch(((64, 64),)))
    assert head.seen.teacher_features["p3"].shape[-2:] == (12, 12)


def test_a_student_that_pads_in_its_own_way_is_refused(parts, monkeypatch):
    wrapper = wrap(parts, {"X": Constant(loss_kd_x=1.0)})
    preprocess = wrapper.student.preprocess_image

    def padded(batch):
        images = preprocess(batch)
        images.tensor = nn.functional.pad(images.tensor, (0, 32))
        return images

    monkeypatch.setattr(wrapper.student, "preprocess_image", padded)
    with pytest.raises(ConfigError, match=r"MODEL\.META_ARCHITECTURE RetinaNet.*\(96, 128\)"):
        kd_models.losses_at(wrapper, kd_models.make_batch())


def test_saved_weights_hold_no_teacher_and_load_in_stock_detectron2(teacher_files, tmp_path):
    cfg = kd_models.distill_cfg(
        teacher_files, KD__ADAPTER__TYPE="conv1x1", MODEL__FPN__OUT_CHANNELS=8
    )
    wrapper = kd_models.build_wrapper(cfg)
    names = set(wrapper.state_dict())
    assert {name.split(".")[0] for name in names} == {"student", "heads"}
    student = student_of(wrapper)
    assert {name.removeprefix("student.") for name in names if name.startswith("student.")} == set(
        student.state_dict()
    )
    torch.save({"model": student.state_dict()}, tmp_path / "student.pth")

    stock = get_cfg()  # without this project's keys
    stock.MODEL = cfg.MODEL.clone()
    model = build_model(stock)
    incompatible = model.load_state_dict(
        torch.load(tmp_path / "student.pth", weights_only=True)["model"]
    )
    assert not incompatible.missing_keys and not incompatible.unexpected_keys
    DetectionCheckpointer(model).load(str(tmp_path / "student.pth"))
    image = [{"image": kd_models.make_batch()[0]["image"]}]
    with torch.no_grad():
        ours, theirs = student.eval()(image)[0], model.eval()(image)[0]
    assert torch.equal(ours["instances"].scores, theirs["instances"].scores)


def test_deep_copies_keep_to_themselves(teacher_files):
    wrapper = kd_models.build_wrapper(kd_models.distill_cfg(teacher_files))
    twin = copy.deepcopy(wrapper)
    assert twin.teacher is wrapper.teacher
    assert twin.student is not wrapper.student
    losses, again = (kd_models.losses_at(x, kd_models.make_batch()) for x in (wrapper, twin))
    assert losses.keys() == again.keys()
    for name in losses:
        torch.testing.assert_close(losses[name], again[name])
    # a copy of the student alone (EMA) does not drag heads or teacher along
    copied: dict = {}
    average = copy.deepcopy(wrapper.student, copied)
    assert not any(isinstance(x, (DistillMetaArch, ImitationHead)) for x in copied.values())
    assert average.state_dict().keys() == wrapper.student.state_dict().keys()


def test_the_plain_student_is_built_without_a_teacher(monkeypatch):
    cfg = kd_models.tiny_cfg(KD__HEADS=("Mimic",))
    model = build_training_model(cfg)
    assert type(model).__name__ == "RetinaNet" and student_of(model) is model


def test_wrapper_is_registered_and_subclasses_can_combine_losses(teacher_files):
    assert META_ARCH_REGISTRY.get("DistillMetaArch") is DistillMetaArch

    @META_ARCH_REGISTRY.register()
    class OnlyDistill(DistillMetaArch):
        def combine(self, task, distillation):
            return distillation

    cfg = kd_models.distill_cfg(teacher_files, KD__META_ARCHITECTURE="OnlyDistill")
    wrapper = kd_models.build_wrapper(cfg)
    assert set(kd_models.losses_at(wrapper, kd_models.make_batch())) == {"loss_kd_mimic"}
    assert student_of(wrapper) is wrapper.student


def test_heads_run_in_fp32_under_autocast(parts):
    class Dtypes(Constant):
        def forward(self, ctx):
            product = self.scale * ctx.student_features["p3"].float().sum()
            layer = nn.functional.linear(product[None, None], torch.ones(1, 1))
            return {"loss_kd_x": layer.sum()}

    wrapper = wrap(parts, {"X": Dtypes()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = kd_models.losses_at(wrapper, kd_models.make_batch())
    assert losses["loss_kd_x"].dtype == torch.float32


def test_teacher_is_built_from_a_model_too(parts):
    model = kd_models.build(kd_models.tiny_cfg(), seed=4)
    own = Teacher(model)
    wrapper = wrap({**parts, "teacher": own}, {"X": Constant(loss_kd_x=1.0)})
    assert not model.training and wrapper.train().teacher is own and not model.training
