"""What the processes of the DDP tests run; each writes ``rank<r>.pth`` into a folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from projects.kd.engine.launch import launch_training
from projects.kd.engine.loop import TrainLoop
from projects.kd.engine.optim import GradientClip
from projects.kd.engine.processes import wrap_ddp
from projects.kd.errors import ConfigError

SAMPLES = torch.linspace(-2, 3, 32).reshape(8, 4)


class Toy(nn.Module):
    """Linear layers with a mean-reduced loss.

    Args:
        leave_out: number of the forward pass, from 0, from which on the last layer is left out.
    """

    def __init__(self, leave_out: int = 10**6):
        super().__init__()
        self.passes, self.leave_out = 0, leave_out
        torch.manual_seed(comm.get_rank())  # DDP has to make the weights equal
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, batch):
        layers = self.layers if self.passes < self.leave_out else self.layers[:-1]
        self.passes += 1
        return {"loss_a": layers(batch).square().mean()}


def own_batches(rank: int, world: int, size: int):
    """Batches of ``size`` from every ``world``-th sample."""
    while True:
        yield from SAMPLES[rank::world].split(size)


def toy_loop(accum_steps=1, poison_rank=-1, **options):
    from detectron2.config import get_cfg

    from projects.kd import add_kd_config

    cfg = get_cfg()
    add_kd_config(cfg)
    model = wrap_ddp(cfg, Toy(**options))
    data = own_batches(comm.get_rank(), comm.get_world_size(), 4 // accum_steps)
    if comm.get_rank() == poison_rank:
        data = iter([SAMPLES[:4], SAMPLES[:4] * float("nan")])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TrainLoop(
        model,
        data,
        {"student": optimizer},
        accum_steps=accum_steps,
        gather_period=1,
        clips={"student": GradientClip("full_model", 1e6)},
        last_checkpoint=lambda: "none.pth",
    )


def run(loop, steps):
    with EventStorage(0) as storage:
        for iteration in range(steps):
            loop.iter = storage.iter = iteration
            loop.run_step()
    return storage


def record(folder: str) -> None:
    """One step with and without accumulation: start, gradients, and the logged loss."""
    result = {}
    for accum_steps in (1, 2):
        loop = toy_loop(accum_steps)
        start = {n: p.detach().clone() for n, p in loop.model.module.named_parameters()}
        storage = run(loop, 1)
        grads = {n: p.grad.clone() for n, p in loop.model.module.named_parameters()}
        logged = storage.histories().get("loss_a")
        result[accum_steps] = (start, grads, logged.latest() if logged else None)
    try:
        run(toy_loop(leave_out=1), 2)
    except ConfigError as error:
        result["idle_later"] = str(error)
    result["local_rank"], result["local_size"] = comm.get_local_rank(), comm.get_local_size()
    torch.save(result, Path(folder) / f"rank{comm.get_rank()}.pth")


def main(args) -> None:
    """``args.task``: record, train (a small RetinaNet, resumed) or poison."""
    if args.task == "record":
        record(args.folder)
    elif args.task == "poison":
        run(toy_loop(poison_rank=1), 3)
    else:
        train(args.folder)


def train(folder: str) -> None:
    """Two ranks: straight to iteration 4, and again with a stop after 2; saves what must agree."""
    import kd_models
    import toy_data

    from projects.kd import evaluation
    from projects.kd.engine.trainer import DistillTrainer

    evaluation.evaluate = lambda cfg, model: {}
    images = Path(folder) / f"images{comm.get_rank()}"
    images.mkdir()
    toy_data.register_noise(images, "noise_ddp")

    def fit(name, resume=False, max_iter=4):
        cfg = kd_models.tiny_cfg(
            MODEL__BACKBONE__NAME="build_toy_fpn_backbone",
            MODEL__RETINANET__IN_FEATURES=["p3", "p4", "p5", "p6"],  # nothing reads p7
            MODEL__ANCHOR_GENERATOR__SIZES=[[16], [32], [64], [128]],
            DATASETS__TRAIN=("noise_ddp",),
            DATASETS__TEST=(),
            INPUT__MIN_SIZE_TRAIN=(32, 48),
            SOLVER__MAX_ITER=4,
            SOLVER__STEPS=(),
            SOLVER__CHECKPOINT_PERIOD=2,
            SEED=3,
            OUTPUT_DIR=os.path.join(folder, name),
        )
        torch.manual_seed(0)
        trainer = DistillTrainer(cfg)
        trainer.resume_or_load(resume)
        trainer.max_iter = max_iter
        trainer.train()
        return trainer

    straight = fit("straight")
    fit("broken", max_iter=2)
    resumed = fit("broken", resume=True)
    torch.save(
        {
            "start": resumed.start_iter,
            "same": all(
                torch.equal(v, straight.student.state_dict()[k])
                for k, v in resumed.student.state_dict().items()
                if "running" not in k or comm.is_main_process()
            ),
            "normalizer": (straight.student.loss_normalizer, resumed.student.loss_normalizer),
            "looks": resumed._trainer.model.find_unused_parameters,
            "p7": torch.equal(
                *(t.student.backbone.top_block.p7.weight for t in (straight, resumed))
            ),
            "weight": straight.student.head.cls_score.weight.detach(),
        },
        Path(folder) / f"train{comm.get_rank()}.pth",
    )


def under_torchrun(rank: int, port: int, task: str, folder: str) -> None:
    """A process of two, as torchrun starts it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    torch.set_num_threads(1)
    launch_training(main, SimpleNamespace(task=task, folder=folder))
