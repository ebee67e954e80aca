"""FGFI keeps to the contract; the head's value, its anchors, its two ways to run the adapter."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, RotatedAnchorGenerator
from head_contract import HeadContract
from kd_testing import CHANNELS, ToyDetector, head_cfg, instances, make_context, toy_info, wave
from torch import nn

from projects.kd import DistillContext
from projects.kd.errors import ConfigError, DataError
from projects.kd.heads import build_imitation_heads
from projects.kd.heads import fgfi as fgfi_module


class TestFGFI(HeadContract):
    name = "FGFI"
    node = {"WEIGHT": 1.0}
    equal_node = {"ADAPTER": "none"}
    may_skip_levels = True


class TestFGFIDense(HeadContract):
    """The adapter as a dense convolution, which a mask over most cells asks for."""

    name = "FGFI"
    node = {"WEIGHT": 1.0, "ASSIGN": "per_level"}
    equal_node = {"ADAPTER": "none"}
    may_skip_levels = True

    @pytest.fixture(autouse=True)
    def always_dense(self, monkeypatch):
        monkeypatch.setattr(fgfi_module, "SPARSE_SHARE", -1.0)


class TestFGFIPointwise(HeadContract):
    name = "FGFI"
    node = {"WEIGHT": 1.0, "ADAPTER": "conv1x1"}
    equal_node = {"ADAPTER": "none"}
    may_skip_levels = True


def build(student=None, channels=(CHANNELS, CHANNELS), **node):
    student = toy_info(channels[0]) if student is None else student
    return build_imitation_heads(head_cfg("FGFI", **node), student, toy_info(channels[1]))["FGFI"]


class Golden(nn.Module):
    """The detector of the golden numbers: two levels with three octaves of three shapes."""

    def __init__(self):
        super().__init__()
        shapes = {"p3": ShapeSpec(channels=3, stride=8), "p4": ShapeSpec(channels=3, stride=16)}
        self.backbone = nn.Module()
        self.backbone.output_shape = lambda: shapes
        self.head_in_features = ["p3", "p4"]
        octave = [2 ** (k / 3) for k in range(3)]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[32 * x for x in octave], [64 * x for x in octave]],
            aspect_ratios=[[0.5, 1.0, 2.0]],
            strides=[8, 16],
            offset=0.0,
        )


def golden_context(boxes=((10.0, 12, 42, 40), (30, 4, 94, 60), (70, 40, 80, 52))):
    shapes = {"p3": (1, 3, 8, 12), "p4": (1, 3, 4, 6)}

    def features(name):
        return {level: wave(name, *shape, dtype=torch.float32) for level, shape in shapes.items()}

    return DistillContext(
        iteration=0,
        image_sizes=[(64, 96)],
        canvas=(64, 96),
        gt=[instances((64, 96), torch.tensor(boxes).reshape(-1, 4))],
        student_features=features("student"),
        teacher_features=features("teacher"),
        strides={"p3": 8, "p4": 16},
    )


def golden_head(**node):
    infos = (toy_info(model=Golden()) for _ in range(2))
    cfg = head_cfg("FGFI", **{"ADAPTER": "none", "WEIGHT": 1.0, **node})
    return build_imitation_heads(cfg, *infos)["FGFI"]


def test_golden_loss_through_the_head():
    loss = golden_head()(golden_context())["loss_kd_fgfi"]
    assert loss.item() == pytest.approx(11.34132472, rel=1e-5)


@pytest.mark.parametrize(("scope", "counts"), [("joint", [39, 9]), ("per_level", [44, 24])])
def test_golden_mask_sizes_through_the_head(scope, counts):
    masks = golden_head(ASSIGN=scope).masks(golden_context())
    assert [int(mask.sum()) for mask in masks.values()] == counts


def test_the_joint_maximum_covers_levels_that_are_not_distilled():
    both, fine = golden_head(), golden_head(LEVELS=("p3",))
    ctx = golden_context()
    assert torch.equal(fine.masks(ctx)["p3"], both.masks(ctx)["p3"])
    assert list(fine.masks(ctx)) == ["p3"]
    error = 924.06911158 / (2 * 39)
    assert fine(ctx)["loss_kd_fgfi"].item() == pytest.approx(error, rel=1e-5)


def test_the_normaliser_counts_the_whole_batch():
    """Two images: summed errors over summed cells, not a mean of means."""
    head, ctx = golden_head(), golden_context()
    parts, cells = [], []
    for boxes in (((10.0, 12, 42, 40),), ((30.0, 4, 94, 60), (70, 40, 80, 52))):
        one = golden_context(boxes)
        cells.append(sum(int(mask.sum()) for mask in head.masks(one).values()))
        parts.append(head(one)["loss_kd_fgfi"] * cells[-1])
        ctx.gt.append(one.gt[0])
    assert cells[0] != cells[1]
    ctx.gt = ctx.gt[1:]
    ctx.image_sizes = ctx.image_sizes * 2
    for features in (ctx.student_features, ctx.teacher_features):
        features.update({level: x.repeat(2, 1, 1, 1) for level, x in features.items()})
    torch.testing.assert_close(head(ctx)["loss_kd_fgfi"], sum(parts) / sum(cells))


@pytest.mark.parametrize("mask_padding", [False, True])
def test_sparse_and_dense_adapters_agree(monkeypatch, mask_padding):
    head = build(channels=(CHANNELS, 9), MASK_PADDING=mask_padding)
    for adapter in head.adapters.values():
        nn.init.normal_(adapter.weight)
        nn.init.normal_(adapter.bias)
    results = []
    for share in (1.0, -1.0):
        monkeypatch.setattr(fgfi_module, "SPARSE_SHARE", share)
        ctx = make_context(channels=(CHANNELS, 9))
        loss = head(ctx)["loss_kd_fgfi"]
        inputs = [*ctx.student_features.values(), *head.parameters()]
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for sparse, dense in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)


def test_the_dense_adapter_is_for_large_masks_only(monkeypatch):
    calls = []
    head = build()
    for level, adapter in head.adapters.items():
        adapter.register_forward_hook(lambda *_, level=level: calls.append(level))
    monkeypatch.setattr(
        type(head),
        "masks",
        lambda self, ctx: {
            level: torch.arange(x[:, 0].numel()).view(x[:, 0].shape) < share * x[:, 0].numel()
            for (level, x), share in zip(ctx.student_features.items(), (0.3, 0.9, 0.0), strict=True)
        },
    )
    head(make_context())
    assert calls == ["p4"]


def test_adapters_start_near_zero_without_an_activation():
    head = build(channels=(64, 80))
    assert list(head.adapters) == ["p3", "p4", "p5"]
    for adapter in head.adapters.values():
        assert isinstance(adapter, nn.Conv2d) and adapter.kernel_size == (3, 3)
        assert adapter.weight.shape == (80, 64, 3, 3)
        assert adapter.weight.abs().max() <= 2e-4 and not adapter.bias.any()
        assert adapter.weight.std().item() == pytest.approx(0.88e-4, rel=0.02)  # cut at 2 std


class OtherGenerator(nn.Module):
    """Some user's anchors: detectron2's, but not of its class."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features):
        return self.inner(features)


