"""ICD: instance-conditional distillation (Kang et al., NeurIPS 2021).

Shapes: Q instances (queries), R of them real, K classes, L tokens (the valid cells of all levels of
one image), M attention heads, d channels a head. Boxes are XYXY in pixels of the network's input;
"relative" means divided by the image's width or height before padding.

Definitions were read in the released code (PyTorch) unless said otherwise; the departures are
named.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

TEMPERATURE = 10000.0  # of all sine encodings
POINT_FEATURES = 128  # of an encoded coordinate of a query
SCALE_BINS = 5  # of an encoded side: below 64, 128, 256, 512 pixels, and larger
LOGITS = 2**21  # attention logits of one head that exist at a time

_SIZE_LIMITS = (2e-3, 0.7)  # relative sides of a fake
_CENTRE_LIMITS = (0.03, 0.97)  # relative centre of a fake


class Priors(NamedTuple):
    """What fakes are drawn from.

    Attributes:
        classes: (K,) cumulative class frequencies, the last one 1.
        mean, std: (K, 2) relative width and height of the boxes of a class.
    """

    classes: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


class Encoded(NamedTuple):
    """Encoded instances.

    Attributes:
        vectors: (Q, K + 2 * POINT_FEATURES + 2 * SCALE_BINS): class one-hot, encoded x, encoded y
            of the jittered centre, one-hot scale of the width, of the height.
        sides: (Q, 4) relative distances of the jittered centre to the left, top, right and bottom
            side; positive while the jitter is below 0.5.
        sizes: (Q, 2) relative width and height.
    """

    vectors: torch.Tensor
    sides: torch.Tensor
    sizes: torch.Tensor


def query_counts(real: int, negatives: float, most: int) -> tuple[int, int]:
    """Numbers of real and fake instances of an image.

    ``min(max(1, floor(real * (negatives + 1))), max(most, real))`` in all: an image without
    objects has one fake, and real instances are never dropped.

    Args:
        real: objects in the image.
        negatives: wanted fakes per real instance.
        most: wanted limit of both together.
    """
    total = min(max(1, math.floor(real * (negatives + 1))), max(most, real))
    return real, total - real


def point_encoding(coordinates: torch.Tensor, features: int = POINT_FEATURES) -> torch.Tensor:
    """Sine encoding of relative coordinates: first all sines, then all cosines.

    Angle k of F features is ``2 pi c / 10000^(2 floor(k / 2) / F)``; even k give the sines, odd k
    the cosines.

    Args:
        coordinates: (...,) in [0, 1].
        features: F, even.

    Returns:
        (..., F).
    """
    angles = coordinates[..., None] * _frequencies(features, coordinates)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _frequencies(features: int, like: torch.Tensor) -> torch.Tensor:
    even = torch.arange(0, features, 2, dtype=like.dtype, device=like.device)
    return 2 * math.pi * TEMPERATURE ** (-even / features)


@functools.lru_cache(maxsize=512)
def sine_table(
    cells: int, features: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Sine encoding of the cells of one axis, sine and cosine interleaved, as in DETR.

    Cell i of n is at ``2 pi (i + 1) / (n + 1e-6)``. Cached: the sides of levels repeat.

    Args:
        cells: n, valid cells of the axis.
        features: even.
        device, dtype: of the result.

    Returns:
        (n, features); do not change it in place.
    """
    place = torch.arange(1, cells + 1, dtype=torch.float64, device=device) / (cells + 1e-6)
    angles = place[:, None] * _frequencies(features, place)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(dtype)


def scale_bins(sides: torch.Tensor) -> torch.Tensor:
    """``clamp(floor(log2(side)) - 5, 0, 4)`` for sides in pixels, exactly.

    The released code computes ``floor(1.44 ln(side) - 5)``, whose limits lie up to 1.2 % above the
    powers of two, and uses one image's size for the whole batch.
    """
    exponent = torch.frexp(sides).exponent  # side = m * 2^exponent, m in [0.5, 1)
    return (exponent - 6).clamp(0, SCALE_BINS - 1).long()


def encode_instances(
    classes: torch.Tensor,
    boxes: torch.Tensor,
    image_size: tuple[int, int],
    jitter: torch.Tensor,
    num_classes: int,
) -> Encoded:
    """Encode instances of one image so that the decoder must look at the image to find them.

    Of a box only its class, a point inside and the coarse size of its sides are told.

    Args:
        classes: (Q,) long.
        boxes: (Q, 4).
        image_size: (height, width) in pixels.
        jitter: (Q, 2) shift of the centre in widths and heights of the box. The released code draws
            it from [-0.3, 0.3]. One published review gives [-3, 3], which would put the point
            outside of the box and make sides negative.
        num_classes: K.
    """
    height, width = image_size
    relative = torch.stack([boxes[:, 0::2] / width, boxes[:, 1::2] / height], dim=2)  # (Q, 2, 2)
    low, high = relative.unbind(1)
    sizes = high - low
    centre = (low + high) / 2 + jitter * sizes
    scales = scale_bins(boxes[:, 2:] - boxes[:, :2])
    vectors = torch.cat(
        [
            _one_hot(classes, num_classes, boxes.dtype),
            point_encoding(centre).flatten(1),
            _one_hot(scales, SCALE_BINS, boxes.dtype).flatten(1),
        ],
        dim=1,
    )
    return Encoded(vectors, torch.cat([centre - low, high - centre], dim=1), sizes)


def _one_hot(index: torch.Tensor, number: int, dtype: torch.dtype) -> torch.Tensor:
    """As torch's, which looks at the values first."""
    return (index[..., None] == torch.arange(number, device=index.device)).to(dtype)


def sample_fakes(
    count: int,
    priors: Priors,
    image_size: tuple[int, int],
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw instances that are not in the image (nothing keeps them off an object).

    Class by frequency; centre uniform, clipped to [0.03, 0.97]; sides normal with the class's mean
    and deviation, clipped to two deviations and to [0.002, 0.7]; the box is cut at the border.

    Args:
        count: how many.
        priors: on the device to draw on. Nothing is read back from it.
        image_size: (height, width) in pixels.
        generator: of that device; None = its default one, which training seeds every step.

    Returns:
        (count,) classes and (count, 4) boxes.
    """
    device, dtype = priors.mean.device, priors.mean.dtype
    options = {"device": device, "dtype": dtype, "generator": generator}
    draw = torch.rand(count, **options)
    classes = torch.searchsorted(priors.classes, draw, right=True)
    classes = classes.clamp_(max=len(priors.classes) - 1)  # for a last entry rounded below 1
    centre = torch.rand(count, 2, **options).clamp_(*_CENTRE_LIMITS)
    deviation = torch.randn(count, 2, **options).clamp_(-2, 2)
    sides = (priors.mean[classes] + deviation * priors.std[classes]).clamp_(*_SIZE_LIMITS)
    boxes = torch.cat([centre - sides / 2, centre + sides / 2], dim=1).clamp_(0, 1)
    height, width = image_size
    boxes[:, 0::2] *= width
    boxes[:, 1::2] *= height
    return classes, boxes


@torch.no_grad()
def summed_attention(
    queries: torch.Tensor, keys: torch.Tensor, logits: int = LOGITS
) -> torch.Tensor:
    """Attention of several queries, summed over them: ``sum_q softmax_l(q . k_l / sqrt(d))``.

    The weight that a token has in the distillation term. Exact, with at most ``logits`` logits at
    a time, so a crowded image takes no more memory than a sparse one (ours; the released code
    keeps (M, Q, L) maps).

    Args:
        queries: (R, M, d).
        keys: (L, M, d).
        logits: number of logits of one head to hold.

    Returns:
        (M, L), no gradient; each row sums to R.
    """
    real, heads, width = queries.shape
    total = keys.new_zeros(heads, len(keys))
    queries = queries * width**-0.5
    piece = max(1, logits // len(keys))
    for head in range(heads):
        own = keys[:, head].T.contiguous()
        for part in queries[:, head].split(piece) if real else ():
            total[head] += (part @ own).softmax(1).sum(0)
    return total


def identification_loss(logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of "this instance is in the image", mean over all instances.

    Args:
        logits: (Q,).
        real: (Q,) bool.
    """
    return F.binary_cross_entropy_with_logits(logits, real.to(logits.dtype))


def localisation_error(
    predicted: torch.Tensor, sides: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Error of the predicted box sides in box sizes, summed over the four sides.

    Args:
        predicted: (R, 4) relative distances to the left, top, right and bottom side.
        sides: (R, 4) the true ones.
        sizes: (R, 2) relative width and height.

    Returns:
        (R,); the loss is the mean over all real instances of the batch.
    """
    return ((predicted - sides).abs() / sizes.clamp(min=1e-7).repeat(1, 2)).sum(1)
