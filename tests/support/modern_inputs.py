"""The deterministic inputs of the golden numbers of MGD, FGD, DKD, ReviewKD and KD-DETR."""

from __future__ import annotations

import torch
from modern_goldens import index


def sin(step, start, *shape: int, factor=1.0, plus=0.0) -> torch.Tensor:
    """``factor * sin(step * i + start) + plus`` in C order, float64."""
    return factor * torch.sin(step * index(*shape) + start) + plus


def cos(step, start, *shape: int, factor=1.0, plus=0.0) -> torch.Tensor:
    """``factor * cos(step * i + start) + plus`` in C order, float64."""
    return factor * torch.cos(step * index(*shape) + start) + plus


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student and teacher logits (6, 5) of regions, and their classes."""
    student, teacher = sin(0.7, 0.3, 6, 5, factor=2), cos(0.45, -0.6, 6, 5, factor=3)
    return student, teacher, torch.tensor([0, 3, 4, 1, 2, 4])
