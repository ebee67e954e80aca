"""SDF's own rate, its control without a student, and who made its loss fall."""

import copy
import logging

import kd_models
import pytest
import torch
from detectron2.utils.events import EventStorage
from head_contract import RAGGED
from heads.test_sdf import build
from kd_testing import leaves, make_context
from torch import nn

from projects.kd import DistillContext
from projects.kd.engine.optim import build_optimizations
from projects.kd.errors import ConfigError
from projects.kd.heads.sdf_share import IN_A_ROW, ModuleShare

# --- rates and the control ----------------------------------------------------------------------


def test_the_decouplers_have_a_rate_of_their_own(tmp_path):
    files = kd_models.write_teacher(tmp_path)
    cfg = kd_models.distill_cfg(
        files,
        heads=("SDF", "Mimic"),
        KD__SDF__LR_FACTOR=0.25,
        KD__SDF__EMBED_DIM=8,
        KD__ADAPTER__LR_FACTOR=3.0,
        KD__ADAPTER__TYPE="conv1x1",
        SOLVER__BASE_LR=0.1,
        SOLVER__BIAS_LR_FACTOR=2.0,
    )
    model = kd_models.build_wrapper(cfg)
    groups = build_optimizations(cfg, model)["student"].optimizer.param_groups
    rates = {p: group["initial_lr"] for group in groups for p in group["params"]}
    sdf = model.heads["SDF"]
    norms = [n for n, _ in sdf.decouplers.named_parameters() if n.endswith("bias")]
    assert norms
    for name, parameter in sdf.decouplers.named_parameters():
        expected = 0.1 * 0.25 * (2.0 if name.endswith("bias") else 1.0)
        assert rates[parameter] == pytest.approx(expected), name
    for adapter in (sdf.adapters["res5"], model.heads["Mimic"].adapters["p3"]):
        assert rates[adapter.weight] == pytest.approx(0.3)
    assert rates[model.student.head.cls_score.weight] == pytest.approx(0.1)
    for name in ("targets", "share"):
        assert not rates.keys() & set(getattr(sdf, name).parameters())


def test_detached_only_the_adapter_and_the_decouplers_learn():
    results = []
    for detach in (False, True):
        head, ctx = (
            build((6, 10), DETACH=detach, WEIGHT=1.0),
            make_context(**RAGGED, channels=(6, 10)),
        )
        loss = head(ctx)["loss_kd_sdf"]
        loss.backward()
        reached = any(x.grad is not None for _, x in leaves(ctx).student)
        assert reached != detach
        gradients = [p.grad for p in head.parameters() if p.requires_grad]
        assert any(p.grad.any() for p in head.adapters.parameters())
        results.append((loss, gradients))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("value", [-0.1, -1.0])
def test_a_negative_rate_is_refused(value):
    with pytest.raises(ConfigError, match=rf"^KD\.SDF\.LR_FACTOR is {value}"):
        build(LR_FACTOR=value)


# --- who made the loss fall ---------------------------------------------------------------------


def test_the_share_is_the_sum_of_what_the_modules_did():
    """Against the definition, with a function of numbers in place of a network."""
    module = nn.Linear(1, 1, bias=False)
    share = ModuleShare({"m": module})
    values, total, first, before = [], 0.0, None, None
    for m, s in ((4.0, 3.0), (3.0, 2.5), (3.0, 1.0), (0.5, 1.0)):
        module.weight.data.fill_(m)
        loss = torch.tensor(m * s + s)
        found = share.take({"m": module}, loss, lambda mm, s=s: mm["m"].weight[0, 0] * s + s)
        if first is None:
            first = loss.item()
            assert found is None
        else:
            total += (before - m) * s
            values.append(total / (first - loss.item()))
            assert found == pytest.approx(values[-1])
        before = m
    assert values == pytest.approx([2.5 / 5.0, 2.5 / 11.0, 5.0 / 13.5])
    again = ModuleShare({"m": nn.Linear(1, 1, bias=False)})
    again.load_state_dict(copy.deepcopy(share.state_dict()))
    module.weight.data.fill_(0.25)
    ours, theirs = (
        x.take({"m": module}, torch.tensor(1.0), lambda mm: mm["m"].weight[0, 0] + 1)
        for x in (share, again)
    )
    assert ours == theirs == pytest.approx(5.5 / 14.0)


