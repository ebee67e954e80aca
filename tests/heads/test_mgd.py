"""MGD keeps to the contract; values of the head, its random masks, and what it refuses."""

import pytest
import torch
from head_contract import HeadContract
from kd_testing import CHANNELS, STRIDES, ToyDetector, head_cfg, make_context, toy_info, wave
from modern_inputs import cos, sin
from torch import nn

from projects.kd.errors import ConfigError
from projects.kd.heads import build_imitation_heads
from projects.kd.heads import mgd as mgd_module
from projects.kd.seeding import STEP, seed_generators


class TestMGD(HeadContract):
    name = "MGD"
    # hides nothing: what a mask hides differs from canvas to canvas
    node = {"MASK_RATIO": 0.0, "AREA_REF": 0.0, "WEIGHT": 1e-2}
    half = {"rtol": 0.05, "atol": 1e-4}  # the generators run in the step's precision
    blind_to_canvas = "none"  # a generator's hidden layer reaches beyond the image by its biases

    def make_equal(self, head):
        for generator in head.generators.values():
            with torch.no_grad():
                pass_through(generator)

    def test_floor_when_student_equals_teacher(self):
        """With generators that give back what they read: ReLU(x + 100) - 100."""
        self.tolerance = 1e-4
        super().test_floor_when_student_equals_teacher()


class TestMaskedMGD(HeadContract):
    name = "MGD"
    node = {"AREA_REF": 400.0, "WEIGHT": 1e-2}
    half = {"rtol": 0.05, "atol": 1e-4}
    blind_to_canvas = "none"  # another canvas, another draw
    averages_teacher = True

    def test_floor_when_student_equals_teacher(self):
        pytest.skip("hidden cells are generated from their neighbours")

    @staticmethod
    def run(head, ctx):
        seed_generators(STEP, 0, 0, 0, 0)
        return HeadContract.run(head, ctx)


def pass_through(generator: nn.Sequential) -> None:
    for convolution in (generator[0], generator[2]):
        nn.init.dirac_(convolution.weight)
    generator[0].bias.fill_(100.0)
    generator[2].bias.fill_(-100.0)


def build(student=None, teacher=None, **node):
    infos = (toy_info(CHANNELS) if x is None else x for x in (student, teacher))
    return build_imitation_heads(head_cfg("MGD", **node), *infos)["MGD"]


def golden_head(**node):
    head = build(toy_info(3), toy_info(3), LEVELS=("p3",), WEIGHT=1.0, **node)
    first, _, second = head.generators["p3"]
    values = (
        (first.weight, sin(0.5, 0.2, 3, 3, 3, 3, factor=0.3)),
        (first.bias, sin(1, 1, 3, factor=0.1)),
        (second.weight, cos(0.6, 0, 3, 3, 3, 3, factor=0.3)),
        (second.bias, cos(1, 0, 3, factor=0.1)),
    )
    for parameter, value in values:
        parameter.data.copy_(value)
    return head


def golden_context():
    ctx = make_context(sizes=((32, 48),) * 2, canvas=(32, 48), channels=(3, 3))
    ctx.student_features["p3"] = wave("student", 2, 3, 4, 6, dtype=torch.float32).requires_grad_()
    ctx.teacher_features["p3"] = wave("teacher", 2, 3, 4, 6, dtype=torch.float32)
    return ctx


@pytest.mark.parametrize(("area", "factor"), [(0.0, 1.0), (240.0, 10.0)])
def test_golden_numbers_through_the_head(monkeypatch, area, factor):
    ctx = golden_context()
    kept = (torch.arange(48) % 3 != 1).view(2, 1, 4, 6)
    monkeypatch.setattr(mgd_module, "random_cells", lambda like, ratio: kept)
    loss = golden_head(AREA_REF=area)(ctx)["loss_kd_mgd"]
    assert loss.item() == pytest.approx(factor * 356.44655341, rel=1e-5)
    loss.backward()
    gradient = ctx.student_features["p3"].grad
    assert gradient[1, 0, 0, 5].item() == pytest.approx(factor * -0.51981010, rel=1e-4)
    assert not gradient.masked_select(~kept).any()


def test_nothing_hidden_gives_the_unmasked_golden_number():
    loss = golden_head(AREA_REF=0.0, MASK_RATIO=0.0)(golden_context())["loss_kd_mgd"]
    assert loss.item() == pytest.approx(382.84142980, rel=1e-5)


