"""DKD: decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679).

Shapes: R regions, K classes and the background.
"""

from __future__ import annotations

import torch

from .precision import full_precision


@full_precision
def dkd_loss(
    student: torch.Tensor,
    target: torch.Tensor,
    classes: torch.Tensor,
    alpha: float = 1.0,
    beta: float = 0.25,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Divergence of "this class or another" and, apart from it, of the other classes.

    ::

        T^2 / R sum_r [ alpha KL([p_y, 1 - p_y]^T || ^S) + beta KL(q^T || q^S) ]

    p = softmax(z / T), y the assigned class (background is one), q the softmax over all classes
    but y. Formulas as in the released code, which was executed on the inputs of the tests.
    Departure (ours): it takes logarithms of probabilities, infinite where one underflows, and
    leaves y out of q by subtracting 1000; here ``log p_y = z_y - lse(z)`` and ``log (1 - p_y) =
    lse of the others - lse(z)``, exact at any logits. With two columns the second term is 0.

    Args:
        student, target: (R, K + 1) logits; the target gets no gradient.
        classes: (R,) int64, y in [0, K].
        alpha, beta: factors of the two terms.
        temperature: T.

    Returns:
        Scalar >= 0, 0 for equal logits and without regions.
    """
    own = torch.nn.functional.one_hot(classes, student.shape[1]).bool()
    ours = _split(student / temperature, own)
    theirs = _split(target.detach() / temperature, own)
    binary = sum(t.exp() * (t - s) for s, t in zip(ours[:2], theirs[:2], strict=True))
    # KL(q_t || q_s) = sum_k q_t (log q_t - log q_s) over k other than y
    others = (theirs[2].exp() * (theirs[2] - ours[2])).masked_fill(own, 0.0).sum(1)
    return (alpha * binary + beta * others).sum() * (temperature**2 / max(len(student), 1))


def _split(logits, own):
    """log p_y (R,), log (1 - p_y) (R,), and log q (R, K + 1) with any value at y."""
    every = logits.logsumexp(1)
    others = logits.masked_fill(own, float("-inf")).logsumexp(1)
    at_class = logits.masked_fill(~own, 0.0).sum(1)
    # 0 at y, where exp of anything could be infinite
    rest = (logits - others[:, None]).masked_fill(own, 0.0)
    return at_class - every, others - every, rest