def test_while_a_loss_has_not_fallen_there_is_no_share(caplog):
    module = nn.Linear(1, 1)
    share = ModuleShare({"m": module})
    with caplog.at_level(logging.WARNING):
        for value in (1.0, 1.0, 1.5):
            loss = torch.tensor(value)
            found = share.take({"m": module}, loss, lambda _, x=loss: x)
            assert found is None
            share.warn(found, loss)
    assert not caplog.records


def imitate(head, iterations):
    """A random student of a random teacher on random images; every fifth step logs."""
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Conv2d(3, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3), nn.ReLU())
        for c in (8, 12)
    ]
    own = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([*nets[0].parameters(), *own], lr=0.01)
    sizes = [(128, 128)] * 8
    with EventStorage(0) as storage:
        for iteration in range(iterations):
            x = torch.randn(8, 3, 6, 6)
            ctx = DistillContext(
                iteration=iteration,
                image_sizes=sizes,
                canvas=sizes[0],
                gt=None,
                student_features={},
                teacher_features={},
                student_outputs={"bottom_up": {"res5": nets[0](x)}},
                teacher_outputs={"bottom_up": {"res5": nets[1](x)}},
                log_scalars=iteration % 5 == 0,
            )
            optimizer.zero_grad()
            head(ctx)["loss_kd_sdf"].backward()
            optimizer.step()
            storage.step()
    return [value for value, _ in storage.history("kd/sdf_module_share").values()]


@pytest.mark.parametrize("mode", ["ema", "frozen"])
def test_the_share_tells_a_student_that_learns_from_one_that_does_not(mode, caplog):
    """Detached, the modules do all of it."""
    node = {"TEACHER_SDF": mode, "EMA_DECAY": 0.99, "WEIGHT": 1.0}
    with caplog.at_level(logging.WARNING):
        learns = imitate(build((8, 12), **node).train(), 61)
        detached = imitate(build((8, 12), DETACH=True, **node).train(), 61)
    assert len(learns) == len(detached) == 12
    assert learns[-1] < 0.75
    assert detached[-1] == pytest.approx(1.0, abs=0.1)
    assert not [x for x in caplog.records if x.name == "projects.kd.heads.sdf_share"]


def test_modules_that_do_it_alone_are_reported_once(caplog):
    head = build((8, 12), EMA_DECAY=0.99, WEIGHT=1.0).train()
    pair = head.stage_pair
    head.stage_pair = lambda ctx, stage: tuple(
        x if x is None else x.detach() for x in pair(ctx, stage)
    )  # nothing reaches the student, and the config does not say so
    with caplog.at_level(logging.WARNING):
        imitate(head, 61)
    (record,) = [x for x in caplog.records if x.name == "projects.kd.heads.sdf_share"]
    message = record.getMessage()
    assert message.startswith("KD.SDF: its own modules made") and "KD.SDF.LR_FACTOR" in message


def test_the_warning_waits_for_a_row_of_shares(caplog):
    share = ModuleShare({"m": nn.Linear(1, 1)})
    share.first.fill_(1.0)
    with caplog.at_level(logging.WARNING):
        for index in range(4 * IN_A_ROW):
            loss = torch.tensor(0.1 if index % IN_A_ROW else 0.6)
            share.warn(1.0, loss)
        assert not caplog.records
        for _ in range(2 * IN_A_ROW):
            share.warn(0.95, torch.tensor(0.1))
    assert len(caplog.records) == 1
