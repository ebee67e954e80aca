"""PSPNet: a segmentation head on a dilated backbone (Zhao et al., CVPR 2017).

``MODEL.SEM_SEG_HEAD.NAME: "PSPNetHead"`` with the meta-arch ``SemanticSegmentor`` and a backbone of
output stride 8: ``build_dilated_resnet_backbone`` or ``build_plain_timm_backbone``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.utils import comm
from torch import nn

from ..config import register_config
from ..errors import ConfigError


@register_config
def add_pspnet_config(cfg: CN) -> None:
    """Add MODEL.SEM_SEG_HEAD.PSPNET."""
    cfg.MODEL.SEM_SEG_HEAD.PSPNET = node = CN()
    # Pyramid pooling: averages over grids of so many rows and columns.
    node.BINS = [1, 2, 3, 6]
    # Feature that the auxiliary classifier reads in training; "" = none.
    node.AUX_FEATURE = "res4"
    # Weight of its loss.
    node.AUX_WEIGHT = 0.4
    # Channels are dropped before both classifiers with this probability.
    node.DROPOUT = 0.1


@SEM_SEG_HEADS_REGISTRY.register()
class PSPNetHead(nn.Module):
    """Pyramid pooling over the last feature, a 3x3 convolution, and a 1x1 classifier.

    Each pooled grid goes through a 1x1 convolution to ``C / len(bins)`` channels, norm and ReLU,
    and is resized to the map. Bilinear resizing uses half-pixel centres, as detectron2 does
    everywhere (the authors' code aligns corners). Upsampled logits are cut to the labels.

    Args:
        input_shape: shapes of the backbone's outputs; the last of ``in_features`` is pooled.
        in_features: names of the features that are read.
        num_classes: number of classes.
        conv_dims: channels before the classifier (512 in the paper).
        norm: "BN", "SyncBN", ... of all convolutions, "" = none.
        bins, dropout: see the config keys.
        aux_feature, aux_weight: see the config keys. The auxiliary branch exists in training and
            evaluation, but runs in training only.
        loss_weight: factor of both losses.
        ignore_value: label of pixels without a class.

    Raises:
        ConfigError: a feature that the backbone does not give.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        num_classes: int,
        conv_dims: int = 512,
        norm: str = "BN",
        bins: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        aux_feature: str = "res4",
        aux_weight: float = 0.4,
        loss_weight: float = 1.0,
        ignore_value: int = 255,
    ):
        super().__init__()
        for name in (*in_features, *([aux_feature] if aux_feature else [])):
            if name not in input_shape:
                raise ConfigError(
                    f"MODEL.SEM_SEG_HEAD.IN_FEATURES (or PSPNET.AUX_FEATURE): the backbone gives "
                    f"{', '.join(input_shape)}, not {name}"
                )
        self.in_feature = in_features[-1]
        self.aux_feature, self.aux_weight = aux_feature, aux_weight
        self.common_stride = input_shape[self.in_feature].stride
        self.loss_weight, self.ignore_value, self.norm = loss_weight, ignore_value, norm
        self.bins = tuple(bins)
        channels = input_shape[self.in_feature].channels
        self.pyramid = nn.ModuleList(
            _conv(channels, channels // len(self.bins), 1, norm) for _ in self.bins
        )
        width = channels + channels // len(self.bins) * len(self.bins)
        self.bottleneck = _conv(width, conv_dims, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.predictor = _classifier(conv_dims, num_classes)
        self.auxiliary = None
        if aux_feature:
            aux_channels = input_shape[aux_feature].channels
            self.auxiliary = nn.Sequential(
                _conv(aux_channels, max(aux_channels // 4, 1), 3, norm),
                nn.Dropout2d(dropout),
                _classifier(max(aux_channels // 4, 1), num_classes),
            )

    @classmethod
    def from_config(cls, cfg, input_shape) -> dict:
        """Read MODEL.SEM_SEG_HEAD."""
        node = cfg.MODEL.SEM_SEG_HEAD
        features = list(node.IN_FEATURES)
        if not features:
            raise ConfigError("MODEL.SEM_SEG_HEAD.IN_FEATURES is empty: name the feature to pool")
        if not node.PSPNET.BINS or min(node.PSPNET.BINS) < 1:
            raise ConfigError(f"MODEL.SEM_SEG_HEAD.PSPNET.BINS is {node.PSPNET.BINS}")
        last = features[-1]
        if last in input_shape and input_shape[last].stride != node.COMMON_STRIDE:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {node.COMMON_STRIDE}, but {last} has stride "
                f"{input_shape[last].stride} (MODEL.RESNETS or MODEL.TIMM .OUTPUT_STRIDE)"
            )
        return {
            "input_shape": input_shape,
            "in_features": features,
            "num_classes": node.NUM_CLASSES,
            "conv_dims": node.CONVS_DIM,
            "norm": node.NORM,
            "bins": node.PSPNET.BINS,
            "dropout": node.PSPNET.DROPOUT,
            "aux_feature": node.PSPNET.AUX_FEATURE,
            "aux_weight": node.PSPNET.AUX_WEIGHT,
            "loss_weight": node.LOSS_WEIGHT,
            "ignore_value": node.IGNORE_VALUE,
        }

    def forward(self, features: Mapping[str, torch.Tensor], targets: torch.Tensor | None = None):
        """Losses in training, logits at the input's resolution in evaluation.

        Args:
            features: name to (N, C, H, W).
            targets: (N, canvas height, canvas width) labels; read in training only.

        Returns:
            (None, losses) in training, else ((N, num_classes, H * stride, W * stride), {}).
        """
        logits = self.layers(features)
        if not self.training:
            return self._upsample(logits), {}
        losses = {"loss_sem_seg": self.loss_weight * self.loss(logits, targets)}
        if self.auxiliary is not None:
            auxiliary = self.auxiliary(features[self.aux_feature])
            weight = self.loss_weight * self.aux_weight
            losses["loss_sem_seg_aux"] = weight * self.loss(auxiliary, targets)
        return None, losses

    def layers(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits (N, num_classes, H, W) on the grid of the pooled feature."""
        x = features[self.in_feature]
        alone = self.norm == "BN" or (self.norm == "SyncBN" and comm.get_world_size() == 1)
        if self.training and alone and len(x) == 1 and 1 in self.bins:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.NORM: '{self.norm}' over the 1x1 grid of PSPNet needs two "
                "images (SyncBN: in all processes together); raise SOLVER.IMS_PER_BATCH (and "
                "KD.UNLABELED.IMAGES_PER_BATCH, if it is not 0)"
            )
        pooled = [
            F.interpolate(
                conv(F.adaptive_avg_pool2d(x, size)),
                size=x.shape[-2:],
                mode="bilinear",
                align_corners=False,
            )
            for size, conv in zip(self.bins, self.pyramid, strict=True)
        ]
        return self.predictor(self.dropout(self.bottleneck(torch.cat([x, *pooled], dim=1))))

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy over labelled pixels; 0 when there is none.

        Args:
            logits: (N, num_classes, H, W), upsampled to the labels.
            targets: (N, height, width).
        """
        height, width = targets.shape[-2:]
        logits = self._upsample(logits.float())[..., :height, :width]
        total = F.cross_entropy(logits, targets, ignore_index=self.ignore_value, reduction="sum")
        return total / (targets != self.ignore_value).sum().clamp(min=1)

    def _upsample(self, logits: torch.Tensor) -> torch.Tensor:
        return F.interpolate(
            logits, scale_factor=self.common_stride, mode="bilinear", align_corners=False
        )


def _conv(channels: int, out: int, size: int, norm: str) -> Conv2d:
    conv = Conv2d(
        channels,
        out,
        kernel_size=size,
        padding=size // 2,
        bias=not norm,
        norm=get_norm(norm, out),
        activation=F.relu,
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _classifier(channels: int, num_classes: int) -> Conv2d:
    conv = Conv2d(channels, num_classes, kernel_size=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv
