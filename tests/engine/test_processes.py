"""What DDP is told about parameters without a gradient, and that finding out leaves no trace."""

import itertools
import logging

import kd_models
import pytest
import torch
import toy_data  # registers the toy backbone
from detectron2.utils.events import EventStorage
from torch import nn

from projects.kd.engine import processes
from projects.kd.engine.loop import TrainLoop

assert toy_data.build_toy_fpn_backbone


def loop_of(images):
    cfg = kd_models.tiny_cfg(
        MODEL__BACKBONE__NAME="build_toy_fpn_backbone",
        MODEL__RETINANET__IN_FEATURES=["p3", "p4", "p5", "p6"],
        MODEL__ANCHOR_GENERATOR__SIZES=[[16], [32], [64], [128]],
    )
    model = kd_models.build(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return TrainLoop(model, iter(images), {"student": optimizer}, seed=4)


def batches():
    return [kd_models.make_batch(((48, 64), (64, 48)), seed=k) for k in range(3)]


def run(loop):
    with EventStorage(0) as storage:
        for iteration in range(3):
            loop.iter = storage.iter = iteration
            loop.run_step()


def test_the_probe_leaves_no_trace():
    plain, probed = loop_of(batches()), loop_of(batches())
    idle = []
    probed.distribute(lambda model, names: idle.extend(names) or model)
    assert idle == ["backbone.top_block.p7.weight", "backbone.top_block.p7.bias"]
    assert all(p.grad is None for p in probed.model.parameters())
    run(plain)
    run(probed)  # on all three batches: the first is not lost
    for (name, one), other in zip(
        plain.model.state_dict().items(), probed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert plain.model.loss_normalizer == probed.model.loss_normalizer


class Recorded(nn.Module):
    """Takes the place of DDP."""

    def __init__(self, module, **options):
        super().__init__()
        self.module, self.options = module, options


@pytest.mark.parametrize(
    ("asked", "ranks", "looks", "told"),
    [
        (False, ([], []), False, False),
        (False, ([], ["0.bias", "1.weight"]), True, True),
        (True, (["0.bias"], ["0.bias"]), True, False),
    ],
)
def test_ddp_looks_where_any_process_has_to(asked, ranks, looks, told, monkeypatch, caplog):
    monkeypatch.setattr(processes, "DistributedDataParallel", Recorded)
    monkeypatch.setattr(processes.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.comm, "all_gather", lambda mine: list(ranks))
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    cfg = kd_models.tiny_cfg(SOLVER__DDP_FIND_UNUSED_PARAMETERS=asked)
    with caplog.at_level(logging.INFO, logger="projects.kd.engine.processes"):
        wrapped = processes.wrap_ddp(cfg, nn.Linear(2, 2), ranks[0])
    assert wrapped.options["find_unused_parameters"] is looks
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == told
    for line in lines:
        assert "SOLVER.DDP_FIND_UNUSED_PARAMETERS" in line and "\n" not in line
        assert "2 parameters: 0.bias (1), 1.weight (1)" in line


def test_one_process_is_not_wrapped():
    model = nn.Linear(2, 2)
    assert processes.wrap_ddp(kd_models.tiny_cfg(), model) is model


def test_idle_parameters_are_trainable_ones_without_a_gradient():
    model = nn.Sequential(*itertools.starmap(nn.Linear, [(2, 2)] * 3))
    model[2].requires_grad_(False)
    model[0](torch.ones(1, 2)).sum().backward()
    assert processes.idle_parameters(model) == ["1.weight", "1.bias"]
    assert processes.unexpectedly_idle(model) == []  # one process exchanges nothing
