"""timm's models as teachers: ``timm://vit_small_patch14_dinov2``, ``timm://convnext_tiny``, ...

A pyramid (convolutions, Swin, ...) gives its stages, res2..res5 by stride. A vision transformer has
one grid of patches; its map is resized to the strides of a detector's levels here, where it is
known which pixels a cell stands for, so that levels pair by stride and grids agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
from detectron2.layers import ShapeSpec
from torch import nn
from torch.nn import functional as F

from ..errors import ConfigError, did_you_mean, one_line
from ..files import resolve_weights
from ..modeling.timm_weights import needs_timm_names, read_state, timm_names
from .base import (
    KEY,
    ForeignBackbone,
    ForeignDetector,
    TeacherRequest,
    register_teacher,
)

# how families of transformers are told to take images of any size
_ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
_DEFAULT_LEVELS = (("p3", 8, -1), ("p4", 16, -1), ("p5", 32, -1))


class PyramidBackbone(ForeignBackbone):
    """Stages of a timm model.

    Args:
        model: with ``forward_intermediates``.
        shapes: level to channels and stride.
        indices: of the levels, as timm counts its maps.
        norm: apply the model's last norm to each map (of models that have one).
    """

    def __init__(self, model, shapes, indices: Sequence[int], norm: bool = False):
        super().__init__(model, shapes)
        self.indices = list(indices)
        self.norm = norm

    def maps(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """timm's ``forward_intermediates``."""
        options = {"norm": True} if self.norm else {}
        return self.model.forward_intermediates(
            images,
            indices=self.indices,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
            **options,
        )


