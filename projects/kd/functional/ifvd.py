"""IFVD: intra-class feature variation (Wang et al., ECCV 2020).

Shapes: N images, C channels, (H, W) cells of a level, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .precision import full_precision


@full_precision
def ifvd_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared difference of the similarities between cells and their class's prototype.

    The prototype of a class is the mean vector of its cells within the image (sum / (count +
    1e-6)); a cell's similarity is its cosine with the prototype of its label. Gradients flow
    through the prototypes, as in the authors' code. A cell without a class is compared with itself
    there, so it adds 0 but is counted::

        1 / (N H W) * sum over cells of (cos_student - cos_teacher)^2

    Source: the paper's loss. Prototypes are one matrix product with one-hot labels (ours; the same
    numbers as a loop over classes).

    Args:
        student: (N, C, H, W).
        teacher: (N, C', H, W), no gradient; C' may differ from C.
        labels: (N, H, W) integers; whatever is not in 0..num_classes - 1 is no class.
        num_classes: K.
        mask: (N, 1, H, W) bool, cells outside are neither used nor counted; None = all cells.

    Returns:
        Scalar in [0, 4]; 0 when no cell has a class.
    """
    labels = labels.flatten(1).long()
    known = (labels >= 0) & (labels < num_classes)
    cells = labels.numel()
    if mask is not None:
        known &= mask.flatten(1)
        cells = mask.sum().clamp(min=1)
        student, teacher = (torch.where(mask, x, 0.0) for x in (student, teacher))
    index = labels.masked_fill(~known, num_classes)
    members = F.one_hot(index, num_classes + 1)[..., :num_classes].to(student.dtype)
    index = index.clamp(max=num_classes - 1)
    gap = _similarity(student, members, index) - _similarity(teacher, members, index)
    return gap.masked_fill(~known, 0.0).square().sum() / cells


def _similarity(values, members, index):
    """Cosine of each cell and the prototype of its label, (N, H*W)."""
    values = values.flatten(2)
    prototypes = values @ members / (members.sum(1, keepdim=True) + 1e-6)
    cosines = F.normalize(prototypes, dim=1, eps=1e-8).mT @ F.normalize(values, dim=1, eps=1e-8)
    return cosines.gather(1, index[:, None])[:, 0]


def resize_labels(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Nearest-neighbour resize of label maps (N, H, W) to ``size`` = (rows, columns).

    The cell (r, c) takes the pixel (floor(r H / rows), floor(c W / columns)).
    """
    return F.interpolate(labels[:, None].float(), size=tuple(size), mode="nearest")[:, 0].long()


def box_labels(
    boxes: torch.Tensor, classes: torch.Tensor, size: tuple[int, int], stride: float, rest: int
) -> torch.Tensor:
    """Label map of a level made of boxes: the class of the smallest box over a cell's centre.

    Ours, for detectors, which have no label maps. Every box counts on every level.

    Args:
        boxes: (G, 4) XYXY in pixels.
        classes: (G,) class indices.
        size: (rows, columns) of the level.
        stride: pixels between cells; cell (r, c) has its centre at ((c + 0.5), (r + 0.5)) strides.
        rest: label of the cells that no box covers.

    Returns:
        (rows, columns) int64.
    """
    rows, columns = size
    result = torch.full((rows, columns), rest, dtype=torch.long, device=boxes.device)
    if len(boxes) == 0:
        return result
    y = (torch.arange(rows, device=boxes.device) + 0.5) * stride
    x = (torch.arange(columns, device=boxes.device) + 0.5) * stride
    x1, y1, x2, y2 = boxes.T[..., None]
    inside = ((y >= y1) & (y < y2))[:, :, None] & ((x >= x1) & (x < x2))[:, None, :]
    area = ((x2 - x1) * (y2 - y1))[..., None].expand_as(inside)
    smallest, owner = area.masked_fill(~inside, float("inf")).min(0)
    return torch.where(smallest.isfinite(), classes.long()[owner], result)
