"""D3ETR keeps to the contract; groups and terms of the head (part B13 by number)."""

import copy
from types import SimpleNamespace

import pytest
import torch
from head_contract import HeadContract
from kd_detr import CLASSES, LEVEL, decoded, detr_context, info, toy_detr
from kd_testing import CHANNELS, head_cfg

from projects.kd.errors import ConfigError
from projects.kd.functional.d3etr import attention_loss, prediction_loss
from projects.kd.heads import build_imitation_heads
from projects.kd.heads.d3etr import Pairs

TERMS = {f"loss_kd_d3etr_{name}" for name in ("pred", "self", "cross")}
RAGGED = {"sizes": ((40, 56), (64, 33)), "canvas": (64, 64)}


def models(channels=(CHANNELS, CHANNELS), same=False):
    """A teacher with wider queries where its features are wider."""
    if same:
        return toy_detr(channels[0], seed=0), toy_detr(channels[0], seed=0)
    wide = {} if channels[0] == channels[1] else {"dim": 24}
    return toy_detr(channels[0], seed=0), toy_detr(channels[1], seed=1, **wide)


class TestD3ETR(HeadContract):
    name = "D3ETR"
    equal_node = {"AUX_DET_WEIGHT": 0.0}
    averages_teacher = False  # it decodes its finer grid by itself
    tolerance = 1e-5  # of two passes through a transformer, with and without gradients

    def infos(self, channels):
        return tuple(info(model) for model in models(channels))

    def context(self, channels=(CHANNELS, CHANNELS), same=False, **kwargs):
        kwargs.setdefault("sizes", RAGGED["sizes"])
        kwargs.setdefault("canvas", RAGGED["canvas"])
        return detr_context(*models(channels, same), same=same, **kwargs)

    def test_without_mask_padding_padded_cells_take_part(self):
        with pytest.raises(ConfigError, match="KD.D3ETR.MASK_PADDING.*always masks"):
            self.head(MASK_PADDING=False)

    @pytest.mark.parametrize("mask_padding", [True])
    def test_a_teacher_of_double_resolution(self, mask_padding):
        super().test_a_teacher_of_double_resolution(mask_padding)

    def test_levels_are_limited_by_the_config(self):
        with pytest.raises(ConfigError, match="KD.D3ETR.LEVELS"):
            self.head(LEVELS=(LEVEL,))

    @pytest.mark.parametrize("dtype", [torch.bfloat16])
    def test_features_in_half_precision_are_computed_in_fp32(self, dtype):
        """Decoders under autocast, the second group too; the losses are fp32."""
        head = self.head()
        full, half = self.context(), self.context()
        with torch.autocast("cpu", dtype=dtype):
            assert half.student_outputs["decoded"].autocast is dtype
            assert half.teacher_outputs["decoded"].logits.dtype == dtype
        kinds = []
        half.student.class_embed.register_forward_hook(lambda m, x, y: kinds.append(y.dtype))
        losses, total = self.run(head, half)
        assert kinds == [dtype], "the second group runs in the precision of the step"
        for key, value in self.run(head, full)[0].items():
            assert losses[key].dtype == torch.float32
            torch.testing.assert_close(losses[key], value, rtol=0.15, atol=0.05)
        total.backward()
        assert half.student_features[LEVEL].grad.isfinite().all()


class TestD3ETRAdaptive(TestD3ETR):
    node = {"FIXED": False}

    @pytest.mark.parametrize("teacher_channels", [CHANNELS])
    def test_gradient_reaches_student_and_adapters_never_the_teacher(self, teacher_channels):
        super().test_gradient_reaches_student_and_adapters_never_the_teacher(teacher_channels)

    @pytest.mark.parametrize("dtype", [torch.bfloat16])
    def test_features_in_half_precision_are_computed_in_fp32(self, dtype):
        head = self.head()
        assert head.adapter_queries is None and not head.needs_boxes
        ctx = self.context()
        ctx.gt = None
        assert set(self.run(head, ctx)[0]) == TERMS


class TestD3ETRFixed(TestD3ETR):
    node = {"ADAPTIVE": False}


