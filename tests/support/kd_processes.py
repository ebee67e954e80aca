"""Starts the processes of a test that has several ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.multiprocessing import start_processes


def run_ranks(function: Callable, *args, count: int = 2) -> None:
    """Run ``function(rank, *args)`` in ``count`` processes; what one of them raises is raised here.

    They are forks of this one, which has imported all that they need: another start costs seconds
    a process. torch refuses that after a backward pass where there is a GPU.
    """
    method = "spawn" if torch.cuda.is_available() else "fork"
    start_processes(function, args=args, nprocs=count, start_method=method)
