"""What two processes do with each family of shipped configs: two steps of the real loop."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from kd_detectors import full_batch

from projects.kd import load_config
from projects.kd.engine.processes import wrap_ddp
from projects.kd.engine.trainer import DistillTrainer

ROOT = Path(__file__).resolve().parents[2]
DETECTORS = (
    *("retinanet", "fcos", "gfl", "reppoints", "faster_rcnn", "cascade_rcnn", "mask_rcnn"),
    *("keypoint_rcnn", "panoptic_fpn", "semseg", "conditional_detr"),
)
CONFIGS = (
    *(f"shapes/{name}_student" for name in DETECTORS),
    "shapes/retinanet_student_cwd",
    "shapes/conditional_detr_student_d3etr",
    "Cityscapes/PSPNet_MobileNetV2",
    "Cityscapes/DeepLabV3plus_R18",
)
MIXED = "shapes/retinanet_student_cwd, unlabelled"  # beside another image, without labels
CACHED = "shapes/retinanet_student_cwd, cached"  # the second step finds the teacher's answers
CASES = (*CONFIGS, MIXED, CACHED)
SIZES = (((64, 96),), ((96, 64),))  # of each rank's image
CROP = (64, 64)


def config(name: str, folder: str):
    """A shipped config for images of some 64 pixels, on a CPU, without files."""
    cfg = load_config(str(ROOT / f"configs/{name}.yaml"))
    cfg.OUTPUT_DIR = folder
    cfg.SEED = 5
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = cfg.MODEL.TIMM.WEIGHTS = ""
    cfg.MODEL.TIMM.PRETRAINED = False
    if cfg.MODEL.TIMM.NORM == "SyncBN":  # needs GPUs
        cfg.MODEL.TIMM.NORM = "BN"
    for node in (cfg.MODEL.RESNETS, cfg.MODEL.SEM_SEG_HEAD):
        node.NORM = node.NORM.replace("SyncBN", "BN")
    cfg.INPUT.CROP.SIZE = list(CROP)
    teacher = cfg.KD.TEACHER
    teacher.CONFIG_FILE = teacher.CONFIG_FILE and str(ROOT / teacher.CONFIG_FILE)
    teacher.WEIGHTS, teacher.ALLOW_MISSING = "", True
    return cfg


def gradients(model) -> dict:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def mean_over_ranks(gradient, parameter):
    """The gradient that DDP has to give; None where no rank has one."""
    seen = torch.tensor(float(gradient is not None))
    dist.all_reduce(seen)
    total = torch.zeros_like(parameter) if gradient is None else gradient.clone()
    dist.all_reduce(total)
    return total / comm.get_world_size() if seen else None


def two_steps(name: str, folder: str) -> dict:
    """What there is to compare of a config."""
    torch.manual_seed(comm.get_rank())  # DDP has to make the weights equal
    cfg = config(name.partition(",")[0], folder)
    cfg.KD.TEACHER.CACHE = "ram" if name == CACHED else "off"
    loop = DistillTrainer(cfg)._trainer
    # these train on crops of one size, and their BatchNorm on a 1x1 grid needs two
    sizes = (CROP, CROP) if name.startswith("Cityscapes") else SIZES[comm.get_rank()]
    batch = full_batch(sizes, seed=comm.get_rank())
    if name == MIXED:
        image = full_batch(SIZES[1 - comm.get_rank()], seed=7 + comm.get_rank())[0]["image"]
        batch.append({"image": image, "unlabeled": True})
    loop.clips = {}  # they would change the gradients that are compared
    loop.data_loader = itertools.repeat(batch)
    loop.distribute(functools.partial(wrap_ddp, cfg))
    model = loop.model.module
    alone = copy.deepcopy(model)
    with EventStorage(0):
        loop._seed(0)
        sum(loop._losses(alone, batch).values()).backward()
    parameters, ran = dict(model.named_parameters()), []
    if hasattr(model, "teacher"):
        model.teacher.model.backbone.register_forward_hook(lambda *_: ran.append(1))
    expected = {n: mean_over_ranks(g, parameters[n]) for n, g in gradients(alone).items()}
    with EventStorage(0) as storage:
        loop.run_step()
        found = {n: None if g is None else g.clone() for n, g in gradients(model).items()}
        loop.iter = storage.iter = 1
        loop.run_step()  # DDP complains here of what it missed in the first
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    main = weights.clone()
    dist.broadcast(main, 0)
    return {
        "teacher_ran": len(ran),
        "finds": loop.model.find_unused_parameters,
        "idle": sorted(n for n, g in expected.items() if g is None),
        "idle_found": sorted(n for n, g in found.items() if g is None),
        "errors": {
            n: ((found[n] - g).abs().max() / (g.abs().max() + 1e-6)).item()
            for n, g in expected.items()
            if g is not None and found[n] is not None
        },
        "same": torch.equal(weights, main),
        "learnt": max(g.abs().max().item() for g in expected.values() if g is not None),
    }


def run_rank(rank: int, folder: str) -> None:
    """All configs on one of two processes; writes what it saw to ``folder``."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    address = "file://" + os.path.join(folder, "rendezvous")
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(SIZES))
    comm.create_local_process_group(len(SIZES))
    seen = {name: two_steps(name, folder) for name in CASES}
    torch.save(seen, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()