def build(student, teacher, **node):
    cfg = head_cfg("D3ETR", **node)
    return build_imitation_heads(cfg, info(student), info(teacher))["D3ETR"].train()


def pairs_of(head, ctx):
    """The adaptive pairs, layer by layer."""
    pairs = head.adaptive_pairs(ctx.student_outputs["decoded"], ctx.teacher_outputs["decoded"])
    return [Pairs(*layer) for layer in zip(pairs.student, pairs.teacher, strict=True)]


# --- the two groups (2) --------------------------------------------------------------------------


def test_second_group_changes_nothing_of_the_first():
    """In training mode without dropout; the head decodes from the same memory."""
    student, teacher = models()
    ctx = detr_context(student, teacher, **RAGGED)
    before = ctx.student_outputs["decoded"]
    logits = before.logits.clone()
    build(student, teacher)(ctx)
    after = decoded(student, ctx.student_features[LEVEL], ctx.image_sizes, ctx.canvas)
    assert torch.equal(before.logits, logits)
    torch.testing.assert_close(after.logits, logits, rtol=0, atol=1e-5)


def test_second_group_is_the_students_decoder_on_the_teachers_frozen_queries():
    student, teacher = models()
    ctx = detr_context(student, teacher, **RAGGED)
    head = build(student, teacher)
    own = ctx.student_outputs["decoded"]
    second = head.second_group(ctx, own)
    copied = copy.deepcopy(student)
    copied.query_embed = copy.deepcopy(teacher.query_embed)
    expected = decoded(copied, ctx.student_features[LEVEL], ctx.image_sizes, ctx.canvas)
    torch.testing.assert_close(second.logits, expected.logits)
    torch.testing.assert_close(second.boxes, expected.boxes)
    sum(head(ctx).values()).backward()
    assert teacher.query_embed.weight.grad is None
    assert student.transformer.decoder.ref_point_head.layers[0].weight.grad.any()


def test_nothing_of_the_second_group_is_saved():
    """(8) One bias-free adapter where widths differ; otherwise the head has no state at all."""
    assert build(*models()).state_dict() == {}
    wide = build(*models((CHANNELS, CHANNELS + 1)))
    assert list(wide.state_dict()) == ["adapter_queries.weight"]
    assert wide.adapter_queries.weight.shape == (16, 24)


def test_groups_and_layers_are_summed():
    student, teacher = models()
    ctx = detr_context(student, teacher, **RAGGED)
    both = build(student, teacher)(ctx)
    alone = [build(student, teacher, **{key: False})(ctx) for key in ("FIXED", "ADAPTIVE")]
    for key in TERMS:
        torch.testing.assert_close(both[key], alone[0][key] + alone[1][key])
    torch.testing.assert_close(both["loss_kd_d3etr_aux"], alone[1]["loss_kd_d3etr_aux"])
    assert set(alone[0]) == TERMS


# --- values of the terms -------------------------------------------------------------------------


def test_terms_equal_the_functions_on_gathered_pairs():
    student, teacher = models()
    ctx = detr_context(student, teacher, **RAGGED)
    head = build(student, teacher, FIXED=False, MATCH={"TOPK": 5}, WEIGHT=2.0)
    ours, theirs = ctx.student_outputs["decoded"], ctx.teacher_outputs["decoded"]
    expected = dict.fromkeys(TERMS, 0.0)
    for k, pairs in enumerate(pairs_of(head, ctx)):
        parts = []
        for side, index in ((ours, pairs.student), (theirs, pairs.teacher)):
            images = [(n, index[n]) for n in range(2)]
            own, cross = side.self_attention[k], side.cross_attention[k]
            parts.append(
                SimpleNamespace(
                    logits=torch.stack([side.logits[k, n, i] for n, i in images]),
                    boxes=torch.stack([side.boxes[k, n, i] for n, i in images]),
                    own=torch.stack([own.query[n][:, i] for n, i in images]),
                    own_key=torch.stack([own.key[n][:, i] for n, i in images]),
                    cross=torch.stack([cross.query[n][:, i] for n, i in images]),
                    key=cross.key,
                    valid=cross.valid,
                )
            )
        a, b = parts
        expected["loss_kd_d3etr_pred"] += 2 * prediction_loss(a.logits, a.boxes, b.logits, b.boxes)
        expected["loss_kd_d3etr_self"] += 2 * attention_loss(a.own, a.own_key, b.own, b.own_key)
        expected["loss_kd_d3etr_cross"] += 2 * attention_loss(
            a.cross, a.key, b.cross, b.key, a.valid, b.valid
        )
    found = head(ctx)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("term", ["PRED", "SELF", "CROSS"])
