"""Short training runs on noise images, interrupted and resumed."""

from __future__ import annotations

import pytest
import torch

from projects.kd.engine.trainer import DistillTrainer

ITERATIONS = 6


def run_settings(tmp_path, folder, name):
    return {
        "MODEL__BACKBONE__NAME": "build_toy_fpn_backbone",
        "DATASETS__TRAIN": (name,),
        "DATASETS__TEST": (),
        "INPUT__MIN_SIZE_TRAIN": (32, 48),
        "INPUT__MAX_SIZE_TRAIN": 64,
        "SOLVER__MAX_ITER": ITERATIONS,
        "SOLVER__STEPS": (5,),
        "SOLVER__WARMUP_ITERS": 4,
        "SOLVER__CHECKPOINT_PERIOD": 2,
        "SOLVER__BASE_LR": 0.02,
        "SEED": 11,
        "OUTPUT_DIR": str(tmp_path / folder),
    }


def start(cfg, resume=False, seed=0):
    torch.manual_seed(seed)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume)
    return trainer


class Interrupt(Exception):
    pass


def interrupt(trainer, at):
    step = trainer.run_step

    def run_step():
        if trainer.iter == at:
            raise Interrupt
        step()

    trainer.run_step = run_step
    with pytest.raises(Interrupt):
        trainer.train()