class PatchBackbone(PyramidBackbone):
    """Blocks of a vision transformer as maps of a detector's strides.

    Images are padded at the bottom and on the right by zeros (the mean colour) to whole patches.
    A level's cell is read at its centre, bilinearly between the centres of patches; where a level's
    stride is a whole multiple of the patch it is the mean of its patches.

    Args:
        model, shapes, norm: see :class:`PyramidBackbone`.
        blocks: of the levels.
        patch: side of a patch in pixels.
    """

    def __init__(self, model, shapes, blocks: Sequence[int], patch: int, norm: bool):
        super().__init__(model, shapes, sorted(set(blocks)), norm)
        self.blocks = list(blocks)
        self.patch = patch

    def maps(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """One map a level; those of a block that several levels read are computed once."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        found = dict(zip(self.indices, super().maps(images), strict=True))
        strides = [shape.stride for shape in self._shapes.values()]
        return [
            resize_cells(found[block], self.patch, stride, (height // stride, width // stride))
            for block, stride in zip(self.blocks, strides, strict=True)
        ]


def resize_cells(
    maps: torch.Tensor, patch: int, stride: int, grid: tuple[int, int]
) -> torch.Tensor:
    """A map on patches, read at the cells of another stride.

    Args:
        maps: (N, C, H, W), its cell (r, c) covers pixels from ``r * patch`` and ``c * patch`` on.
        patch, stride: sides of the cells in pixels, before and after.
        grid: (rows, columns) of the result; they lie within the pixels that ``maps`` covers.

    Returns:
        (N, C, *grid): ``maps`` itself where the strides agree; means of whole blocks where the
        stride is a multiple; else bilinear at the centres of the cells.
    """
    if stride == patch:
        return maps[..., : grid[0], : grid[1]]
    if stride % patch == 0:
        times = stride // patch
        return F.avg_pool2d(maps[..., : grid[0] * times, : grid[1] * times], times)
    # the scale is given, as the sides alone would stretch what lies in the last, partial patch
    resized = F.interpolate(
        maps, scale_factor=patch / stride, mode="bilinear", recompute_scale_factor=False
    )
    return resized[..., : grid[0], : grid[1]]


@register_teacher("timm")
def build(request: TeacherRequest) -> ForeignDetector:
    """A model of timm.

    Options: ``LEVELS`` of a transformer, [[name, stride, block], ...], -1 = the last block;
    ``NORM``, apply the model's last norm to its maps (left out: for a transformer, as the authors
    of DINOv2 do); ``PIXEL_MEAN`` and ``PIXEL_STD`` in units of 0..255, in place of those of timm's
    weights.
    """
    options = request.read_options(LEVELS=(), NORM=None, PIXEL_MEAN=(), PIXEL_STD=())
    model, weights = _create(request)
    info = getattr(model.feature_info, "info", model.feature_info)
    strides = {item["reduction"] for item in info}
    settings = model.pretrained_cfg
    transformer = len(strides) == 1 and len(info) > 1
    norm = transformer if options["NORM"] is None else bool(options["NORM"])
    if transformer:
        levels = _levels(options["LEVELS"] or _DEFAULT_LEVELS, len(info))
        shapes = {
            name: ShapeSpec(channels=info[block]["num_chs"], stride=stride)
            for name, stride, block in levels
        }
        blocks = [block for *_, block in levels]
        backbone = PatchBackbone(model, shapes, blocks, int(info[0]["reduction"]), norm)
    else:
        if options["LEVELS"]:
            raise ConfigError(
                f"KD.TEACHER.OPTS: LEVELS is for transformers; timm's {request.name} has stages of "
                f"stride {sorted(strides)}"
            )
        deepest = {int(item["reduction"]): place for place, item in enumerate(info)}
        chosen = {s: place for s, place in deepest.items() if s >= 4}
        shapes = {
            f"res{s.bit_length() - 1}": ShapeSpec(channels=info[place]["num_chs"], stride=s)
            for s, place in chosen.items()
        }
        backbone = PyramidBackbone(model, shapes, list(chosen.values()), norm)
    return ForeignDetector(
        backbone,
        pixel_mean=options["PIXEL_MEAN"] or [255 * x for x in settings["mean"]],
        pixel_std=options["PIXEL_STD"] or [255 * x for x in settings["std"]],
        weights=weights,
    )


def _levels(said, count: int) -> list[tuple[str, int, int]]:
    """LEVELS with blocks counted from 0."""
    found = []
    for entry in said:
        fits = isinstance(entry, (list, tuple)) and len(entry) == 3 and isinstance(entry[0], str)
        if not (fits and all(type(x) is int for x in entry[1:]) and entry[1] > 0):
            raise ConfigError(
                f"KD.TEACHER.OPTS: LEVELS has the entry {entry}; write [name, stride, block], "
                '["p4", 16, -1] for example'
            )
        name, stride, block = entry
        if not -count <= block < count:
            raise ConfigError(
                f"KD.TEACHER.OPTS: LEVELS: {name} reads block {block}, the model has {count}"
            )
        found.append((name, stride, block % count))
    return found


def _create(request: TeacherRequest) -> tuple[nn.Module, str]:
    """The model, and where its weights come from."""
    name = request.name
    if not timm.is_model(name.partition(".")[0]):
        known = timm.list_models()
        raise ConfigError(
            f"{KEY}: timm has no model '{name}'{did_you_mean(name.partition('.')[0], known)}"
        )
    try:
        settings = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise ConfigError(
            f"{KEY}: timm has no weights '{name}', it has {', '.join(tags) or 'none'}"
        ) from error
    settings = settings.to_dict() if settings else {}  # a model that you registered may have none
    if request.random:
        return _model(name, {}), ""
    if request.weights:
        return _with_file(name, request, settings), request.weights
    try:
        return _model(name, {"pretrained": True}), f"timm's {name}"
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub's client raises without a network
        where = settings.get("hf_hub_id") or settings.get("url") or "no place that timm knows"
        file = settings.get("hf_hub_filename") or "model.safetensors"
        raise ConfigError(
            f"KD.TEACHER.WEIGHTS is empty, and timm cannot load its own weights of {name} "
            f"({type(error).__name__}): fetch {file} of {where} where there is a network, put it "
            "on this machine, and set KD.TEACHER.WEIGHTS to it"
        ) from error


def _with_file(name: str, request: TeacherRequest, settings: dict) -> nn.Module:
    """The model with the weights of a file, through timm's own conversion of names and grids."""
    key = "KD.TEACHER.WEIGHTS"
    state = read_state(resolve_weights(request.weights, key), key)
    if needs_timm_names(state):
        with torch.device("meta"):
            state = timm_names(state, _model(name, {}).state_dict())
    classifier = settings.get("classifier") or ()
    ends = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    state = {k: v for k, v in state.items() if not any(f"{k}.".startswith(f"{e}.") for e in ends)}
    # the settings say that no classifier is expected, so that timm compares all other names
    overlay = {"state_dict": state, "num_classes": 0, "label_offset": 0, "custom_load": False}
    try:
        model = _model(name, {"pretrained": True, "pretrained_cfg_overlay": overlay})
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{key}: '{request.weights}' is not for timm's {name}: {one_line(error)}"
        ) from error
    broken = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise ConfigError(
            f"{key}: '{request.weights}': {broken[0]} holds values that are not finite"
        )
    return model


def _model(name: str, options: dict) -> nn.Module:
    """timm's model without classifier, for images of any size where it can."""
    for any_size in _ANY_SIZE:
        try:
            model = timm.create_model(name, num_classes=0, **any_size, **options)
            break
        except TypeError:
            if not any_size:
                raise
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"{KEY}: timm's {name} does not give maps (no forward_intermediates)")
    return model
