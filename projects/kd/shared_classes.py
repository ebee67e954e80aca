"""Classes that a student shares with its teacher (KD.TEACHER.CLASS_MAP), in the student's order.

The teacher's class layers are narrowed to these when it is built (``modeling/class_layers.py``), so
all that it says is about them, in this order. What is left is the student's side: a head compares
its logits of these classes, and leaves out what ground truth assigns to another.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SharedClasses:
    """Which of the student's K classes the teacher knows, K' of them.

    Attributes:
        known: their indices, ascending; None = all, and every method gives back what it gets.
        total: K; not read where all are known.
    """

    known: tuple[int, ...] | None = None
    total: int = 0

    def number(self, classes: int) -> int:
        """K', of K."""
        return classes if self.known is None else len(self.known)

    def logits(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """Of K values along a dimension those of classes that the teacher knows."""
        if self.known is None:
            return values
        return values.index_select(dim, _on(values.device, self.known))

    def of_anchors(self, values: torch.Tensor) -> torch.Tensor:
        """(N, A * K, H, W) to (N, A * K', H, W), channel ``a * K + k``."""
        if self.known is None:
            return values
        return self.logits(values.unflatten(1, (-1, self.total)), 2).flatten(1, 2)

    def with_background(self, values: torch.Tensor) -> torch.Tensor:
        """(R, K + 1) to (R, K' + 1), background last.

        Ours: a softmax over them is that over K + 1, made to sum to 1 over what the teacher knows,
        so that the logits of other classes get no gradient.
        """
        if self.known is None:
            return values
        return values.index_select(1, _on(values.device, (*self.known, self.total)))

    def widened(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse of :meth:`logits`: K values, 0 of classes that the teacher does not know."""
        if self.known is None:
            return values
        shape = [*values.shape]
        shape[dim] = self.total
        return values.new_zeros(shape).index_copy(dim, _on(values.device, self.known), values)

    def of_all_anchors(self, values: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`of_anchors`, 0 of classes that the teacher does not know."""
        if self.known is None:
            return values
        split = values.unflatten(1, (-1, len(self.known)))
        return self.widened(split, 2).flatten(1, 2)

    def regions(self, classes: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Regions whose assigned class the teacher knows, or that are background.

        Args:
            classes: (R,) in [0, K], K = background.
            *values: (R, ...).

        Returns:
            Their classes in [0, K'], K' = background, and the rows of the values.
        """
        if self.known is None:
            return classes, *values
        rows = ~self.lacking(classes)
        return self.places(classes[rows]), *(x[rows] for x in values)

    def lacking(self, classes: torch.Tensor) -> torch.Tensor:
        """Bool of ground truth's class indices: those that the teacher does not know.

        False for what is no class (K = background, -1 = ignored).
        """
        if self.known is None:
            return torch.zeros_like(classes, dtype=torch.bool)
        others = tuple(sorted(set(range(self.total)) - set(self.known)))
        return torch.isin(classes, _on(classes.device, others))

    def places(self, classes: torch.Tensor) -> torch.Tensor:
        """Indices in [0, K] to those in [0, K'], K = background; classes it lacks: any."""
        if self.known is None:
            return classes
        table = {k: place for place, k in enumerate((*self.known, self.total))}
        every = tuple(table.get(k, 0) for k in range(self.total + 1))
        return _on(classes.device, every)[classes]

    def own(self, places: torch.Tensor) -> torch.Tensor:
        """Indices in [0, K') to the student's."""
        return places if self.known is None else _on(places.device, self.known)[places]


@functools.lru_cache(maxsize=64)
def _on(device: torch.device, values: tuple[int, ...]) -> torch.Tensor:
    """Indices on a device; copied there once."""
    return torch.tensor(values, dtype=torch.long, device=device)


ALL = SharedClasses()
