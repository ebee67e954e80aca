"""When and how strongly a distillation loss acts."""

from __future__ import annotations

from dataclasses import dataclass

from .config import INHERIT, PROPORTIONAL

SHARES = {"START_ITER": 3, "WARMUP_ITERS": 90}  # of SOLVER.MAX_ITER, where PROPORTIONAL


@dataclass(frozen=True)
class Ramp:
    """Factor of a head's losses: 0, a linear ramp, 1, and 0 again.

    The factor multiplies the loss; the head itself runs in every iteration, because with DDP a
    parameter that drops out of the graph stalls the reducer (ours).

    Attributes:
        start: the first iteration with effect.
        warmup: iterations of the ramp; iteration ``start`` has factor ``1 / (warmup + 1)`` and
            ``start + warmup`` has 1.
        end: the first iteration without effect, or -1.
    """

    start: int = 0
    warmup: int = 0
    end: int = -1

    def __call__(self, iteration: int) -> float:
        """The factor in [0, 1] at an iteration counted from 0."""
        if iteration < self.start or (0 <= self.end <= iteration):
            return 0.0
        return min(1.0, (iteration - self.start + 1) / (self.warmup + 1))


def build_ramp(cfg, head: str) -> Ramp:
    """The schedule of a head: the values of KD.<HEAD>, the common ones where it inherits.

    Where the head's START_ITER or WARMUP_ITERS is ``PROPORTIONAL`` it is SOLVER.MAX_ITER over 3 or
    90, rounded.
    """
    node = cfg.KD.get(head.upper(), {})

    def value(key: str) -> int:
        own = node.get(key, INHERIT)
        if own == PROPORTIONAL and key in SHARES:
            return round(cfg.SOLVER.MAX_ITER / SHARES[key])
        return cfg.KD[key] if own == INHERIT else own

    return Ramp(value("START_ITER"), value("WARMUP_ITERS"), value("END_ITER"))
