"""Numbers that all processes of a run share."""

from __future__ import annotations

import torch
from detectron2.utils import comm


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes (itself in a single one); carries no gradient.

    A loss divided by the mean of the processes' normalisers has, after DDP has averaged gradients,
    the gradient of the sum over all processes divided by the sum of the normalisers.
    """
    if comm.get_world_size() == 1:
        return value.detach()
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total / comm.get_world_size()
