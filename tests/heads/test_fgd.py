"""FGD keeps to the contract; values of the head, its factors by detector, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from head_contract import HeadContract
from kd_testing import CHANNELS, STRIDES, ToyDetector, head_cfg, make_context, toy_info, wave

from projects.kd.errors import ConfigError, DataError
from projects.kd.heads import build_imitation_heads
from projects.kd.heads.fgd import VALUES, ContextBlock

# every term with a factor of about 1, so that the contract's thresholds see it
EVEN = {"ALPHA": 1.0, "BETA": 1.0, "GAMMA": 1.0, "LAMBDA": 1.0, "TEMPERATURE": 0.5}


class TestFGD(HeadContract):
    name = "FGD"
    node = {**EVEN, "AREA_REF": 0.0}
    tolerance = 1e-4


class TestFGDByArea(HeadContract):
    name = "FGD"
    node = EVEN
    tolerance = 1e-2  # the reference is a hundred times the toy's map


def build(student=None, teacher=None, **node):
    infos = (toy_info(CHANNELS) if x is None else x for x in (student, teacher))
    return build_imitation_heads(head_cfg("FGD", **node), *infos)["FGD"]


def golden_context():
    ctx = make_context(sizes=((32, 48),) * 2, canvas=(32, 48), channels=(3, 3))
    ctx.student_features["p3"] = wave("student", 2, 3, 4, 6, dtype=torch.float32)
    ctx.teacher_features["p3"] = wave("teacher", 2, 3, 4, 6, dtype=torch.float32)
    boxes = [[[3.0, 5, 20, 17], [0, 0, 47, 31]], [[10.0, 2, 30, 30]]]
    for image, own in zip(ctx.gt, boxes, strict=True):
        image.gt_boxes.tensor = torch.tensor(own)
    ctx.gt = [SimpleNamespace(gt_boxes=image.gt_boxes) for image in ctx.gt]
    return ctx


def test_golden_numbers_through_the_head():
    """With context blocks as they start: they add nothing."""
    expected = (22.99130271, 9.96995015, 19.26639148, 446.14345035)
    own = {**EVEN, "LEVELS": ("p3",)}
    names = ("fg", "bg", "att", "glob")
    found = build(toy_info(3), toy_info(3), **own, AREA_REF=0.0)(golden_context())
    assert [found[f"loss_kd_fgd_{x}"].item() for x in names] == pytest.approx(expected, rel=1e-5)
    # 24 cells in place of 240: sums over cells are ten times as much, the others are not
    scaled = build(toy_info(3), toy_info(3), **own, AREA_REF=240.0)(golden_context())
    factors = [(scaled[k] / found[k]).item() for k in found]
    assert factors == pytest.approx([1, 1, 10, 10], rel=1e-5)


def test_the_loaders_own_boxes_are_read_where_there_is_a_batch():
    ctx = golden_context()
    ctx.batch = [{"instances": image} for image in ctx.gt]
    ctx.gt = []  # would fail
    assert [len(x) for x in ctx.boxes_on_cpu()] == [2, 1]
    ctx.gt = None
    with pytest.raises(DataError, match="needs boxes"):
        ctx.boxes_on_cpu()


def test_levels_are_summed():
    ctx = make_context()
    torch.manual_seed(0)
    alone = [build(LEVELS=(level,), **EVEN, AREA_REF=0.0)(ctx) for level in STRIDES]
    for name, loss in build(**EVEN, AREA_REF=0.0)(ctx).items():
        torch.testing.assert_close(loss, sum(x[name] for x in alone))


def test_a_context_block_is_the_published_formula():
    torch.manual_seed(0)
    block = ContextBlock(6)
    assert block.key.weight.std() > 0.1 and block.transform[0].out_features == 3
    x = torch.randn(2, 6, 3, 4)
    assert not block(x).any(), "it starts with adding nothing"
    torch.nn.init.normal_(block.transform[3].weight)
    logits = (x * block.key.weight[0]).sum(1).flatten(1)
    context = (x.flatten(2) * logits.softmax(1)[:, None]).sum(2)
    torch.testing.assert_close(block(x), block.transform(context))
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool)
    mask[..., 3:] = False
    torch.testing.assert_close(block(x * mask, mask), block(x[..., :3]))


def test_context_of_both_sides_is_trained():
    head = build(**EVEN)
    for block in (*head.student_context.values(), *head.teacher_context.values()):
        torch.nn.init.normal_(block.transform[3].weight, std=0.1)
    head(make_context())["loss_kd_fgd_glob"].backward()
    for blocks in (head.student_context, head.teacher_context):
        assert all(p.grad.any() for p in blocks.parameters())


@pytest.mark.parametrize(
    ("arch", "factors"),
    [
        ("RetinaNet", (1e-3, 5e-4, 5e-4, 5e-6, 0.5)),
        ("GFL", (1e-3, 5e-4, 5e-4, 5e-6, 0.5)),
        ("RepPoints", (1.6e-3, 8e-4, 8e-4, 8e-6, 0.5)),
        ("FCOS", (1.6e-3, 8e-4, 8e-4, 8e-6, 0.8)),
        ("GeneralizedRCNN", (5e-5, 2.5e-5, 5e-5, 5e-7, 0.5)),
        ("Unknown", (1e-3, 5e-4, 5e-4, 5e-6, 0.5)),
    ],
)
def test_factors_by_the_students_detector(arch, factors):
    """A subclass has those of its base; keys of the config win."""
    model = type("Mine", (type(arch, (ToyDetector,), {}),), {})()
    assert tuple(build(toy_info(model=model)).values) == factors
    own = build(toy_info(model=model), BETA=0.25, TEMPERATURE=2.0)
    assert tuple(own.values) == (factors[0], 0.25, *factors[2:4], 2.0)
    assert set(VALUES) >= {arch} or arch == "Unknown"


def test_a_reference_of_the_levels_own_area():
    head = build(**EVEN)
    # 100x168 + 50x84 + 25x42 cells of strides 8, 16 and 32
    assert head.area.cells == 16800 + 4200 + 1050
    ctx = make_context(sizes=((800, 1000), (400, 1344)), canvas=(800, 1344))
    assert head.area.of_levels(ctx, head.levels) == pytest.approx(1.0)
    masked = build(**EVEN, MASK_PADDING=True)
    seen = 100 * 125 + 50 * 63 + 25 * 32 + 50 * 168 + 25 * 84 + 13 * 42
    assert masked.area.of_levels(ctx, masked.levels) == pytest.approx(2 * 22050 / seen)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"ALPHA": -2.0}, "KD.FGD.ALPHA is -2, it must be a number from 0 on, or -1"),
        ({"TEMPERATURE": 0.0}, "KD.FGD.TEMPERATURE is 0, it must be positive"),
        ({"AREA_REF": -3.0}, "KD.FGD.AREA_REF is -3"),
    ],
)
def test_wrong_values_are_refused(node, message):
    with pytest.raises(ConfigError, match=message):
        build(**node)


def test_maps_of_one_channel_are_refused():
    with pytest.raises(ConfigError, match="KD.FGD.LEVELS .*p3 has 1 channel.*at least 2"):
        build(toy_info(1), toy_info(1))
    build(toy_info(2), toy_info(2))(make_context(channels=(2, 2)))["loss_kd_fgd_glob"].backward()


def test_students_trained_without_boxes_are_refused():
    model = type("SemanticSegmentor", (ToyDetector,), {})()
    with pytest.raises(ConfigError, match="KD.HEADS: FGD weighs cells by boxes, and SemanticSeg"):
        build(toy_info(model=model))
