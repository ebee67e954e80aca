"""Several processes: the model in DistributedDataParallel, and which parameters it waits for."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ..config import LazyNode
from ..config.lazy_files import select
from ..errors import ConfigError
from ..weights.files import modules_in

logger = logging.getLogger(__name__)

FIND_UNUSED = "SOLVER.DDP_FIND_UNUSED_PARAMETERS"


def wrap_ddp(cfg: CfgNode, model: nn.Module, idle: Iterable[str] = ()) -> nn.Module:
    """The model in DistributedDataParallel if there are several processes (NCCL or gloo).

    Buffers are not broadcast in training, as in detectron2: each process keeps its own running
    statistics.

    Args:
        cfg: SOLVER.DDP_FIND_UNUSED_PARAMETERS is read, of a LazyConfig all of ``train.ddp``.
        model: the training model.
        idle: names of parameters without a gradient in this process, of :func:`idle_parameters`.
            If any process has one, DDP looks in every step which gradients will come, whatever the
            config says: it would wait for the others for ever. Named in one line.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    if not on_gpu and torch.distributed.get_backend() == "nccl":
        raise ConfigError(
            "MODEL.DEVICE cpu with several processes on a machine with GPUs: set the environment "
            'variable CUDA_VISIBLE_DEVICES=""'
        )
    anywhere = sorted(set().union(*comm.all_gather(list(idle))))
    look = cfg.SOLVER.DDP_FIND_UNUSED_PARAMETERS
    if anywhere and not look:
        logger.info(
            f"{FIND_UNUSED}: taken as True, since the first batch gives no gradient to "
            f"{len(anywhere)} parameters: {modules_in(anywhere)}"
        )
    own = select(cfg.lazy, "train.ddp") or {} if isinstance(cfg, LazyNode) else {}
    wrapped = DistributedDataParallel(
        model,
        device_ids=[comm.get_local_rank()] if on_gpu else None,
        broadcast_buffers=bool(own.get("broadcast_buffers", False)),
        find_unused_parameters=look or bool(anywhere),
        gradient_as_bucket_view=True,
    )
    if own.get("fp16_compression", False):
        wrapped.register_comm_hook(state=None, hook=fp16_compress_hook)
    return wrapped


def idle_parameters(model: nn.Module) -> list[str]:
    """Names of the trainable parameters that the last backward pass gave no gradient."""
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def unexpectedly_idle(model: nn.Module) -> list[str]:
    """:func:`idle_parameters` for whose gradients DDP waits in vain; [] for any other model."""
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters:
        return []
    return idle_parameters(model.module)
