"""Inputs of the golden numbers of BCKD, CrossKD, DIST and LD: sequences over C-order indices."""

from __future__ import annotations

import math

import torch


def index(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).view(shape)


def student_logits(*shape: int) -> torch.Tensor:
    return 2 * torch.sin(0.7 * index(*shape) + 0.3) - 1.5


def target_logits(*shape: int) -> torch.Tensor:
    return 3 * torch.cos(0.45 * index(*shape) - 0.6) - 2


def dense_logits():
    """(2, 2, 3, 4, 5) of both sides."""
    shape = (2, 6, 4, 5)
    return tuple(x(*shape).unflatten(1, (2, 3)) for x in (student_logits, target_logits))


PREDICTIONS = (2, 2, 4, 5)  # N, A, H, W of dense_logits


def dense_labels():
    """counted and positive (2, 2, 4, 5)."""
    place = index(*PREDICTIONS).long()
    counted = place % 7 != 3
    return counted, (place % 11 == 0) & counted


def dense_boxes():
    """XYXY (2, 2, 4, 5, 4) of both sides, on a level of stride 8."""
    j = index(*PREDICTIONS)
    rows = torch.arange(4, dtype=torch.float64).view(4, 1)
    columns = torch.arange(5, dtype=torch.float64)
    x = 8 * columns + 4 + 2 * torch.sin(0.9 * j)
    y = 8 * rows + 4 + 2 * torch.cos(0.8 * j)
    width, height = 14 + 6 * torch.sin(0.3 * j + 0.2), 12 + 5 * torch.cos(0.4 * j - 0.1)
    target = _corners(
        x + 1.5 * torch.cos(0.6 * j),
        y - 1.2 * torch.sin(0.7 * j),
        width * (1 + 0.2 * torch.sin(1.1 * j)),
        height * (1 + 0.15 * torch.cos(0.5 * j)),
    )
    return _corners(x, y, width, height), target


def _corners(x, y, width, height):
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=-1)


def bins():
    """Logits of five bins a side, (2, 4, 5, 3, 4) of both sides."""
    i = index(2, 20, 3, 4)
    student, target = 1.5 * torch.sin(0.31 * i + 0.2), 2 * torch.cos(0.29 * i - 0.4)
    return student.unflatten(1, (4, 5)), target.unflatten(1, (4, 5))


def cell(row: int) -> tuple[int, int, int]:
    """(n, h, w) of the row-th of the cells of :func:`bins`."""
    return row // 12, row % 12 // 4, row % 4
