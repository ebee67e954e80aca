"""AT, PI, LOCAL, PA and IFVD keep to the contract; values of the heads, and what they refuse."""

import pytest
import torch
from head_contract import HeadContract
from kd_testing import STRIDES, head_cfg, instances, make_context, toy_info, wave

from projects.kd.errors import ConfigError
from projects.kd.heads import build_imitation_heads


class TestAT(HeadContract):
    name = "AT"
    has_adapters = False


class TestATOnLogits(HeadContract):
    name = "AT"
    has_adapters = False
    node = {"TARGET": "dense"}
    reads = "dense"
    adapts = False


class TestLOCAL(HeadContract):
    name = "LOCAL"
    has_adapters = False


class TestLOCALOnLogits(HeadContract):
    name = "LOCAL"
    has_adapters = False
    node = {"TARGET": "dense", "NORMALIZE": True}
    reads = "dense"
    adapts = False


class TestPA(HeadContract):
    name = "PA"
    has_adapters = False
    node = {"WEIGHT": 10.0}


class TestPAOnLogits(HeadContract):
    name = "PA"
    has_adapters = False
    node = {"TARGET": "dense", "WEIGHT": 10.0}
    reads = "dense"
    adapts = False


class TestIFVD(HeadContract):
    name = "IFVD"
    has_adapters = False
    may_skip_levels = True  # every cell of a small level may be alone in its class


class TestPI(HeadContract):
    name = "PI"
    node = {"TARGET": "dense"}
    reads = "dense"
    adapts = False


class TestPIAsDivergence(HeadContract):
    name = "PI"
    node = {"TARGET": "dense", "BETA": 0.0, "TAU": 2.0}
    reads = "dense"
    adapts = False


def build(name, channels=(3, 3), **node):
    infos = (toy_info(number) for number in channels)
    return build_imitation_heads(head_cfg(name, **node), *infos)[name]


def golden_context():
    ctx = make_context(sizes=((32, 48),) * 2, canvas=(32, 48), channels=(3, 3))
    ctx.student_features["p3"] = wave("student", 2, 3, 4, 6, dtype=torch.float32)
    ctx.teacher_features["p3"] = wave("teacher", 2, 3, 4, 6, dtype=torch.float32)
    ctx.student_outputs["dense"].logits[0] = ctx.student_features["p3"]
    ctx.teacher_outputs["dense"].logits[0] = ctx.teacher_features["p3"]
    return ctx


GOLDEN = [
    ("AT", {"WEIGHT": 10.0}, 2.2947187),
    ("AT", {"REDUCTION": "mean", "WEIGHT": 1000.0}, 9.56132795),
    ("LOCAL", {"WEIGHT": 2.0}, 2 * 1.19484654),
    ("PA", {"WEIGHT": 1.0}, 0.76152934),
    ("PA", {"WEIGHT": 1.0, "POOL": 0.5}, 0.41298976),
]


@pytest.mark.parametrize("target", ["features", "dense"])
@pytest.mark.parametrize(("name", "node", "value"), GOLDEN)
def test_golden_numbers_through_the_head(name, node, value, target):
    head = build(name, LEVELS=("p3",), TARGET=target, **node)
    (loss,) = head(golden_context()).values()
    assert loss.item() == pytest.approx(value, rel=1e-5)


def test_golden_number_of_pi_on_a_detector():
    head = build("PI", TARGET="dense", LEVELS=("p3",), WEIGHT=1.0)
    ctx = golden_context()
    normaliser = ctx.teacher_outputs["dense"].logits[0].amax(1).sigmoid().sum().item()
    loss = head(ctx)["loss_kd_pi"]
    assert loss.item() == pytest.approx(64.84309916 / normaliser, rel=1e-5)


def test_a_teacher_that_sees_nothing_gives_pi_a_bounded_normaliser():
    ctx = make_context()
    for logits in ctx.teacher_outputs["dense"].logits:
        logits.data.fill_(-60.0)
    head = build("PI", TARGET="dense")
    assert head(ctx)["loss_kd_pi"].isfinite()


@pytest.mark.parametrize("name", ["AT", "LOCAL", "PA", "IFVD"])
def test_levels_are_summed(name):
    ctx = make_context(channels=(3, 5))
    loss = f"loss_kd_{name.lower()}"
    alone = [build(name, (3, 5), LEVELS=(level,))(ctx)[loss] for level in STRIDES]
    torch.testing.assert_close(build(name, (3, 5))(ctx)[loss], sum(alone))


def test_ifvd_takes_the_smallest_box_on_every_level_and_background_as_a_class():
    """One box in another; features that are constant within a class, but for one cell."""
    head = build("IFVD", LEVELS=("p3",), WEIGHT=1.0)
    assert head.needs_boxes and head.labels == "boxes"
    boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0], [8.0, 8.0, 24.0, 24.0]])
    ctx = make_context(sizes=((64, 64),), canvas=(64, 64), channels=(3, 3))
    ctx.gt = [instances((64, 64), boxes, torch.tensor([4, 7]))]
    labels = torch.full((8, 8), 2)
    labels[:4, :4] = 0
    labels[1:3, 1:3] = 1
    pure = torch.eye(3)[labels].movedim(-1, 0)[None]
    ctx.student_features["p3"], ctx.teacher_features["p3"] = pure.clone(), pure
    assert head(ctx)["loss_kd_ifvd"].item() == pytest.approx(0.0, abs=1e-12)
    ctx.student_features["p3"][0, :, 1, 1] = torch.tensor([0.0, 0.0, 1.0])  # one of four cells
    mean = torch.tensor([0.0, 0.75, 0.25])
    cosines = mean / mean.norm()
    expected = ((cosines[2] - 1) ** 2 + 3 * (cosines[1] - 1) ** 2) / 64
    assert head(ctx)["loss_kd_ifvd"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *((name, "TARGET", "logits") for name in ("AT", "PI", "LOCAL", "PA", "IFVD")),
        ("PI", "TARGET", "features"),
        ("IFVD", "TARGET", "dense"),
        ("AT", "TARGET", "sem_seg"),
        ("AT", "REDUCTION", "max"),
        ("PI", "REDUCTION", "max"),
        ("PI", "TAU", 0.0),
        ("PI", "BETA", 0.5),
        ("PA", "POOL", -0.1),
        ("PA", "POOL", 1.5),
        ("IFVD", "LABELS", "masks"),
    ],
)
def test_bad_values_name_their_key(name, key, value):
    node = {"TARGET": "dense"} if name == "PI" else {}
    with pytest.raises(ConfigError, match=f"KD.{name}.{key}"):
        build(name, **{**node, key: value})
