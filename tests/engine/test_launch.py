"""Several processes: gradients are the mean over ranks, errors come out once, flags are checked."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import ddp_worker
import pytest
import torch
from kd_processes import run_ranks

from projects.kd.engine.launch import argument_parser, launch_training
from projects.kd.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]


def arguments(task, folder, **kwargs):
    defaults = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    return SimpleNamespace(task=task, folder=str(folder), **(defaults | kwargs))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def under_torchrun(task, folder):
    """Two processes with the environment that torchrun gives."""
    run_ranks(ddp_worker.under_torchrun, free_port(), task, str(folder))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    under_torchrun("record", folder)
    return [torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in range(2)]


@pytest.mark.ddp
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_gradients_are_the_mean_over_the_ranks(recorded, accum_steps):
    (start, grads, _), (other_start, other_grads, _) = (r[accum_steps] for r in recorded)
    assert all(torch.equal(start[name], other_start[name]) for name in start)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    model = ddp_worker.Toy()
    model.load_state_dict(start)
    losses = [model(ddp_worker.SAMPLES[rank::2])["loss_a"] for rank in range(2)]
    (sum(losses) / 2).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, grads[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.ddp
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_logged_losses_are_the_mean_over_the_ranks(recorded, accum_steps):
    start, _, logged = recorded[0][accum_steps]
    model = ddp_worker.Toy()
    model.load_state_dict(start)
    losses = [model(ddp_worker.SAMPLES[rank::2])["loss_a"].item() for rank in range(2)]
    assert logged == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert recorded[1][accum_steps][2] is None  # only the main process writes


@pytest.mark.ddp
def test_torchrun_environment_sets_up_local_ranks(recorded):
    assert [r["local_rank"] for r in recorded] == [0, 1]
    assert [r["local_size"] for r in recorded] == [2, 2]


@pytest.mark.ddp
def test_a_gradient_that_fails_to_come_later_is_one_line(recorded):
    for rank in recorded:
        line = rank["idle_later"]
        assert line.startswith("SOLVER.DDP_FIND_UNUSED_PARAMETERS: set it to True")
        assert "iteration 1 " in line and "layers.2 (2)" in line and "\n" not in line


@pytest.mark.ddp
def test_two_ranks_resume_exactly(tmp_path):
    under_torchrun("train", tmp_path)
    ranks = [torch.load(tmp_path / f"train{rank}.pth", weights_only=True) for rank in range(2)]
    for rank in ranks:
        assert rank["start"] == 2 and rank["same"] and rank["looks"] and rank["p7"]
        straight, resumed = rank["normalizer"]
        assert straight == resumed
    # each rank sees its own images, so the normalisers differ, and so does what was restored
    assert ranks[0]["normalizer"] != ranks[1]["normalizer"]
    assert torch.equal(ranks[0]["weight"], ranks[1]["weight"])


@pytest.mark.ddp
def test_nan_on_one_rank_stops_all_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(ddp_worker.__file__).parent}")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError) as caught:
        launch_training(ddp_worker.main, arguments("poison", tmp_path))
    message = str(caught.value)
    assert "iteration 1: not finite: loss_a=nan" in message and "none.pth" in message
    assert "\n" not in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_gpus": 0}, "--num-gpus"),
        ({"num_machines": 2}, "--dist-url"),
        ({"num_machines": 2, "dist_url": "tcp://host:1", "machine_rank": 2}, "--machine-rank"),
    ],
)
def test_flags_that_cannot_work(change, words, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=words):
        launch_training(lambda args: None, arguments("none", "", **change))


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--num-gpus 2: this machine has 1"):
        launch_training(lambda args: None, arguments("none", ""))


def test_incomplete_torchrun_environment(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="LOCAL_RANK"):
        launch_training(lambda args: None, arguments("none", ""))


def test_one_process_runs_here(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ran = []
    args = argument_parser().parse_args(["--num-gpus", "1", "SOLVER.MAX_ITER", "3"])
    launch_training(ran.append, args)
    assert ran == [args] and args.opts == ["SOLVER.MAX_ITER", "3"] and args.dist_url == "auto"
