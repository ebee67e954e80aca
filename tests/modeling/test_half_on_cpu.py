"""Half precision on a CPU: convolutions that torch computes wrongly or slowly are in fp32."""

import copy

import kd_models
import pytest
import torch
from detectron2.layers import Conv2d
from timm.layers import CondConv2d, Conv2dSame, ScaledStdConv2d
from torch import nn

from projects.kd.modeling.half_on_cpu import use_full_precision

SHAPES = ((1, 1), (2, 1), (9, 1), (9, 2), (9, 3))


def spoil_free_memory():
    """What an operator leaves as it lay in memory shall be seen: it is NaN."""
    sizes = [2**k * m for k in range(5, 17) for m in (1, 3)]
    kept = [torch.full((size,), float("nan")) for size in sizes for _ in range(8)]
    kept.clear()


def results(module, x, grad, dtype=None):
    """Output, and gradients of the input and the parameters."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        spoil_free_memory()
        y = module(x)
    spoil_free_memory()
    y.backward(grad.to(y.dtype))
    return [y, x.grad, *(p.grad for p in module.parameters())]


def assert_near(found, expected):
    """Equal but for the rounding of bfloat16."""
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().item() + 1e-3
        torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.02 * scale)


CONVOLUTIONS = {
    "torch": lambda: nn.Conv2d(96, 64, 3, 2, 1),
    "kernel 7": lambda: nn.Conv2d(32, 64, 7, 2, 3),
    "stride 3": lambda: nn.Conv2d(96, 64, 3, 3, 1),
    "dilated": lambda: nn.Conv2d(96, 64, 3, 2, 2, dilation=2),
    "groups": lambda: nn.Conv2d(64, 64, 3, 2, 1, groups=4),
    "width only": lambda: nn.Conv2d(96, 64, 3, (1, 2), 1),
    "detectron2": lambda: Conv2d(96, 64, 3, 2, 1, norm=nn.GroupNorm(32, 64)),
    "timm same": lambda: Conv2dSame(96, 64, 3, 2),
    "timm standardised": lambda: ScaledStdConv2d(96, 64, 3, 2, 1),
    "transposed": lambda: nn.ConvTranspose2d(96, 64, 3, 2, 1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_narrow_maps_are_as_in_fp32(name):
    torch.manual_seed(0)
    plain = CONVOLUTIONS[name]()
    guarded = use_full_precision(copy.deepcopy(plain))
    for shape in SHAPES:
        x = torch.randn(8, plain.in_channels, *shape).bfloat16().float()
        grad = torch.randn_like(plain(x)).bfloat16().float()
        expected = results(plain, x, grad)
        assert_near(results(guarded, x, grad, torch.bfloat16), expected)


def test_experts():
    torch.manual_seed(0)
    conv = CondConv2d(32, 32, 3, 2, 1, num_experts=2)
    x, routing = torch.randn(4, 32, 9, 2).bfloat16().float(), torch.rand(4, 2)
    expected = conv(x, routing)
    use_full_precision(conv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spoil_free_memory()
        found = conv(x, routing)
    assert found.dtype == torch.bfloat16
    assert_near([found], [expected])


@pytest.mark.parametrize("width", [3, 8])
def test_wider_maps_stay_in_half_precision(width):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, 2, 1)
    x = torch.randn(2, 16, 4, width)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = conv(x)
        found = use_full_precision(conv)(x)
    assert torch.equal(found, expected)


def test_nothing_changes_without_autocast():
    conv = nn.Conv2d(8, 8, 3, 2, 1)
    x, names = torch.randn(2, 8, 5, 1), list(conv.state_dict())
    expected, text = conv(x), str(conv)
    guarded = use_full_precision(use_full_precision(conv))
    assert torch.equal(guarded(x), expected) and guarded(x).dtype == torch.float32
    assert list(guarded.state_dict()) == names and str(guarded) == text
    assert torch.equal(copy.deepcopy(guarded)(x), expected)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 1), (5, 2), (7, 1)])
def test_slow_depthwise_convolutions_are_in_fp32(kernel, stride):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, kernel, stride, kernel // 2, groups=16)
    ours = use_full_precision(copy.deepcopy(conv))
    x = torch.randn(2, 16, 9, 11).bfloat16()
    x, grad = x.requires_grad_(), torch.randn_like(conv(x.float())).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(x)
    expected = conv(x.float())
    assert torch.equal(found, expected.bfloat16())
    mine = torch.autograd.grad(found, [x, *ours.parameters()], grad)
    full = torch.autograd.grad(expected, [x, *conv.parameters()], grad.float())
    for one, other in zip(mine, full, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype))


def test_only_strides_along_the_width_and_slow_ones_are_guarded():
    plain = [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, (2, 1)), nn.Linear(2, 2)]
    plain += [nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 5, groups=2), nn.Conv2d(1, 4, 5)]
    kinds = [type(module) for module in plain]
    assert [type(module) for module in use_full_precision(nn.Sequential(*plain))] == kinds


def test_student_and_teacher_of_a_training_step(tmp_path):
    """A canvas of 160 x 128 has a p7 of 2 x 1."""
    channels = {"MODEL__FPN__OUT_CHANNELS": 96}
    teacher = kd_models.write_teacher(tmp_path, kd_models.tiny_cfg(**channels))
    wrapper = kd_models.build_wrapper(kd_models.distill_cfg(teacher, **channels))
    stage = torch.randn(8, 512, 5, 4).bfloat16().float()
    for model in (wrapper.student, wrapper.teacher.model):
        top = model.backbone.top_block
        expected = top(stage)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            spoil_free_memory()
            found = top(stage)
        assert found[1].shape[-2:] == (2, 1)
        assert_near(found, expected)
