"""D3ETR and feature heads on a real Conditional DETR: training, evaluation, refusals."""

import copy

import pytest
import torch
from kd_models import (
    build,
    build_wrapper,
    distill_cfg,
    losses_at,
    make_batch,
    tiny_cfg,
    train_steps,
    write_teacher,
)

from projects.kd.errors import ConfigError
from projects.kd.modeling.conditional_detr_transformer import Decoder

ARCH = "ConditionalDETR"
KEYS = {f"loss_kd_d3etr_{name}" for name in ("pred", "self", "cross", "aux")}
SIZES = ((64, 96), (90, 60))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """More queries, layers and heads than the student."""
    keys = {"NUM_QUERIES": 15, "DEC_LAYERS": 4, "NHEADS": 2}
    cfg = tiny_cfg(ARCH, **{f"MODEL__CONDITIONAL_DETR__{k}": v for k, v in keys.items()})
    return write_teacher(tmp_path_factory.mktemp("teacher"), cfg)


def wrapper(teacher, heads=("D3ETR",), arch=ARCH, **overrides):
    return build_wrapper(distill_cfg(teacher, arch, heads, **overrides))


def count_groups(monkeypatch):
    """Notes the number of queries of each group that a decoder runs."""
    groups = []
    original = Decoder.forward

    def noted(self, embedding, *args, **kwargs):
        groups.append(len(embedding))
        return original(self, embedding, *args, **kwargs)

    monkeypatch.setattr(Decoder, "forward", noted)
    return groups


def test_a_step_runs_teacher_student_and_second_group(teacher, monkeypatch):
    model = wrapper(teacher)
    groups = count_groups(monkeypatch)
    losses = losses_at(model, make_batch(SIZES))
    assert groups == [15, 12, 15]
    assert set(losses) >= KEYS and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []


def test_evaluation_runs_the_students_own_group_only(teacher, monkeypatch):
    model = wrapper(teacher)
    groups = count_groups(monkeypatch)
    with torch.no_grad():
        model.eval()(make_batch(SIZES))
    assert groups == [12]


def test_the_students_own_losses_do_not_depend_on_the_head(teacher):
    batch = make_batch(SIZES)
    plain = losses_at(build(tiny_cfg(ARCH), seed=2).train(), batch)
    distilled = losses_at(wrapper(teacher), batch)
    assert set(distilled) == set(plain) | KEYS
    for key, value in plain.items():
        torch.testing.assert_close(distilled[key], value, rtol=0, atol=1e-5)


def test_the_checkpoint_is_the_plain_student_and_the_teacher_stays(teacher):
    model = wrapper(teacher)
    before = copy.deepcopy(model.teacher.model.state_dict())
    start = copy.deepcopy(model.student.state_dict())
    train_steps(model, make_batch(SIZES))
    assert model.student.state_dict().keys() == build(tiny_cfg(ARCH)).state_dict().keys()
    assert not any(name.startswith("heads") for name in model.state_dict())
    for name, value in model.teacher.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(
        start["query_embed.weight"], model.student.state_dict()["query_embed.weight"]
    )


def test_dropout_and_half_precision(teacher):
    model = wrapper(teacher, MODEL__CONDITIONAL_DETR__DROPOUT=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_at(model, make_batch(SIZES))
    assert all(losses[key].dtype == torch.float32 for key in KEYS)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("boxes", [0, 20])
def test_no_objects_and_more_than_queries(teacher, boxes):
    losses = losses_at(wrapper(teacher), make_batch(SIZES, boxes=boxes))
    assert all(loss.isfinite() for loss in losses.values())


def test_a_dc5_teacher(tmp_path):
    """Its level has another stride, so the user names the pair."""
    dc5 = {
        "MODEL__RESNETS__DEPTH": 50,
        "MODEL__RESNETS__OUT_FEATURES": ["res5"],
        "MODEL__CONDITIONAL_DETR__IN_FEATURE": "res5",
    }
    cfg = tiny_cfg(ARCH, MODEL__RESNETS__RES5_DILATION=2, **dc5)
    paths = write_teacher(tmp_path, cfg)
    with pytest.raises(ConfigError, match="KD.LEVEL_MAP"):
        wrapper(paths, **dc5)
    model = wrapper(paths, KD__LEVEL_MAP=[["res5", "res5"]], **dc5)
    losses = losses_at(model, make_batch(SIZES))
    assert all(losses[key].isfinite() for key in KEYS)


def test_inheriting_the_whole_transformer(teacher, tmp_path):
    """A student whose widths agree can start from the teacher's transformer and heads."""
    from projects.kd.engine.inherit import inherit

    model = wrapper(teacher, MODEL__CONDITIONAL_DETR__DEC_LAYERS=4)
    prefixes = ("transformer.", "input_proj.", "class_embed.", "bbox_embed.")
    done = inherit(model.student, model.teacher.model, prefixes)
    assert done.skipped == {} and len(done.copied) > 50


# --- feature heads on the backbone ---------------------------------------------------------------


@pytest.mark.parametrize("head", ["CWD", "Mimic", "PKD", "ICD"])
def test_feature_heads_work_on_the_encoded_level(teacher, head):
    overrides = {"KD__ICD__PRIORS": "uniform", "KD__ICD__DIM": 16, "KD__ICD__HEADS": 2}
    model = wrapper(teacher, (head, "D3ETR"), **overrides)
    assert model.heads[head].levels == ("res4",)
    losses = losses_at(model, make_batch(SIZES))
    assert set(losses) >= KEYS and losses[f"loss_kd_{head.lower()}"] > 0
    sum(losses.values()).backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []


def test_what_makes_no_sense_is_refused_with_the_reason(teacher, tmp_path):
    with pytest.raises(ConfigError, match="KD.FGFI.ANCHOR_SIZES: ConditionalDETR has no anchors"):
        wrapper(teacher, ("FGFI",))
    with pytest.raises(ConfigError, match="KD.CWD.TARGET: 'dense' is not what the student"):
        wrapper(teacher, ("CWD",), KD__CWD__TARGET="dense")
    with pytest.raises(ConfigError, match="D3ETR needs decoded and the student RetinaNet"):
        wrapper(write_teacher(tmp_path), arch="RetinaNet")
    with pytest.raises(ConfigError, match="D3ETR needs decoded and the teacher RetinaNet"):
        wrapper(write_teacher(tmp_path), KD__LEVEL_MAP=[["res4", "p4"]])
