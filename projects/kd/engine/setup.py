"""The start of a run: its folder, its logs, its random numbers."""

from __future__ import annotations

import argparse
import logging

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng

from ..files import writable_folder
from .writers import start_logs

logger = logging.getLogger(__name__)


def start_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """What detectron2's ``default_setup`` does, without config.yaml, which waits until it is used.

    Args:
        cfg: the full config, checked.
        args: of the command line, for the log.

    Raises:
        ConfigError: OUTPUT_DIR cannot be written.
    """
    writable_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    rank = comm.get_rank()
    start_logs(cfg.OUTPUT_DIR, rank)
    logger.info(f"Rank of current process: {rank}. World size: {comm.get_world_size()}")
    logger.info(f"Environment info:\n{collect_env_info()}")
    logger.info(f"Command line arguments: {args}")
    if not args.eval_only:
        logger.info(f"Running with full config:\n{cfg.dump()}")
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