def test_everything_hidden_leaves_the_biases():
    """The student's gradient is 0 then, and the generators still train."""
    ctx = golden_context()
    head = golden_head(AREA_REF=0.0, MASK_RATIO=1.0)
    head(ctx)["loss_kd_mgd"].backward()
    assert not ctx.student_features["p3"].grad.any()
    assert head.generators["p3"][2].bias.grad.all()


def test_levels_are_summed_each_with_a_generator_of_its_own():
    ctx = make_context()
    head = build(MASK_RATIO=0.0, AREA_REF=0.0)
    total, found = head(ctx)["loss_kd_mgd"], 0.0
    for level in STRIDES:
        alone = build(MASK_RATIO=0.0, AREA_REF=0.0, LEVELS=(level,))
        alone.generators[level].load_state_dict(head.generators[level].state_dict())
        found = found + alone(ctx)["loss_kd_mgd"]
    torch.testing.assert_close(total, found)


def test_a_step_hides_the_same_cells_whenever_it_runs():
    """What a resumed run needs: nothing but the step's place decides. Levels differ."""
    head, ctx = build(), make_context()
    losses = []
    for iteration in (5, 6, 5):
        seed_generators(STEP, 1, iteration, 0, 0)
        losses.append(head(ctx)["loss_kd_mgd"].item())
    assert losses[0] == losses[2] != losses[1]


def test_weights_mean_the_same_at_every_size():
    """A map repeated in both directions has the same loss, but for its border."""
    head = build(MASK_RATIO=0.0, LEVELS=("p3",))
    with torch.no_grad():  # cells alone: no border
        for convolution in (head.generators["p3"][0], head.generators["p3"][2]):
            convolution.weight[..., [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0.0
    small = make_context(sizes=((64, 64),), canvas=(64, 64))
    large = make_context(sizes=((128, 192),), canvas=(128, 192))
    for side in ("student_features", "teacher_features"):
        getattr(large, side)["p3"] = getattr(small, side)["p3"].repeat(1, 1, 2, 3)
    torch.testing.assert_close(head(large)["loss_kd_mgd"], head(small)["loss_kd_mgd"])
    bare = build(MASK_RATIO=0.0, LEVELS=("p3",), AREA_REF=0.0)
    bare.load_state_dict(head.state_dict())
    torch.testing.assert_close(bare(large)["loss_kd_mgd"], 6 * bare(small)["loss_kd_mgd"])


def test_generators_have_the_teachers_width():
    head = build(teacher=toy_info(CHANNELS + 2))
    assert head.generators["p3"][0].in_channels == CHANNELS + 2
    assert isinstance(head.adapters["p3"], nn.Conv2d)


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_ratios_that_are_none_are_refused(ratio):
    with pytest.raises(ConfigError, match="KD.MGD.MASK_RATIO is .*from 0 to 1"):
        build(MASK_RATIO=ratio)


def test_targets_that_are_predictions_are_refused():
    with pytest.raises(ConfigError, match="KD.MGD.TARGET"):
        build(TARGET="dense")


@pytest.mark.parametrize(
    ("node", "factor"),
    [
        ({}, 800 * 1344 / 64**2),
        ({"AREA_REF": 0.0}, 1.0),
        ({"AREA_REF": 512.0}, 2.0),
        # half of the canvas is padding: half of the cells count
        ({"AREA_REF": 512.0, "MASK_PADDING": True}, 4.0),
    ],
)
def test_the_map_that_a_segmentation_head_reads(node, factor):
    """16x16 cells on a canvas of 64x64 pixels."""
    model = type("SemanticSegmentor", (ToyDetector,), {})()
    model.sem_seg_head = nn.Module()
    model.sem_seg_head.predictor = nn.Conv2d(5, 4, 1)
    info = toy_info(model=model, taps=("features", "decoder"))
    cfg = head_cfg("MGD", TARGET="decoder", MASK_RATIO=0.0, WEIGHT=0.5, **node)
    head = build_imitation_heads(cfg, info, info)["MGD"]
    assert list(head.generators) == ["decoder"] and head.generators["decoder"][0].in_channels == 5
    height = 32 if node.get("MASK_PADDING") else 64
    ctx = make_context(sizes=((height, 64),), canvas=(64, 64))
    student, teacher = torch.randn(2, 1, 5, 16, 16)
    ctx.student_outputs["decoder"], ctx.teacher_outputs["decoder"] = student, teacher
    rows = height // 4
    inside = torch.nn.functional.pad(student[:, :, :rows], (0, 0, 0, 16 - rows))
    generated = head.generators["decoder"](inside)[:, :, :rows]
    expected = 0.5 * factor * (generated - teacher[:, :, :rows]).square().sum()
    torch.testing.assert_close(head(ctx)["loss_kd_mgd"], expected)
