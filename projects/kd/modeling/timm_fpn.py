"""Any convolutional timm model as the bottom-up part of detectron2's FPN.

``MODEL.BACKBONE.NAME: "build_timm_fpn_backbone"`` gives p2..p6 for R-CNN,
``"build_retinanet_timm_fpn_backbone"`` p3..p7 for RetinaNet; without a pyramid,
``"build_timm_backbone"`` gives the stages of ``MODEL.FPN.IN_FEATURES`` for DETR, and
``"build_plain_timm_backbone"`` those of ``MODEL.RESNETS.OUT_FEATURES`` for segmentation.
``MODEL.TIMM`` names and sets up the timm model, ``MODEL.FPN`` the pyramid. Stages are called
res2..res5 by stride (res<k> has stride 2^k), so they mean the same as detectron2's own. Set
``MODEL.PIXEL_MEAN``, ``PIXEL_STD`` and
``INPUT.FORMAT: "RGB"`` to what the timm weights were trained with.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import nn

from ..errors import ConfigError, require_one_of
from .timm_weights import load_timm_weights

logger = logging.getLogger(__name__)

NORMS = ("BN", "FrozenBN", "SyncBN")
# timm's layers of norm and activation derive from these
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# what timm raises for options or devices that a model cannot take
_TIMM_ERRORS = (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, IndexError)


class TimmBackbone(Backbone):
    """The feature maps of a timm model under detectron2's names.

    Args:
        model: timm model created with ``features_only``.
        shapes: name to channels and stride, in the order in which ``model`` returns the maps.
    """

    def __init__(self, model: nn.Module, shapes: dict[str, ShapeSpec]):
        super().__init__()
        self.model = model
        self._shapes = dict(shapes)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, 3, H, W) normalised images to ``{"res<k>": (N, C_k, ceil(H/2^k), ceil(W/2^k))}``."""
        return dict(zip(self._shapes, self.model(images), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        return dict(self._shapes)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """FPN for R-CNN: the levels of MODEL.FPN.IN_FEATURES, and one subsampled from the last."""
    bottom_up = build_undilated_timm_backbone(cfg, input_shape)
    subsample = LastLevelMaxPool()
    subsample.in_feature = list(bottom_up.output_shape())[-1].replace("res", "p")
    return fpn_over(cfg, bottom_up, subsample)


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """FPN for RetinaNet: the levels of MODEL.FPN.IN_FEATURES, and two more from the last stage."""
    bottom_up = build_undilated_timm_backbone(cfg, input_shape)
    name, shape = list(bottom_up.output_shape().items())[-1]
    return fpn_over(cfg, bottom_up, LastLevelP6P7(shape.channels, cfg.MODEL.FPN.OUT_CHANNELS, name))


@BACKBONE_REGISTRY.register()
def build_plain_timm_backbone(cfg, input_shape: ShapeSpec) -> TimmBackbone:
    """The stages of MODEL.RESNETS.OUT_FEATURES without FPN, as ``build_resnet_backbone`` does.

    MODEL.TIMM.OUTPUT_STRIDE limits their stride, for segmentation.
    """
    return build_timm_backbone(cfg, input_shape, cfg.MODEL.RESNETS.OUT_FEATURES)


def build_undilated_timm_backbone(cfg, input_shape: ShapeSpec) -> TimmBackbone:
    """:func:`build_timm_backbone` for an FPN.

    Raises:
        ConfigError: dilated stages, of which several have the same stride; and what it raises.
    """
    backbone = build_timm_backbone(cfg, input_shape)
    if cfg.MODEL.TIMM.OUTPUT_STRIDE != 32:
        raise ConfigError("MODEL.TIMM.OUTPUT_STRIDE: an FPN needs 32")
    return backbone


def fpn_over(cfg, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    """An FPN on the stages MODEL.FPN.IN_FEATURES of ``bottom_up``, with the keys of MODEL.FPN."""
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_timm_backbone(
    cfg, input_shape: ShapeSpec, stages: Sequence[str] | None = None
) -> TimmBackbone:
    """The timm model of ``cfg.MODEL.TIMM`` with some stages, by default MODEL.FPN.IN_FEATURES.

    Order: create, read weights, convert BatchNorm, freeze.

    Args:
        cfg: MODEL.TIMM, MODEL.FPN.IN_FEATURES and MODEL.WEIGHTS are read.
        input_shape: its ``channels`` are the image channels.
        stages: names res<k>.

    Raises:
        ConfigError: unknown model, one without maps of the needed strides or with maps that are not
            (N, C, ceil(H/stride), ceil(W/stride)), wrong norm, or weights that do not fit.
    """
    node = cfg.MODEL.TIMM
    require_one_of("MODEL.TIMM.NORM", node.NORM, NORMS)
    if node.OUTPUT_STRIDE not in (8, 16, 32):
        raise ConfigError(f"MODEL.TIMM.OUTPUT_STRIDE: {node.OUTPUT_STRIDE} is not 8, 16 or 32")
    wanted = {name: _stride(name) for name in stages or cfg.MODEL.FPN.IN_FEATURES}
    maps = feature_maps(node.NAME, input_shape.channels)
    indices = _choose(maps, wanted, tuple(node.OUT_INDICES), node.NAME)
    model = _create(node, indices, input_shape.channels, has_detector=bool(cfg.MODEL.WEIGHTS))
    model = _convert_norm(model, node.NORM)
    _freeze(model, _frozen_parameters(maps, indices, node.FREEZE_AT))
    shapes = {
        name: ShapeSpec(
            channels=maps[index].channels, stride=min(maps[index].stride, node.OUTPUT_STRIDE)
        )
        for name, index in zip(wanted, indices, strict=True)
    }
    return TimmBackbone(model, shapes)


def _stride(name: str) -> int:
    if not (name.startswith("res") and name[3:].isdigit()):
        raise ConfigError(f"MODEL.FPN.IN_FEATURES: '{name}' is not res<k>, such as res3 (stride 8)")
    return 2 ** int(name[3:])


# --- what a timm model offers -------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureMap:
    """One map of a timm model.

    Attributes:
        channels, stride: as timm says.
        usable: whether the map of an H x W image really is (N, C, ceil(H/stride), ceil(W/stride)).
        parameters: names of the parameters that the map depends on.
    """

    channels: int
    stride: int
    usable: bool
    parameters: frozenset[str]


@functools.cache
def feature_maps(name: str, channels: int = 3) -> tuple[FeatureMap, ...]:
    """All maps of a timm model, by timm's index, found on the meta device without computing.

    A name is looked at once in a process: it takes a second.

    Raises:
        ConfigError: unknown model, or one that does not take images of any size.
    """
    height, width = size = (96, 160)  # different sides, and an odd number of cells at stride 32
    with torch.device("meta"):
        model = _timm_model(name, features_only=True, in_chans=channels)
        count = len(model.feature_info.info)
        if count != len(model.feature_info.out_indices):
            model = _timm_model(
                name, features_only=True, in_chans=channels, out_indices=tuple(range(count))
            )
        try:
            outputs = model.eval()(torch.zeros(1, channels, *size))
        except _TIMM_ERRORS as error:
            raise ConfigError(
                f"MODEL.TIMM.NAME: {name} does not take a {height}x{width} image, a detector's "
                f"backbone has to take any size ({error})"
            ) from error
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = []
    info = model.feature_info
    for output, width_c, stride in zip(outputs, info.channels(), info.reduction(), strict=True):
        gradients = torch.autograd.grad(
            output.sum(), parameters, retain_graph=True, allow_unused=True
        )
        reached = frozenset(n for n, grad in zip(names, gradients, strict=True) if grad is not None)
        cells = tuple(-(-side // stride) for side in size)
        found.append(FeatureMap(width_c, stride, output.shape == (1, width_c, *cells), reached))
    return tuple(found)


def _timm_model(name: str, **options) -> nn.Module:
    if not name:
        raise ConfigError("MODEL.TIMM.NAME is empty: name a timm model")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.3)
        raise ConfigError(f"MODEL.TIMM.NAME: timm has no '{name}'; near: {', '.join(near)}")
    try:
        return timm.create_model(name, **options)
    except _TIMM_ERRORS as error:
        raise ConfigError(
            f"MODEL.TIMM: timm cannot make {name} with {options}: {error or type(error).__name__}"
        ) from error


def _choose(
    maps: Sequence[FeatureMap], wanted: dict[str, int], given: tuple[int, ...], name: str
) -> tuple[int, ...]:
    """timm indices of the wanted strides: those given, or the deepest map of each stride."""
    if given:
        strides = [maps[index].stride if index in range(len(maps)) else None for index in given]
        if strides != list(wanted.values()):
            raise ConfigError(
                f"MODEL.TIMM.OUT_INDICES {given}: strides {strides} of {name}, and "
                f"MODEL.FPN.IN_FEATURES {tuple(wanted)} needs {list(wanted.values())}"
            )
        indices = given
    else:
        deepest = {found.stride: index for index, found in enumerate(maps)}
        lacking = [stride for stride in wanted.values() if stride not in deepest]
        if lacking:
            raise ConfigError(
                f"MODEL.TIMM.NAME: {name} has maps of stride {sorted(deepest)}, "
                f"MODEL.FPN.IN_FEATURES {tuple(wanted)} needs {list(wanted.values())}"
            )
        indices = tuple(deepest[stride] for stride in wanted.values())
    if not all(maps[index].usable for index in indices):
        raise ConfigError(
            f"MODEL.TIMM.NAME: {name} does not give (N, C, H/stride, W/stride) maps; "
            "take a convolutional model"
        )
    return indices


# --- creating, converting, freezing -------------------------------------------------------------


def _create(node, indices: tuple[int, ...], channels: int, has_detector: bool) -> nn.Module:
    """The model with its ImageNet weights.

    With ``has_detector`` (MODEL.WEIGHTS is set and is read over these weights later), weights that
    are out of reach are a warning and not an error: a trained detector needs them no more.
    """
    options = {"features_only": True, "out_indices": indices, "in_chans": channels}
    if node.OUTPUT_STRIDE != 32:
        options["output_stride"] = node.OUTPUT_STRIDE
    if node.DROP_PATH > 0:
        options["drop_path_rate"] = node.DROP_PATH
    model = _timm_model(node.NAME, **options)
    try:
        if node.WEIGHTS:
            logger.info("%s", load_timm_weights(model, node.WEIGHTS))
        elif node.PRETRAINED:
            model = _pretrained(node.NAME, options)
    except FileNotFoundError as error:
        if not has_detector:
            raise ConfigError(str(error)) from error
        logger.warning("%s; MODEL.WEIGHTS is read instead", error)
    return model


def _pretrained(name: str, options: dict) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # whatever the hub client raises without a network
        raise FileNotFoundError(
            f"MODEL.TIMM.PRETRAINED: the weights of {name} could not be downloaded "
            f"({type(error).__name__}); name a file in MODEL.TIMM.WEIGHTS instead"
        ) from error


def _convert_norm(model: nn.Module, norm: str) -> nn.Module:
    if norm == "BN":
        return model
    if not any(isinstance(module, _BATCH_NORMS) for module in model.modules()):
        raise ConfigError(f"MODEL.TIMM.NORM: '{norm}', and the model has no BatchNorm; leave 'BN'")
    return (freeze_batch_norm_2d if norm == "FrozenBN" else convert_sync_batchnorm)(model)


def _frozen_parameters(
    maps: Sequence[FeatureMap], indices: tuple[int, ...], depth: int
) -> set[str]:
    """What maps of stride up to 2^depth depend on (as in detectron2, 1 is the stem, 2 the stem and
    res2), and what no chosen map depends on: distributed training would wait for its gradient."""
    early = [found.parameters for found in maps if found.stride <= 2**depth] if depth > 0 else []
    if depth > 0 and not early:
        raise ConfigError(
            f"MODEL.TIMM.FREEZE_AT {depth}: the model's first map has stride {maps[0].stride}; "
            "use 0 or a larger value"
        )
    everything = set().union(*(found.parameters for found in maps))
    used = set().union(*(maps[index].parameters for index in indices))
    return (everything - used).union(*early)


def _freeze(model: nn.Module, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    for name, module in list(model.named_modules()):
        owned = {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
        if isinstance(module, _BATCH_NORMS) and owned and owned <= names:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent).add_module(leaf, freeze_batch_norm_2d(module))