def test_anchors_of_a_users_generator_are_used_and_not_owned():
    model = ToyDetector()
    model.anchor_generator = OtherGenerator(model.anchor_generator)
    other, plain = build(toy_info(model=model)), build()
    assert not any("scale" in name for name, _ in other.named_parameters())
    assert set(other.state_dict()) == set(plain.state_dict())
    ctx = make_context(boxes=5)
    found, expected = other.masks(ctx), plain.masks(ctx)
    assert list(found) == list(expected) and any(mask.any() for mask in expected.values())
    for level, mask in expected.items():
        assert torch.equal(found[level], mask)


def test_anchors_are_the_students_or_those_of_the_config():
    own = ToyDetector().anchor_generator
    head = build()
    for ours, theirs in zip(head.grid_anchors.cell_anchors, own.cell_anchors, strict=True):
        assert torch.equal(ours, theirs)
    head = build(ANCHOR_SIZES=[[20.0], [40.0], [80.0]], ANCHOR_RATIOS=[[1.0, 4.0]])
    assert head.grid_anchors.strides == [8, 16, 32] and head.grid_anchors.offset == 0.0
    shapes = list(head.grid_anchors.cell_anchors)[1].tolist()
    assert shapes == [[-20.0, -20.0, 20.0, 20.0], [-10.0, -40.0, 10.0, 40.0]]


