"""CSA learns, and in the trainer: two optimizers, idleness to the bit, end of warm-up, resume."""

from __future__ import annotations

import kd_models
import pytest
import torch
import toy_data
from detectron2.utils.events import EventStorage
from heads.test_csa import build
from kd_runs import interrupt
from kd_testing import CHANNELS
from prediction_contract import prediction_context

from projects.kd.engine.trainer import DistillTrainer
from projects.kd.schedule import Ramp, build_ramp

NAME = "noise_csa"
TEACHER = {"MODEL__BACKBONE__NAME": "build_toy_fpn_backbone"}


@pytest.fixture(scope="module", autouse=True)
def _data(tmp_path_factory):
    toy_data.register_noise(tmp_path_factory.mktemp("noise"), NAME)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return kd_models.write_teacher(
        tmp_path_factory.mktemp("teacher"), kd_models.tiny_cfg(**TEACHER)
    )


def config(teacher, folder, heads=("CSA",), **overrides):
    settings = {
        **TEACHER,
        "DATASETS__TRAIN": (NAME,),
        "DATASETS__TEST": (),
        "INPUT__MIN_SIZE_TRAIN": (32, 48),
        "INPUT__MAX_SIZE_TRAIN": 64,
        "SOLVER__MAX_ITER": 6,
        "SOLVER__STEPS": (5,),
        "SOLVER__WARMUP_ITERS": 0,
        "SOLVER__CHECKPOINT_PERIOD": 2,
        "SEED": 11,
        "KD__CSA__DIM": 16,
        "KD__CSA__HEADS": 4,
        "KD__CSA__OPTIMIZER__WARMUP_ITERS": 0,
        "OUTPUT_DIR": str(folder),
    }
    return kd_models.distill_cfg(teacher, "RetinaNet", heads, **{**settings, **overrides})


def trained(cfg, at=None, resume=False):
    """A trainer after its run; ``at`` gets the assistant's state before each iteration."""
    torch.manual_seed(0)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume)
    step = trainer.run_step

    def run_step():
        if at is not None:
            at[trainer.iter] = state(trainer)
        step()

    trainer.run_step = run_step
    trainer.train()
    return trainer


