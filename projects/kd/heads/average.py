"""Moving averages of modules that train, for heads that keep a slower copy."""

from __future__ import annotations

import torch
from torch import nn


class MovingAverage:
    """``average <- decay * average + (1 - decay) * own``, once an iteration.

    When an iteration first comes by, not once a batch: an accumulated step counts once. The very
    first call finds equal values and changes nothing, and after a resume the first call does what
    the interrupted run would have done, so no counter has to be saved.

    Args:
        decay: in [0, 1).
    """

    def __init__(self, decay: float):
        self.decay = decay
        self._taken_at: int | None = None

    @torch.no_grad()
    def update(self, averages: nn.Module, own: nn.Module, iteration: int) -> None:
        """Take the last optimizer step into the averages; buffers are copied.

        Args:
            averages: changed in place; of the structure of ``own``.
            own: the modules that train.
            iteration: of the step.
        """
        if self._taken_at == iteration:
            return
        self._taken_at = iteration
        pairs = list(averages.parameters()), list(own.parameters())
        torch._foreach_lerp_(*pairs, 1.0 - self.decay)
        for mine, theirs in zip(averages.buffers(), own.buffers(), strict=True):
            mine.copy_(theirs)