def test_anchors_of_a_proposal_network():
    model = ToyDetector()
    model.proposal_generator = nn.Module()
    model.proposal_generator.anchor_generator = model.anchor_generator
    model.proposal_generator.in_features = ["p3", "p4"]
    del model.anchor_generator
    head = build(toy_info(model=model))
    assert head.anchor_levels == ("p3", "p4") and head.levels == ("p3", "p4")
    with pytest.raises(ConfigError, match="KD.FGFI.LEVELS.*p5"):
        build(toy_info(model=model), LEVELS=("p4", "p5"))


class FCOS(ToyDetector):
    """A detector of that name: one square of its stride at each location."""

    def __init__(self):
        super().__init__()
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[8.0], [16.0], [32.0]], aspect_ratios=[1.0], strides=[8, 16, 32], offset=0.5
        )


def test_fcos_gets_squares_of_eight_strides():
    anchors = build(toy_info(model=FCOS())).grid_anchors
    assert [a.tolist() for a in anchors.cell_anchors] == [
        [[-4.0 * s, -4.0 * s, 4.0 * s, 4.0 * s]] for s in (8, 16, 32)
    ]
    assert anchors.offset == 0.5
    anchors = build(toy_info(model=FCOS()), ANCHOR_SIZES=[[10.0]], ANCHOR_RATIOS=[[1.0]])
    assert [a.tolist() for a in anchors.grid_anchors.cell_anchors] == [[[-5.0, -5, 5, 5]]] * 3


def test_a_student_without_anchors_says_what_to_set():
    model = ToyDetector()
    del model.anchor_generator, model.head_in_features
    with pytest.raises(ConfigError, match="KD.FGFI.ANCHOR_SIZES"):
        build(toy_info(model=model))
    head = build(toy_info(model=model), ANCHOR_SIZES=[[32.0]])
    assert head.anchor_levels == ("p3", "p4", "p5")
    assert head(make_context(boxes=5))["loss_kd_fgfi"] > 0


def test_rotated_anchors_are_refused():
    model = ToyDetector()
    model.anchor_generator = RotatedAnchorGenerator(
        sizes=[[16.0]], aspect_ratios=[[1.0]], strides=[8, 16, 32], angles=[[0.0]]
    )
    with pytest.raises(ConfigError, match="MODEL.ANCHOR_GENERATOR.NAME"):
        build(toy_info(model=model))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ASSIGN", "area"),
        ("ADAPTER", "conv5x5"),
        ("THRESH_FACTOR", 1.0),
        ("THRESH_FACTOR", -0.1),
        ("ANCHOR_SIZES", [[16.0], [32.0]]),
        ("ANCHOR_RATIOS", [[1.0], [1.0]]),
        ("LEVELS", ("p9",)),
    ],
)
def test_bad_values_name_their_key(key, value):
    with pytest.raises(ConfigError, match=f"KD.FGFI.*{key}"):
        build(**{key: value})


def test_batches_without_annotations_are_refused():
    ctx = make_context()
    ctx.gt = None
    with pytest.raises(DataError, match="FGFI needs boxes"):
        build()(ctx)
