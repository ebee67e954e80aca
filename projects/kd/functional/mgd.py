"""MGD: masked generative distillation (Yang et al., ECCV 2022, arXiv 2205.01529).

Shapes: N images, C channels, (H, W) cells of a level. Formulas as in the released code, which was
executed on the inputs of the tests.
"""

from __future__ import annotations

import torch

from .precision import full_precision


def random_cells(like: torch.Tensor, ratio: float) -> torch.Tensor:
    """(N, 1, H, W) bool, False with probability ``ratio``, the same for all channels.

    Drawn on the device from torch's generator, which every step seeds, so that a resumed run draws
    what the uninterrupted one would have (published code draws on the CPU).

    Args:
        like: (N, C, H, W), for size and device.
        ratio: lambda, in [0, 1].
    """
    shape = (len(like), 1, *like.shape[-2:])
    return torch.rand(shape, device=like.device) >= ratio


@full_precision
def mgd_loss(
    generated: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """``1/N sum_{n,c,x} (G(M * S) - T)^2``, a bare sum over channels and cells.

    Every cell counts, masked by M or not, as published. Computed in fp32: sums reach 1e7.

    Args:
        generated: (N, C, H, W), the generator's output for the masked student.
        teacher: (N, C, H, W); gets no gradient.
        mask: (N, 1, H, W) bool, cells outside take no part (ours); None = all, as published.
    """
    teacher = teacher.detach()
    if mask is not None:  # what lies outside may be infinite
        generated, teacher = (torch.where(mask, x, 0.0) for x in (generated, teacher))
    # not mse_loss, whose gradient is a map in another order of memory
    return (generated - teacher).square().sum() / len(generated)
