"""SDF in whole detectors: who is trained, odd sizes and resolutions, resume, several processes."""

import itertools
import os

import kd_models
import pytest
import torch
import torch.distributed as dist
import toy_data
from detectron2.utils.events import EventStorage
from gradient_worker import SIZES, Step, batch_of
from gradient_worker import Case as GradientCase
from kd_processes import run_ranks
from kd_runs import interrupt
from torch.nn.parallel import DistributedDataParallel

from projects.kd import evaluation
from projects.kd.engine.trainer import DistillTrainer

SMALL = {"KD__SDF__EMBED_DIM": 8, "KD__SDF__WEIGHT": 1.0}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {
        arch: kd_models.write_teacher(tmp_path_factory.mktemp(arch), kd_models.tiny_cfg(arch))
        for arch in ("RetinaNet", "GeneralizedRCNN")
    }


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_the_feature_term_trains_the_students_backbone_and_the_head_alone(teachers, arch):
    """Neither the neck, nor the detector's heads, nor anything of the teacher."""
    cfg = kd_models.distill_cfg(teachers[arch], arch, heads=("SDF",), **SMALL)
    wrapper = kd_models.build_wrapper(cfg)
    losses = kd_models.losses_at(wrapper, kd_models.make_batch())
    losses["loss_kd_sdf"].backward()
    reached = {n for n, p in wrapper.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("student.backbone.bottom_up.res5") for n in reached)
    assert any(n.startswith("student.backbone.bottom_up.stem") for n in reached)
    assert {n.split(".")[2] for n in reached if n.startswith("student.")} == {"bottom_up"}
    own = {n for n, p in wrapper.named_parameters() if n.startswith("heads.") and p.requires_grad}
    assert own and own <= reached and all("decouplers" in n for n in own)
    assert all(p.grad is None for p in wrapper.teacher.model.parameters())
    assert (
        all(key.startswith("loss_kd_sdf") or not key.startswith("loss_kd") for key in losses)
        and len(losses) > 2
    )


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("name", ["mobilenetv2_100", "mobilenetv3_small_050"])
def test_small_students_odd_sizes_and_resolutions(teachers, name, scale):
    """C5 of 320 and of 288 channels against the teacher's 512; sides that 32 does not divide."""
    cfg = kd_models.distill_cfg(
        teachers["RetinaNet"],
        heads=("SDF",),
        MODEL__BACKBONE__NAME="build_retinanet_timm_fpn_backbone",
        MODEL__TIMM__NAME=name,
        KD__TEACHER__INPUT_SCALE=scale,
        **SMALL,
    )
    wrapper = kd_models.build_wrapper(cfg)
    head = wrapper.heads["SDF"]
    channels = {"mobilenetv2_100": 320, "mobilenetv3_small_050": 288}[name]
    assert head.adapters["res5"].weight.shape == (512, channels, 1, 1)
    batch = kd_models.make_batch(((50, 131), (97, 64)), teacher_scale=scale)
    with EventStorage(0):
        ctx, _ = wrapper.observe(batch)
        student, teacher, mask = head.stage_pair(ctx, "res5")
        loss = wrapper.imitate(ctx)["loss_kd_sdf"]
    grid = tuple(side // 32 for side in ctx.canvas)
    assert student.shape == (2, channels, *grid) and teacher.shape == (2, 512, *grid)
    assert mask.shape == (2, 1, *grid)
    assert mask.sum((1, 2, 3)).tolist() == [2 * 5, 4 * 2]
    loss.backward()
    assert loss.isfinite() and 0 < loss < 2
    for parameter in head.parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all()


def test_the_teachers_cells_are_averaged_inside_of_its_image(teachers):
    cfg = kd_models.distill_cfg(
        teachers["RetinaNet"], heads=("SDF",), KD__TEACHER__INPUT_SCALE=2.0, **SMALL
    )
    wrapper = kd_models.build_wrapper(cfg)
    head = wrapper.heads["SDF"]
    with EventStorage(0):
        ctx, _ = wrapper.observe(kd_models.make_batch(((70, 40),), teacher_scale=2.0))
    fine = ctx.teacher_outputs["bottom_up"]["res5"]
    _, found, mask = head.stage_pair(ctx, "res5")
    assert fine.shape[-2:] == (8, 8) and found.shape[-2:] == (4, 4)
    # 140 x 80 pixels: 5 x 3 of the teacher's cells, 3 x 2 of the student's
    assert mask[0, 0].nonzero().tolist() == [[y, x] for y in range(3) for x in range(2)]
    for y, x in itertools.product(range(4), range(4)):
        block = fine[0, :, 2 * y : min(2 * y + 2, 5), 2 * x : min(2 * x + 2, 3)].flatten(1)
        expected = block.mean(1) if block.numel() else torch.zeros(512)
        torch.testing.assert_close(found[0, :, y, x], expected)


def test_a_run_resumes_to_the_bit_with_its_average(tmp_path, monkeypatch):
    """Double resolution, accumulated steps, a checkpoint in the middle."""
    monkeypatch.setattr(evaluation, "evaluate", lambda cfg, model: {"bbox": {"AP": 1.0}})
    toy_data.register_noise(tmp_path, "noise_sdf")
    toy = {"MODEL__BACKBONE__NAME": "build_toy_fpn_backbone"}
    teacher = kd_models.write_teacher(tmp_path, kd_models.tiny_cfg(**toy))

    def start(folder, resume=False, seed=0):
        settings = {
            **toy,
            **SMALL,
            "DATASETS__TRAIN": ("noise_sdf",),
            "DATASETS__TEST": (),
            "INPUT__MIN_SIZE_TRAIN": (32, 48),
            "INPUT__MAX_SIZE_TRAIN": 64,
            "SOLVER__MAX_ITER": 6,
            "SOLVER__CHECKPOINT_PERIOD": 2,
            "SOLVER__ACCUM_STEPS": 2,
            "SEED": 11,
            "OUTPUT_DIR": str(tmp_path / folder),
            "KD__TEACHER__INPUT_SCALE": 2.0,
            "KD__SDF__EMA_DECAY": 0.5,
            "KD__LOG_PERIOD": 2,
        }
        torch.manual_seed(seed)
        trainer = DistillTrainer(kd_models.distill_cfg(teacher, heads=("SDF",), **settings))
        trainer.resume_or_load(resume)
        return trainer

    straight = start("straight")
    initial = {k: v.clone() for k, v in straight._unwrapped.heads.state_dict().items()}
    straight.train()
    interrupt(start("broken"), at=5)  # the last checkpoint is that of iteration 3
    torch.manual_seed(123)
    resumed = start("broken", resume=True, seed=99)
    assert resumed.start_iter == 4
    resumed.train()
    expected = straight._unwrapped.heads.state_dict()
    found = resumed._unwrapped.heads.state_dict()
    assert found.keys() == expected.keys()
    moved = [name for name, value in expected.items() if not torch.equal(value, initial[name])]
    assert any("targets.res5.middle.weight" in name for name in moved)
    assert any("first_spread" in name for name in moved)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    theirs = straight.student.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in resumed.student.state_dict().items())
    saved = torch.load(tmp_path / "broken" / "model_final.pth", weights_only=True)
    assert set(saved["model"]) == set(theirs), "the student as it is deployed"
    optimized = resumed.optimizations["student"].optimizer.param_groups
    ids = {id(p) for group in optimized for p in group["params"]}
    assert ids == {id(p) for p in resumed._unwrapped.parameters() if p.requires_grad}
    assert not ids & {id(p) for p in resumed._unwrapped.heads["SDF"].targets.parameters()}


