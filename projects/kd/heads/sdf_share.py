"""How much of the fall of SDF's loss is the work of SDF's own modules, and not of the student."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping

import torch
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)

ABSORBED = 0.9  # share of the modules from which on a warning says so
FALLEN = 0.5  # of its first value: before, a loss says too little
IN_A_ROW = 5  # logged steps with such a share until the warning


class ModuleShare(nn.Module):
    """Splits the fall of a loss L(modules, student) between the two.

    From one logged step to the next the modules go from m to m' and the student from s to s'. On
    the batch of the later step

        L(m, s) - L(m', s') = [L(m, s) - L(m, s')] + [L(m, s') - L(m', s')]

    the second bracket is what the modules did, features as they are; it is measured, by the modules
    as they were a logged step ago. A batch that neither has been trained on keeps it unbiased. The
    share is the sum of these brackets over the loss's fall since the first logged step; the rest is
    the change of the student's features, whatever caused it. When nothing reaches the student (its
    features enter detached and stay) the share is 1. It goes by the way that training took: modules
    might have done the student's part too, which a run with KD.SDF.DETACH tells.

    Costs one more pass of the modules without gradient in steps that log, and a copy of them.

    Args:
        modules: those that train, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        # parameters in no optimizer, saved: a resumed run goes on with the same sums
        self.before = copy.deepcopy(nn.ModuleDict(modules)).requires_grad_(False)
        self.register_buffer("first", torch.full((), -1.0))  # below 0 = none yet
        self.register_buffer("explained", torch.zeros(()))
        self._in_a_row = 0
        self._warned = False

    @torch.no_grad()
    def take(
        self,
        modules: Mapping[str, nn.Module],
        loss: torch.Tensor,
        again: Callable[[nn.ModuleDict], torch.Tensor],
    ) -> float | None:
        """Take a logged step in.

        Args:
            modules: as they are now.
            loss: the step's, not weighted.
            again: the same loss by the modules that it is given.

        Returns:
            The share, None in the first step and while the loss has not fallen.
        """
        share = None
        if self.first < 0:
            self.first.copy_(loss)
        else:
            self.explained += again(self.before) - loss
            fall = (self.first - loss).item()
            share = self.explained.item() / fall if fall > 0 else None
        for name, module in modules.items():
            self.before[name].load_state_dict(module.state_dict())
        return share

    def warn(self, share: float | None, loss: torch.Tensor) -> None:
        """Say once that the student has no part in a loss that has fallen by half."""
        absorbed = share is not None and share > ABSORBED and bool(loss < FALLEN * self.first)
        self._in_a_row = self._in_a_row + 1 if absorbed else 0
        if self._in_a_row >= IN_A_ROW and not self._warned and comm.is_main_process():
            self._warned = True
            logger.warning(
                "KD.SDF: its own modules made %.0f %% of the fall of loss_kd_sdf (at weight 1 from "
                "%.3g to %.3g): it says nothing about the student (lower KD.SDF.LR_FACTOR and "
                "KD.ADAPTER.LR_FACTOR, or KD.SDF.TEACHER_SDF 'frozen'; KD.SDF.DETACH True is the "
                "control)",
                100 * share,
                self.first.item(),
                loss.item(),
            )
