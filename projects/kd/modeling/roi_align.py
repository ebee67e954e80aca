"""ROIAlign whose gradient is one sparse product on a CPU.

torchvision's backward pass on a CPU goes through every channel of every sample of every region,
and computes the sample's place and weights anew for each channel: more than a tenth of a step of a
small R-CNN. The gradient is linear in that of the output, with weights that all channels share: a
sparse matrix, cells by bins, times a dense one, bins by channels.
"""

from __future__ import annotations

import torch
from detectron2.layers import ROIAlign
from torch import nn
from torch.autograd.function import once_differentiable
from torchvision.ops import roi_align


class _SparseGradientROIAlign(ROIAlign):
    """:class:`detectron2.layers.ROIAlign` with :func:`roi_align_gradient` on a CPU."""

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu" or not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input, rois)
        options = self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        return _Function.apply(input, rois.to(input.dtype), *options)


def use_sparse_gradients(model: nn.Module) -> nn.Module:
    """Let a model's ROIAlign layers compute their gradient by :func:`roi_align_gradient`.

    In place, and without effect on a GPU and on what the layers give: their forward pass is
    torchvision's. Subclasses of detectron2's layer stay as they are.
    """
    for module in model.modules():
        if type(module) is ROIAlign:
            module.__class__ = _SparseGradientROIAlign
    return model


def roi_align_gradient(
    grad: torch.Tensor,
    rois: torch.Tensor,
    shape: tuple[int, int, int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """Gradient of :func:`torchvision.ops.roi_align` with respect to its maps.

    Ours: torchvision's own, in another order of the sum.

    Args:
        grad: (R, C, PH, PW), with respect to the output.
        rois: (R, 5): image of the batch, then XYXY in pixels of the image.
        shape: (N, C, H, W) of the maps.
        spatial_scale: cells a pixel.
        sampling_ratio: samples along a side of a bin; 0 or less = as many as it has cells, rounded
            up.
        aligned: shift regions by half a cell.

    Returns:
        (N, C, H, W), channels_last in memory, float64 for float64 and float32 for all others.
    """
    images, channels, height, width = shape
    dtype = torch.promote_types(grad.dtype, torch.float32)
    bins = grad.shape[-2:]
    regions = rois[:, 1:].to(dtype) * spatial_scale - (0.5 if aligned else 0.0)
    start, extent = regions[:, :2], regions[:, 2:] - regions[:, :2]
    if not aligned:
        extent = extent.clamp(min=1.0)
    per_bin = extent / torch.tensor([bins[1], bins[0]], dtype=dtype)
    samples = per_bin.ceil() if sampling_ratio <= 0 else torch.full_like(extent, sampling_ratio)
    most = samples.amax(1).int()
    own_bins = torch.arange(bins[0] * bins[1]).view(*bins, 1, 1)
    cells, places, weights = [], [], []
    for count in most[most > 0].unique().tolist():
        chosen = torch.nonzero(most == count)[:, 0]
        parts = start[chosen], per_bin[chosen], samples[chosen]
        x, x_weight = _along_side(*(part[:, 0] for part in parts), bins[1], count, width)
        y, y_weight = _along_side(*(part[:, 1] for part in parts), bins[0], count, height)
        if sampling_ratio <= 0:  # neighbouring samples share cells
            (x, x_weight), (y, y_weight) = _merged(x, x_weight, width), _merged(y, y_weight, height)
        image = _in_front_of_four(rois[chosen, 0].long())
        cell = (image * height + y[:, :, None, :, None]) * width + x[:, None, :, None, :]
        place = _in_front_of_four(chosen) * (bins[0] * bins[1]) + own_bins
        cells.append(cell.flatten())
        places.append(place.expand_as(cell).flatten())
        weights.append((y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]).flatten())
    if not cells:
        return grad.new_zeros(shape, dtype=dtype)
    indices = torch.stack([torch.cat(cells), torch.cat(places)])
    size = images * height * width, grad.shape[0] * bins[0] * bins[1]
    with torch.sparse.check_sparse_tensor_invariants(False):  # said, or torch warns
        matrix = torch.sparse_coo_tensor(indices, torch.cat(weights), size)
    dense = grad.to(dtype).permute(0, 2, 3, 1).reshape(-1, channels)
    return torch.sparse.mm(matrix, dense).view(images, height, width, channels).permute(0, 3, 1, 2)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rois, output_size, spatial_scale, sampling_ratio, aligned):
        ctx.save_for_backward(rois)
        ctx.options = x.shape, spatial_scale, sampling_ratio, aligned
        ctx.dtype = x.dtype
        return roi_align(x, rois, output_size, spatial_scale, sampling_ratio, aligned)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (rois,) = ctx.saved_tensors
        result = roi_align_gradient(grad, rois, *ctx.options).to(ctx.dtype)
        return result, None, None, None, None, None


def _in_front_of_four(x: torch.Tensor) -> torch.Tensor:
    return x[:, None, None, None, None]


def _along_side(start, per_bin, samples, bins: int, count: int, extent: int):
    """Along one side: the cells, (R, bins, 2 * count), and weights of all samples of each bin.

    ``samples`` is how many of ``count`` places a region uses; the other weights are 0.
    """
    number = torch.arange(count, dtype=start.dtype)
    used = samples.clamp(min=1)
    inside = (number + 0.5) / used[:, None]
    bin_start = torch.arange(bins, dtype=start.dtype)[:, None] + inside[:, None, :]
    at = start[:, None, None] + bin_start * per_bin[:, None, None]
    valid = (at >= -1) & (at <= extent) & (number < samples[:, None, None])
    at = torch.where(valid, at, 0.0).clamp(0, extent - 1)
    low = at.floor()
    to_high = at - low
    low = low.long()
    high = (low + 1).clamp(max=extent - 1)
    weight = torch.stack([1 - to_high, to_high], -1) * valid[..., None]
    return torch.stack([low, high], -1).flatten(2), (weight / used[:, None, None, None]).flatten(2)


def _merged(cells, weights, extent: int):
    """The same with each cell once; (R, bins, K) with the largest K that a bin needs."""
    used = weights != 0
    low = torch.where(used, cells, extent).amin(-1, keepdim=True)
    high = torch.where(used, cells, -1).amax(-1, keepdim=True)
    span = torch.arange(max(int((high - low).max()) + 1, 1))
    place = torch.where(used, cells - low, 0)
    merged = weights.new_zeros(*weights.shape[:2], len(span)).scatter_add_(2, place, weights)
    return (low + span).clamp(max=extent - 1), merged
