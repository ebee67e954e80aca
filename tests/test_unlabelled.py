"""Images without labels in a training step: task losses, heads, and batches of nothing else."""

import kd_models
import pytest
import segmentation
import torch
import toy_data  # noqa: F401  (registers the toy backbone)
from torch import nn

from projects.kd import ConfigError, DataError, DistillMetaArch, ImitationHead
from projects.kd.balance import gradient_norm
from projects.kd.schedule import Ramp
from projects.kd.unlabelled import Joined, check_heads, parts_of

TOY = {"MODEL__BACKBONE__NAME": "build_toy_fpn_backbone"}
SMALL, LARGE = ((64, 96), (96, 64)), ((64, 128), (32, 64))
EQUAL = ((64, 96), (64, 80)) * 2


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Meta-arch to (config, weights) of a teacher, made when asked for."""
    made = {}

    def teacher(arch="RetinaNet"):
        if arch not in made:
            toy = TOY if arch == "RetinaNet" else {}
            cfg = kd_models.tiny_cfg(arch, **toy)
            made[arch] = kd_models.write_teacher(tmp_path_factory.mktemp(arch), cfg)
        return made[arch]

    return teacher


def build(teachers, heads=("Mimic",), arch="RetinaNet", **overrides):
    """A wrapper, and one without batch statistics where the toy backbone has batch norms."""
    toy = TOY if arch == "RetinaNet" else {}
    cfg = kd_models.distill_cfg(teachers(arch), arch, heads=heads, **toy, **overrides)
    return kd_models.build_wrapper(cfg)


def at_rest(wrapper):
    """The same with batch norms that use their running statistics."""
    wrapper.student.backbone.eval()
    return wrapper


def unlabelled(batch):
    """The same images without their labels."""
    keys = ("image", "image_teacher", "height", "width")
    return [{**{k: x[k] for k in keys if k in x}, "unlabeled": True} for x in batch]


def losses_of(wrapper, batch, seed=5):
    torch.manual_seed(seed)
    return kd_models.losses_at(wrapper, batch)


def gradients_of(wrapper, loss):
    parameters = dict(wrapper.named_parameters())
    found = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_task_losses_of_a_mixed_batch_are_those_of_the_labelled_part(teachers, arch):
    labelled = kd_models.make_batch(SMALL)
    others = unlabelled(kd_models.make_batch(LARGE, seed=3))
    alone = losses_of(build(teachers, arch=arch), labelled)
    wrapper = build(teachers, arch=arch)
    # in any order, with batch norms that train, and images that need a larger canvas
    mixed = losses_of(wrapper, [others[0], labelled[0], others[1], labelled[1]])
    assert mixed.keys() == alone.keys()
    for name in alone.keys() - {"loss_kd_mimic"}:
        assert torch.equal(mixed[name], alone[name]), name
    assert mixed["loss_kd_mimic"] != alone["loss_kd_mimic"]
    assert any("bottom_up" in name for name in gradients_of(wrapper, mixed["loss_kd_mimic"]))


@pytest.mark.parametrize("target", ["features", "dense"])
def test_heads_on_a_mixed_batch_equal_those_on_a_labelled_one(teachers, target):
    heads = ("CWD", "AT") if target == "dense" else ("Mimic", "CWD", "PKD", "AT", "MGD", "ReviewKD")
    targets = {f"KD__{name}__TARGET": target for name in ("CWD", "AT")}
    wrapper = at_rest(build(teachers, heads, **targets))
    batch = kd_models.make_batch(EQUAL)
    whole = losses_of(wrapper, batch)
    parts = losses_of(wrapper, batch[:2] + unlabelled(batch[2:]))
    assert whole.keys() == parts.keys()
    names = [name for name in whole if name.startswith("loss_kd_")]
    for name in names:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=0)
    both = (gradients_of(wrapper, sum(x[name] for name in names)) for x in (parts, whole))
    assert_close(*both)


def test_a_part_on_a_smaller_canvas_is_joined_with_padding(teachers):
    wrapper = at_rest(build(teachers, KD__MIMIC__LEVELS=("p3",)))
    small, large = kd_models.make_batch(((64, 64),)), kd_models.make_batch(((96, 128),), seed=1)
    one, two = (losses_of(wrapper, x)["loss_kd_mimic"] for x in (small, large))
    joined = losses_of(wrapper, small + unlabelled(large))["loss_kd_mimic"]
    cells = torch.tensor([8 * 8.0, 12 * 16])
    expected = (torch.stack([one, two]) * cells).sum() / cells.sum()
    torch.testing.assert_close(joined, expected, rtol=1e-5, atol=0)


def test_a_teacher_that_sees_another_size(teachers):
    wrapper = at_rest(build(teachers, KD__TEACHER__INPUT_SCALE=2.0))
    batch = kd_models.make_batch(EQUAL, teacher_scale=2.0)
    whole = losses_of(wrapper, batch)["loss_kd_mimic"]
    parts = losses_of(wrapper, batch[:2] + unlabelled(batch[2:]))["loss_kd_mimic"]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)


def test_heads_that_need_labels_see_the_labelled_images_alone(teachers):
    wrapper = at_rest(build(teachers, ("FGFI", "Mimic"), KD__FGFI__WEIGHT=1.0))
    batch = kd_models.make_batch(EQUAL)
    alone = losses_of(wrapper, batch[:2])
    parts = losses_of(wrapper, batch[:2] + unlabelled(batch[2:]))
    assert torch.equal(parts["loss_kd_fgfi"], alone["loss_kd_fgfi"])
    assert parts["loss_kd_mimic"] != alone["loss_kd_mimic"]


def test_images_alone_train_heads_alone(teachers):
    wrapper = build(teachers, ("Mimic", "CWD"))
    batch = kd_models.make_batch(SMALL)
    losses = losses_of(wrapper, unlabelled(batch))
    assert set(losses) == {"loss_kd_mimic", "loss_kd_cwd"}
    labelled = losses_of(build(teachers, ("Mimic", "CWD")), batch)
    for name, value in losses.items():
        assert torch.equal(value, labelled[name])
    found = gradients_of(wrapper, sum(losses.values()))
    assert not any(name.startswith("student.head") for name in found)
    wrapper.heads["Mimic"].needs_boxes = True
    with pytest.raises(DataError, match=r"KD\.HEADS: Mimic needs boxes"):
        losses_of(wrapper, unlabelled(batch))


def test_the_share_of_a_head_is_that_of_its_gradient_on_all_images(teachers):
    wrapper = at_rest(build(teachers, KD__BALANCE__TARGET=0.5, KD__BALANCE__BOUND=1e6))
    batch = kd_models.make_batch(EQUAL)
    batch = batch[:2] + unlabelled(batch[2:])
    observe = wrapper.observe

    def remembered(batch):
        ctx, losses = observe(batch)
        wrapper.maps = ctx.origins(wrapper.heads["Mimic"].acts_on(ctx))
        return ctx, losses

    wrapper.observe = remembered
    losses = losses_of(wrapper, batch)
    assert len(wrapper.maps) == 2 * len(wrapper.level_map)
    task = sum(x for name, x in losses.items() if "_kd_" not in name)
    share = gradient_norm(losses["loss_kd_mimic"], wrapper.maps) / gradient_norm(task, wrapper.maps)
    assert share == pytest.approx(0.5, rel=1e-4)


def test_heads_that_read_what_cannot_be_joined_see_the_labelled_images(teachers):
    options = {"arch": "ConditionalDETR", "KD__D3ETR__AUX_DET_WEIGHT": 0.0}
    wrapper = build(teachers, ("D3ETR",), **options)
    batch = kd_models.make_batch(((64, 64),) * 3)
    alone = losses_of(wrapper, batch[:1])
    mixed = losses_of(wrapper, batch[:1] + unlabelled(batch[1:]))
    for name, value in alone.items():
        torch.testing.assert_close(mixed[name], value)
    assert "loss_kd_d3etr_pred" in losses_of(wrapper, unlabelled(batch)), "no labels are needed"


def test_a_segmentor_without_preprocess_image(tmp_path):
    cfg = segmentation.segmentor_cfg("pspnet")
    teacher = kd_models.write_teacher(tmp_path, cfg)
    values = {"KD__TEACHER__CONFIG_FILE": teacher[0], "KD__TEACHER__WEIGHTS": teacher[1]}
    values |= {"KD__META_ARCHITECTURE": "DistillMetaArch", "KD__HEADS": ("CWD", "IFVD")}
    values["KD__CWD__TARGET"] = "sem_seg"
    wrapper = kd_models.build_wrapper(segmentation.segmentor_cfg("pspnet", **values)).eval()
    wrapper.training = True  # of the wrapper alone: no batch statistics, no dropout
    wrapper.student.training = wrapper.student.sem_seg_head.training = True
    batch = segmentation.label_batch(((64, 64),) * 4)
    whole = losses_of(wrapper, batch)
    parts = losses_of(wrapper, batch[:2] + unlabelled(batch[2:]))
    torch.testing.assert_close(parts["loss_kd_cwd"], whole["loss_kd_cwd"], rtol=1e-4, atol=0)
    alone = losses_of(wrapper, batch[:2])
    for name in ("loss_sem_seg", "loss_kd_ifvd"):  # the latter reads label maps
        torch.testing.assert_close(parts[name], alone[name])


class Reads(ImitationHead):
    """Returns the sum of a tap."""

    def __init__(self, tap):
        super().__init__(levels=("p3",), weight=1.0, mask_padding=False)
        self.requires_student = frozenset({tap})
        self.tap = tap

    def forward(self, ctx):
        return {"loss_kd_reads": ctx.student_outputs[self.tap][0].sum()}


def test_a_tap_of_labelled_images_alone(teachers):
    kwargs = DistillMetaArch.from_config(
        kd_models.distill_cfg(teachers("GeneralizedRCNN"), "GeneralizedRCNN")
    )
    kwargs |= {"heads": nn.ModuleDict({"X": Reads("box")}), "ramps": {"X": Ramp()}}
    wrapper = DistillMetaArch(**kwargs).train()
    batch = kd_models.make_batch(((64, 64),) * 2)
    found = losses_of(wrapper, batch[:1] + unlabelled(batch[1:]))["loss_kd_reads"]
    assert found.isfinite() and found.requires_grad


def test_a_detector_that_says_nothing_of_its_images(teachers, monkeypatch):
    wrapper = build(teachers)
    batch = unlabelled(kd_models.make_batch(SMALL))
    expected = losses_of(wrapper, batch)["loss_kd_mimic"]
    monkeypatch.setattr(type(wrapper.student), "preprocess_image", property())  # it has none
    assert torch.equal(losses_of(wrapper, batch)["loss_kd_mimic"], expected)
    del wrapper.student.pixel_mean
    with pytest.raises(ConfigError, match=r"RetinaNet has neither preprocess_image\(batch\) n"):
        losses_of(wrapper, batch)


def test_parts_and_joined_maps():
    batch = [{"n": 0}, {"n": 1, "unlabeled": True}, {"n": 2}]
    assert [[x["n"] for x in part] for part in parts_of(batch)] == [[0, 2], [1]]
    assert len(parts_of(batch[:1])) == len(parts_of(batch[1:2])) == 1
    first, second = torch.ones(1, 2, 2, 4), torch.full((2, 2, 3, 2), 2.0)
    sources = {}
    maps = {"a": first, "list": [first], "boxes": torch.ones(3, 4), "mine": first}
    joined = Joined(maps, {**maps, "a": second, "list": [second], "mine": 1}, sources)
    assert set(joined) == {"a", "list"} and not sources, "made when asked for"
    assert joined["a"].shape == (3, 2, 3, 4) and joined["a"] is joined["a"]
    assert joined["a"].sum() == first.sum() + second.sum()
    assert torch.equal(joined["a"][:1, :, :2], first)
    assert torch.equal(joined["a"][1:, :, :, :2], second)
    assert sources[id(joined["a"])] == (first, second)


@pytest.mark.parametrize(
    "heads, train, message",
    [
        (("FGFI",), ("x",), r"DATASETS: no head of KD\.HEADS learns .* FGFI needs boxes"),
        (("Mimic", "FGFI"), (), r"KD\.HEADS: FGFI needs boxes, and DATASETS\.TRAIN is empty"),
    ],
)
def test_heads_without_images_to_learn_from(teachers, heads, train, message):
    wrapper = build(teachers, heads)
    cfg = kd_models.tiny_cfg(KD__UNLABELED__DATASETS=("y",), DATASETS__TRAIN=train)
    with pytest.raises(ConfigError, match=message):
        check_heads(cfg, wrapper.heads)
    check_heads(kd_models.tiny_cfg(), wrapper.heads)