def test_a_term_with_factor_zero_is_not_there(term):
    student, teacher = models()
    ctx = detr_context(student, teacher, **RAGGED)
    losses = build(student, teacher, LOSS={term: 0.0}, AUX_DET_WEIGHT=0.0)(ctx)
    assert set(losses) == TERMS - {f"loss_kd_d3etr_{term.lower()}"}
    tripled = build(student, teacher, LOSS={term: 3.0})(ctx)
    plain = build(student, teacher)(ctx)
    key = f"loss_kd_d3etr_{term.lower()}"
    torch.testing.assert_close(tripled[key], 3 * plain[key])


# --- other shapes (6) ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"queries": 5, "layers": 3}, {"queries": 15, "layers": 6}),
        ({"queries": 15, "layers": 3}, {"queries": 5, "layers": 2}),
        ({"heads": 2}, {"heads": 8}),
        ({"dim": 16}, {"dim": 32, "heads": 2}),
    ],
)
@pytest.mark.parametrize("boxes", [0, 3, 12])
def test_other_numbers_of_queries_layers_and_heads(ours, theirs, boxes):
    """Padded batches, images without objects, and more objects than queries: finite."""
    student, teacher = toy_detr(seed=0, **ours), toy_detr(seed=1, **theirs)
    ctx = detr_context(student, teacher, boxes=boxes, **RAGGED)
    head = build(student, teacher)
    losses = head(ctx)
    assert set(losses) == {*TERMS, "loss_kd_d3etr_aux"}
    sum(losses.values()).backward()
    tensors = [*losses.values(), ctx.student_features[LEVEL].grad]
    tensors += [p.grad for p in (*student.parameters(), *head.parameters()) if p.grad is not None]
    assert all(x.isfinite().all() for x in tensors)


def test_a_teacher_with_a_finer_grid():
    """A DC5 teacher: twice the cells on each side."""
    student, teacher = models()
    ctx = detr_context(student, teacher, **RAGGED)
    fine = torch.randn(2, CHANNELS, 8, 8)
    with torch.no_grad():
        ctx.teacher_outputs["decoded"] = decoded(teacher, fine, ctx.image_sizes, ctx.canvas)
    losses = build(student, teacher)(ctx)
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values())
    assert ctx.student_features[LEVEL].grad.isfinite().all()


# --- bad values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"ADAPTIVE": False, "FIXED": False}, "ADAPTIVE and FIXED"),
        ({"MATCH": {"CLASS_COST": "hard"}}, "KD.D3ETR.MATCH.CLASS_COST: 'hard'"),
        ({"MATCH": {"TOPK": -1}}, "KD.D3ETR.MATCH.TOPK"),
        ({"QUERY_WEIGHT": "none"}, "KD.D3ETR.QUERY_WEIGHT"),
        ({"AUX_ASSIGN_LAYERS": "first"}, "KD.D3ETR.AUX_ASSIGN_LAYERS"),
        ({"LOSS": {"L1": -1.0}}, "KD.D3ETR.LOSS.L1"),
        ({"LOSS": {"PRED": 0.0, "SELF": 0.0, "CROSS": 0.0}}, "are all 0"),
    ],
)
def test_bad_values_name_their_key(node, words):
    with pytest.raises(ConfigError, match=words):
        build(*models(), **node)


def test_other_classes_are_refused_when_the_head_is_built():
    with pytest.raises(ConfigError, match="the teacher has 5 classes and the student 3"):
        build(toy_detr(), toy_detr(classes=CLASSES + 2))