CASE = GradientCase("SDF", {"EMBED_DIM": 8, "EMA_DECAY": 0.5, "WEIGHT": 1.0})


def average_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = "file://" + os.path.join(folder, "rendezvous")
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(SIZES))
    torch.manual_seed(rank)
    step = Step(CASE)
    with torch.no_grad():  # built differently, as with a seed for each rank
        for value in step.head.parameters():
            value.add_(rank)
    model = DistributedDataParallel(step, broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for iteration in range(3):
        images, ctx = batch_of([rank], CASE)
        ctx.iteration = iteration
        optimizer.zero_grad()
        sum(model(images, ctx)).backward()
        optimizer.step()
    torch.save(step.head.state_dict(), os.path.join(folder, f"head{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.ddp
def test_ranks_have_the_same_average(tmp_path):
    run_ranks(average_on_rank, str(tmp_path), count=len(SIZES))
    one, other = (
        torch.load(tmp_path / f"head{rank}.pt", weights_only=True) for rank in range(len(SIZES))
    )
    targets = [name for name in one if name.startswith("targets.")]
    assert targets
    for name in one:
        if name != "first_spread":  # of each process's own batch
            assert torch.equal(one[name], other[name]), name
    own = {name: one[name.replace("targets.", "decouplers.")] for name in targets}
    assert any(not torch.equal(one[name], value) for name, value in own.items())