def state(trainer):
    head = trainer._unwrapped.heads["CSA"]
    return {name: value.clone() for name, value in head.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def test_the_default_schedule_scales_with_the_run(teacher, tmp_path):
    for iterations, start, ramp in ((90000, 30000, 1000), (900, 300, 10), (6, 2, 0)):
        cfg = config(teacher, tmp_path, SOLVER__MAX_ITER=iterations)
        assert build_ramp(cfg, "CSA") == Ramp(start, ramp, -1)
    cfg.KD.CSA.START_ITER, cfg.KD.START_ITER = 4, 1
    assert build_ramp(cfg, "CSA") == Ramp(4, 0, -1)
    cfg.KD.CSA.START_ITER = -2
    assert build_ramp(cfg, "CSA").start == 1


def test_its_own_adam_has_the_published_values(teacher, tmp_path):
    trainer = DistillTrainer(config(teacher, tmp_path, SOLVER__BASE_LR=0.02))
    item = trainer.optimizations["CSA"]
    (group,) = item.optimizer.param_groups
    assert type(item.optimizer) is torch.optim.Adam
    assert (group["initial_lr"], group["weight_decay"]) == (3e-4, 1e-4)
    assert set(group["params"]) == set(trainer._unwrapped.heads["CSA"].parameters())
    # the student's schedule: the same milestones
    rates = []
    for _ in range(6):
        rates.append(item.scheduler.get_last_lr()[0])
        item.optimizer.step()
        item.scheduler.step()
    assert rates[-1] == pytest.approx(0.1 * rates[-2])


def test_teaching_starts_at_its_iteration_and_training_at_the_first(teacher, tmp_path):
    before = {}
    rate = {"KD__CSA__OPTIMIZER__BASE_LR": 0.01}  # so that it differs from the student soon
    trainer = trained(config(teacher, tmp_path, **rate), before)  # teaches from 2 on
    for key in ("loss_kd_csa_cls", "loss_kd_csa_box"):
        values = [value for value, _ in trainer.storage.history(key).values()]
        assert values[:2] == [0, 0] and all(value > 0 for value in values[2:])
    values = [value for value, _ in trainer.storage.history("loss_aux_csa_cls").values()]
    assert all(value > 0 for value in values)
    ((gain, iteration),) = trainer.storage.history("kd/csa_gain").values()
    assert iteration == 0 and gain == 0
    assert all(not same(before[i], before[i + 1]) for i in range(5))


def test_before_teaching_starts_the_student_is_as_without_an_assistant(teacher, tmp_path):
    """Bit for bit: the same anchors, no gradient, no random number that it would miss."""
    students = []
    for heads, overrides in (
        (("CSA",), {"KD__CSA__START_ITER": 6}),
        (("Mimic",), {"KD__MIMIC__WEIGHT": 0.0}),
    ):
        cfg = config(teacher, tmp_path / heads[0], heads, **overrides)
        students.append(trained(cfg).student.state_dict())
    assert same(*students)


def test_while_idle_it_is_bit_identical(teacher, tmp_path):
    """Adam with weight decay would move it although its gradients are 0."""
    before = {}
    trainer = trained(config(teacher, tmp_path, KD__CSA__IDLE_ITERS=4), before)
    assert all(same(before[0], before[i]) for i in (1, 2, 3, 4))
    assert not same(before[4], before[5])
    moments = trainer.optimizations["CSA"].optimizer.state.values()
    assert {int(x["step"]) for x in moments} == {2}
    values = [value for value, _ in trainer.storage.history("loss_aux_csa_cls").values()]
    assert values[:4] == [0] * 4 and all(values[4:])


@pytest.mark.parametrize("head", ["student", "copy", "average"])
def test_resume_keeps_both_optimizers_and_the_assistants_head(head, teacher, tmp_path):
    own = {"KD__CSA__HEAD": head, "KD__CSA__HEAD_DECAY": 0.5}
    straight = trained(config(teacher, tmp_path / "straight", **own))
    copied = [name for name in state(straight) if name.startswith("head.parts")]
    assert bool(copied) == (head != "student")

    cfg = config(teacher, tmp_path / "resumed", **own)
    torch.manual_seed(0)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(False)
    interrupt(trainer, at=4)
    resumed = trained(cfg, resume=True)
    assert resumed.start_iter == 4
    assert same(state(straight), state(resumed))
    assert same(straight.student.state_dict(), resumed.student.state_dict())
    for name in ("student", "CSA"):
        ours, theirs = (
            t.optimizations[name].optimizer.state_dict()["state"] for t in (straight, resumed)
        )
        for index, values in ours.items():
            assert all(
                torch.equal(torch.as_tensor(theirs[index][k]), torch.as_tensor(v))
                for k, v in values.items()
                if v is not None
            )


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_both_parts_of_scalekd_train_together(scale, teacher, tmp_path):
    """SDF in the student's optimizer, the assistant in its own; images of both sizes from files."""
    overrides = {"KD__SDF__EMBED_DIM": 8, "KD__TEACHER__INPUT_SCALE": scale, "SOLVER__MAX_ITER": 3}
    trainer = trained(config(teacher, tmp_path, ("SDF", "CSA"), **overrides))
    sdf, csa = (
        {p for group in trainer.optimizations[name].optimizer.param_groups for p in group["params"]}
        for name in ("student", "CSA")
    )
    heads = trainer._unwrapped.heads
    assert csa == set(heads["CSA"].parameters())
    assert {p for p in heads["SDF"].parameters() if p.requires_grad} < sdf
    latest = trainer.storage.latest()
    for key in ("loss_kd_sdf", "loss_kd_csa_cls", "loss_kd_csa_box", "loss_aux_csa_cls"):
        assert latest[key][0] >= 0


def test_the_checkpoints_student_is_the_plain_one(teacher, tmp_path):
    """The same parameters, none of the assistant's; stock detectron2 loads it."""
    trained(config(teacher, tmp_path))
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    plain = kd_models.build(kd_models.tiny_cfg(**TEACHER))
    assert {k: v.shape for k, v in saved["model"].items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    assert all(key.startswith("CSA.") for key in saved["distill"])


def test_an_assistant_learns_what_the_student_does_not_know():
    """The teacher's features say where objects are, the student's are noise."""
    head = build(RATES=[[level, 2, 1] for level in ("p3", "p4", "p5")], POSITIONS=True)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    curve = []
    for step in range(40):
        ctx = prediction_context(channels=(CHANNELS, CHANNELS + 2), seed=step)
        with torch.no_grad():
            for level, x in ctx.teacher_features.items():
                x.zero_()
                for image, gt in enumerate(ctx.gt):
                    for x0, y0, x1, y1 in (gt.gt_boxes.tensor / ctx.stride(level)).tolist():
                        x[image, :, int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = 1.0
        optimizer.zero_grad()
        with EventStorage():
            losses = head(ctx)
        loss = losses["loss_aux_csa_cls"] + losses["loss_aux_csa_box_reg"]
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
