"""The distance of ICD (Kang et al., NeurIPS 2021) between values of student and teacher.

Shapes: L tokens (the valid cells of all levels of one image), M attention heads, d channels a head.
"""

from __future__ import annotations

import torch

from .precision import full_precision

LAYER_NORM_EPS = 1e-5
# A piece of work has at most this many elements: temporaries stay in the cache of a CPU core, and
# crowded images need no more memory than sparse ones.
PIECE = {"cpu": 2**18}
LARGE_PIECE = 2**23  # on devices that want large kernels


@full_precision
def value_distance(
    student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, center: bool = False
) -> torch.Tensor:
    """Weighted distance of values after a layer norm without affine of every token and head.

    ``mean_m sum_l w[m, l] e[m, l] / max(sum_l w[m, l], 1e-6)`` with
    ``e = mean over d of (norm(s) - norm(t))^2``, eps 1e-5. Up to eps, e is 2 (1 - r), r being
    Pearson's correlation over the d channels (derived): it lies in [0, 4] and scaling or
    shifting a token's values costs nothing. The eps makes it smaller by a
    relative ``eps / variance``, about.

    With ``center`` (ours) s and t are ``s[l] - mean over l' of s[l']`` and the same of t, head by
    head and channel by channel, before the norm. All L tokens count alike in the mean, whatever
    their level and weight, and it carries its gradient. What the values of all tokens have in
    common, most of them in detectors that were looked at, then costs nothing; CWD and PKD are blind
    to it too.

    The sum runs over pieces of tokens, forward and backward, with the gradient in closed form, so
    that no temporary of the size of the features exists (ours); ``center`` makes one for each side.

    Args:
        student: (L, M, d) with gradient.
        teacher: (L, M, d), receives no gradient.
        weights: (M, L), not negative, receive no gradient.
        center: take the mean over the tokens off.

    Returns:
        Scalar; 0 where all weights are 0. This is one image's normaliser, as in the PyTorch
        release; the MegEngine release divides by the sum over the batch.
    """
    teacher = teacher.detach()
    if center:
        student, teacher = _centred(student), _centred(teacher)
    return _ValueDistance.apply(student, teacher, weights.detach())


def token_distance(
    student: torch.Tensor, teacher: torch.Tensor, center: bool = False
) -> torch.Tensor:
    """(L, M) e of :func:`value_distance` for (L, M, d) values, to look at; no gradient."""
    with torch.no_grad():
        if center:
            student, teacher = _centred(student), _centred(teacher)
        return (_normalise(student)[0] - _normalise(teacher)[0]).square().mean(2)


def _centred(values: torch.Tensor) -> torch.Tensor:
    """(L, M, d) without their mean over L."""
    return values - values.mean(0, keepdim=True)


class _ValueDistance(torch.autograd.Function):
    """With s' and t' the normalised values and c = mean(s' t'): the gradient of e over s is
    ``2 / (d sigma_s) (s' (1 - mean(s'^2) + c) - t')``, a linear function of s and t."""

    @staticmethod
    def forward(ctx, student, teacher, weights):
        share = weights / (weights.sum(1, keepdim=True).clamp(min=1e-6) * len(weights))
        share = share.T[..., None].contiguous()
        total = student.new_zeros(())
        kept = []
        for part in _pieces(student):
            s, *ours = _normalise(student[part])
            t, *theirs = _normalise(teacher[part])
            distance = s.sub_(t).square_().mean(2, keepdim=True)
            total += torch.dot(distance.flatten(), share[part].flatten())
            kept.append(torch.cat([*ours, *theirs, distance], dim=2))
        ctx.save_for_backward(student, teacher, share, torch.cat(kept))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        student, teacher, share, kept = ctx.saved_tensors
        mean, inverse, mean_t, inverse_t, distance = kept.split(1, dim=2)
        # mean(s'^2) = 1 - eps / (var + eps), and distance = mean(s'^2) + mean(t'^2) - 2 c
        eps = LAYER_NORM_EPS
        along = (eps * (inverse_t.square() - inverse.square()) + distance) / 2  # mean(s'^2) - c
        factor = share * inverse * (gradient * (2 / student.shape[2]))
        of_student, of_teacher = factor * inverse * (1 - along), -factor * inverse_t
        constant = -(of_student * mean + of_teacher * mean_t)
        result = torch.empty_like(student)
        for part in _pieces(student):
            torch.mul(student[part], of_student[part], out=result[part])
            result[part].addcmul_(teacher[part], of_teacher[part]).add_(constant[part])
        return result, None, None


def _normalise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The layer norm of the last axis, the mean (..., 1) and the reciprocal deviation (..., 1)."""
    return torch.native_layer_norm(x, x.shape[-1:], None, None, LAYER_NORM_EPS)


def _pieces(values: torch.Tensor):
    tokens, heads, width = values.shape
    limit = PIECE.get(values.device.type, LARGE_PIECE)
    step = max(1, limit // (heads * width))
    return [slice(start, start + step) for start in range(0, tokens, step)]
