"""ReviewKD keeps to the contract; values of its fusions, its norms, and what it refuses."""

import dataclasses

import pytest
import torch
from detectron2.layers import ShapeSpec
from head_contract import HeadContract
from kd_testing import CHANNELS, head_cfg, make_context, toy_info, wave
from modern_inputs import cos, sin
from torch import nn

from projects.kd.errors import ConfigError
from projects.kd.functional.review_kd import hcl_loss
from projects.kd.heads import build_imitation_heads
from projects.kd.heads.review_kd import Fusion


class TestReviewKD(HeadContract):
    name = "ReviewKD"
    has_adapters = True
    half = {"rtol": 0.05, "atol": 1e-3}  # the fusions run in the step's precision
    blind_to_canvas = "none"  # pools are those of the padded map

    def test_floor_when_student_equals_teacher(self):
        """Norms and gates stand between: that the loss is a distance is shown by its functions."""
        pytest.skip("a test of its own shows the floor")


def build(student=None, teacher=None, common=None, **node):
    infos = (toy_info(CHANNELS) if x is None else x for x in (student, teacher))
    return build_imitation_heads(head_cfg("ReviewKD", common, **node), *infos)["ReviewKD"].train()


def golden_fusions():
    coarse, fine = Fusion(3, 3, coarsest=True).double(), Fusion(3, 3, coarsest=False).double()
    values = (
        (coarse.reduce.weight, sin(0.7, 0.1, 3, 3, 1, 1, factor=0.5)),
        (coarse.out.weight, cos(0.5, 0, 3, 3, 3, 3, factor=0.3)),
        (fine.reduce.weight, cos(0.6, 0, 3, 3, 1, 1, factor=0.5)),
        (fine.gate.weight, sin(1, 0, 2, 6, 1, 1, factor=0.3)),
        (fine.gate.bias, torch.tensor([0.1, 0.2])),
        (fine.out.weight, sin(0.4, 0.2, 3, 3, 3, 3, factor=0.3)),
    )
    for parameter, value in values:
        parameter.data.copy_(value)
    return coarse, fine


@pytest.mark.parametrize("masked", [False, True])
def test_golden_numbers(masked):
    """A mask of all cells changes nothing."""
    coarse, fine = golden_fusions()
    shapes = {"fine": (2, 3, 4, 6), "coarse": (2, 3, 2, 3)}
    student = {x: wave("student", *shape).requires_grad_() for x, shape in shapes.items()}
    teacher = {x: wave("teacher", *shape) for x, shape in shapes.items()}
    masks = {
        x: torch.ones(2, 1, *s[2:], dtype=torch.bool) if masked else None for x, s in shapes.items()
    }
    out, x = coarse(student["coarse"], mask=masks["coarse"])
    total = hcl_loss(out, teacher["coarse"], masks["coarse"])
    out, _ = fine(student["fine"], x, masks["fine"])
    own = hcl_loss(out, teacher["fine"], masks["fine"])
    assert own.item() == pytest.approx(4.42074920, rel=1e-9)
    assert (total + own).item() == pytest.approx(8.75255824, rel=1e-9)
    (total + own).backward()
    assert student["fine"].grad[1, 2, 3, 4].item() == pytest.approx(0.00574637357, rel=1e-8)
    assert student["coarse"].grad[1, 1, 1, 2].item() == pytest.approx(0.28923985, rel=1e-7)


def test_the_head_fuses_coarse_to_fine_and_sums_levels():
    head, ctx = build(WEIGHT=2.0), make_context()
    total, coarser = 0.0, None
    for level in ("p5", "p4", "p3"):
        out, coarser = head.fusions[level](ctx.student_features[level], coarser)
        total = total + hcl_loss(out, ctx.teacher_features[level])
    loss = head(ctx)["loss_kd_reviewkd"]
    torch.testing.assert_close(loss, 2 * total)
    loss.backward()
    assert head.fusions["p5"].gate is None and head.fusions["p4"].gate.weight.grad.any()


def test_a_level_that_is_imitated_exactly_gives_zero():
    """Without gates and norms: maps of equal values pass through as they are."""
    head, ctx = build(), make_context(same=True)
    for fusion in head.fusions.values():
        for name in ("reduce_norm", "out_norm"):
            setattr(fusion, name, _Plain())
        for convolution in (fusion.reduce, fusion.out):
            nn.init.dirac_(convolution.weight)
        if fusion.gate is not None:
            nn.init.zeros_(fusion.gate.weight)
            fusion.gate.bias.data = torch.tensor([40.0, -200.0])
    assert head(ctx)["loss_kd_reviewkd"].item() == pytest.approx(0, abs=1e-10)


class _Plain(nn.BatchNorm2d):
    def __init__(self):
        super().__init__(CHANNELS)

    def forward(self, values):
        return values


def test_gradients_are_those_of_finite_differences():
    coarse, fine = golden_fusions()
    maps = [
        torch.randn(2, 3, *s, dtype=torch.float64, requires_grad=True) for s in ((2, 2), (3, 4))
    ]
    mask = torch.rand(2, 1, 3, 4) > 0.3

    def out(low, high):
        return fine(high, coarse(low)[1], mask)[0]

    assert torch.autograd.gradcheck(out, maps)


def test_norms_with_a_mask_see_valid_cells_alone():
    fusion = Fusion(2, 4, coarsest=True)
    x = torch.randn(1, 2, 3, 4)
    alone, _ = fusion(x)
    mean = fusion.reduce_norm.running_mean.clone()
    fusion.reduce_norm.reset_running_stats()
    padded = torch.nn.functional.pad(x, (0, 2, 0, 1), value=float("nan"))
    mask = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    mask[..., :3, :4] = True
    large, inner = fusion(padded, mask=mask)
    torch.testing.assert_close(large[..., :3, :4], alone)
    torch.testing.assert_close(fusion.reduce_norm.running_mean, mean)
    assert not inner.masked_select(~mask).any()


def test_a_level_of_one_cell_takes_running_statistics():
    """One image, one cell: a norm over the batch would raise an error."""
    ctx = make_context(sizes=((32, 32),), canvas=(32, 32), boxes=1)
    assert ctx.student_features["p5"].shape[-2:] == (1, 1)
    head = build()
    before = head.fusions["p5"].reduce_norm.running_mean.clone()
    loss = head(ctx)["loss_kd_reviewkd"]
    loss.backward()
    assert loss.isfinite() and ctx.student_features["p5"].grad.any()
    assert torch.equal(head.fusions["p5"].reduce_norm.running_mean, before)
    assert head.fusions["p4"].reduce_norm.running_mean.any()


def test_one_level_is_refused():
    with pytest.raises(ConfigError, match="KD.REVIEWKD.LEVELS .*needs two at least, here is p4"):
        build(LEVELS=("p4",))


def test_teachers_whose_levels_differ_in_width_are_refused():
    teacher = toy_info(CHANNELS)
    shapes = {**teacher.shapes, "p4": ShapeSpec(channels=9, stride=16)}
    with pytest.raises(ConfigError, match="KD.REVIEWKD.LEVELS .*teacher's differ in width.*p4 9"):
        build(teacher=dataclasses.replace(teacher, shapes=shapes))
