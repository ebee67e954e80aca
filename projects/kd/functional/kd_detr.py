"""KD-DETR: consistent distillation points (Wang et al., CVPR 2024, arXiv 2211.08071).

Shapes: L decoder layers, N images, Q queries, K classes, D numbers of a query; boxes (centre x,
centre y, width, height) as shares of the image. Formulas as in the authors' DAB-DETR release, which
was executed on the inputs of the tests.
"""

from __future__ import annotations

import torch

from .precision import full_precision
from .set_prediction import box_losses

TEMPERATURE = 10.0  # of the class term, as published
IMAGES = 8  # a process had so many when the weights were published
LAWS = ("teacher", "normal")


@full_precision
def kd_detr_loss(
    student_logits: torch.Tensor,
    student_boxes: torch.Tensor,
    teacher_logits: torch.Tensor,
    teacher_boxes: torch.Tensor,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    query_weight: str = "teacher_max_prob",
) -> torch.Tensor:
    """Difference of the predictions for the same queries, in the published form.

    ::

        class_weight * 8/N sum_{n,q} w T^2 mean_k KL(softmax(z_t / T) || softmax(z_s / T))
        + l1_weight * sum w mean_4 |b_s - b_t| / sum w + giou_weight * sum w (1 - GIoU) / sum w

    T = 10, w the teacher's highest class probability (or 1), ``mean_k`` the elements of the
    divergence over the number of classes. Departure (ours): the published class term is a bare sum
    over images and queries; 8/N, its images a process, keeps its weight at any batch.

    Args:
        student_logits, teacher_logits: (..., N, Q, K), query by query; ... are layers.
        student_boxes, teacher_boxes: (..., N, Q, 4).
        class_weight, l1_weight, giou_weight: as above.
        query_weight: "teacher_max_prob" or "uniform".

    Returns:
        (...), 0 for equal inputs up to rounding; the teacher gets no gradient.
    """
    teacher_logits, teacher_boxes = teacher_logits.detach(), teacher_boxes.detach()
    weights = teacher_logits.amax(-1).sigmoid()
    if query_weight == "uniform":
        weights = torch.ones_like(weights)
    student, teacher = ((x / TEMPERATURE).log_softmax(-1) for x in (student_logits, teacher_logits))
    divergence = (teacher.exp() * (teacher - student)).mean(-1)
    scale = TEMPERATURE**2 * IMAGES / student_logits.shape[-3]
    classes = scale * (weights * divergence).sum((-2, -1))
    distance, overlap = box_losses(student_boxes, teacher_boxes)
    each = l1_weight * distance / 4 + giou_weight * overlap
    boxes = (weights * each).sum((-2, -1)) / weights.sum((-2, -1)).clamp(min=1e-6)
    return class_weight * classes + boxes


@torch.no_grad()
def random_queries(embeddings: torch.Tensor, count: int, law: str = "teacher") -> torch.Tensor:
    """New queries for every step, from torch's generator, which the step seeds.

    KD-DETR draws points of four numbers from N(0, 1), which is how DAB-DETR's queries start. A
    query of Conditional DETR has D numbers, and those of a trained detector have a law of their
    own: ``e = m + s N(0, 1)``, m and s being mean and deviation of each number over the teacher's
    queries (ours: decoders never saw vectors off it).

    Args:
        embeddings: (Q, D), the teacher's queries.
        count: how many to draw.
        law: "teacher" as above, or "normal": N(0, 1).

    Returns:
        (count, D).
    """
    shape = (count, embeddings.shape[1])
    drawn = torch.randn(shape, device=embeddings.device, dtype=embeddings.dtype)
    if law == "normal":
        return drawn
    deviation, mean = torch.std_mean(embeddings, dim=0, correction=0)
    return mean + deviation * drawn
