"""Starting the processes of a run: detectron2's flags, or the environment that torchrun sets.

``--num-gpus N`` starts N processes on this machine: one a GPU with NCCL, or, on a machine without
GPUs, N processes on the CPU with gloo.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT, default_argument_parser
from detectron2.engine import launch as launch_processes
from detectron2.utils import comm
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessException

from ..arguments import fail
from ..errors import ConfigError, Stopped, UserError, disk_line
from ..stopping import NOT_TRAINING, passed_on, stop_at_once

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """detectron2's flags; a single machine picks a free port by itself."""
    parser = default_argument_parser(epilog)
    parser.set_defaults(dist_url="auto")
    parser.error = lambda message: fail(parser, message)
    return parser


def launch_training(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Run ``main(args)`` in every process of the run.

    Under torchrun this process is one of them. Otherwise ``args.num_gpus`` processes are started
    when there is more than one in all, as detectron2 does. A user error in any of the started
    processes ends them all and is raised here once.

    Args:
        main: importable function.
        args: with detectron2's ``num_gpus``, ``num_machines``, ``machine_rank``, ``dist_url``.

    Raises:
        ConfigError: flags or environment that cannot work.
        Stopped: a signal has ended the run.
        UserError: what a started process raised.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _run_under_torchrun(main, args)
        return
    gpus = torch.cuda.device_count()
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ConfigError("--num-gpus and --num-machines must be at least 1")
    if gpus and args.num_gpus > gpus:
        raise ConfigError(f"--num-gpus {args.num_gpus}: this machine has {gpus}")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ConfigError("--dist-url: several machines need tcp://HOST:PORT of machine 0")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(f"--machine-rank {args.machine_rank}: --num-machines is too small")
    if args.num_gpus * args.num_machines == 1:
        with stop_at_once():
            main(args)
        return
    ends = get_context("spawn").SimpleQueue()
    with passed_on() as received:
        try:
            launch_processes(
                _run_spawned,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args, ends),
            )
        except ProcessException:
            if received():  # before training began
                raise Stopped(received(), NOT_TRAINING) from None
            if ends.empty():
                raise
            raise UserError(ends.get()) from None
        if not ends.empty():
            raise Stopped(ends.get(), "see above", told=True)


def _run_spawned(main, args, ends) -> None:
    """``ends`` takes the line of a user error, or the signal after which all have stopped."""
    _share_cores(args.num_gpus)
    try:
        with stop_at_once():
            main(args)
    except Stopped as stop:
        if not stop.told:  # not training: the other processes may wait for this one
            os._exit(stop.code)
        if comm.get_local_rank() == 0:
            ends.put(stop.signum)
    except Exception as error:
        line = str(error) if isinstance(error, UserError) else disk_line(error)
        if line is None:
            raise
        ends.put(line)
        sys.stdout.flush()
        os._exit(2)  # at once: other processes may wait for this one in a collective


def _run_under_torchrun(main, args) -> None:
    missing = [name for name in _TORCHRUN if name not in os.environ]
    if missing:
        raise ConfigError(f"environment variable {missing[0]} is not set: start with torchrun")
    if int(os.environ["WORLD_SIZE"]) == 1:
        with stop_at_once():
            main(args)
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
    with stop_at_once():
        main(args)
    dist.destroy_process_group()


def _share_cores(processes: int) -> None:
    """Processes on one CPU divide its cores; by default each would use all of them."""
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
