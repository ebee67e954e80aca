"""A detector that predicts some of its classes only, in another order (KD.TEACHER.CLASS_MAP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..data.class_map import KEY, ClassMap, read_class_map
from ..detectors import ClassLayer, class_layers
from ..errors import ConfigError


def map_classes(cfg, model: nn.Module, names: Mapping[str, Sequence[str]]) -> ClassMap:
    """Let a teacher predict the student's classes alone, as KD.TEACHER.CLASS_MAP says.

    Args:
        cfg: of the student.
        model: the teacher with its weights; changed in place.
        names: what it learnt to find, by the metadata that names it.

    Raises:
        ConfigError: as :func:`read_class_map` and :func:`choose_classes`.
    """
    if not cfg.KD.TEACHER.CLASS_MAP:
        return ClassMap()
    class_map = read_class_map(cfg, names, classes_of(model))
    choose_classes(model, class_map.chosen)
    return class_map


def classes_of(model: nn.Module) -> dict[str, int]:
    """How many classes a detector predicts, by the metadata that names them."""
    return {layer.kind: _number(model, path, layer) for path, layer in class_layers(model).items()}


@torch.no_grad()
def choose_classes(model: nn.Module, chosen: Mapping[str, Sequence[int]]) -> None:
    """Keep the rows of a detector's class layers that belong to the chosen classes, in that order.

    Choosing among the outputs of a linear layer is choosing rows of its weights: what is left
    predicts as before, softmaxes are those over the chosen classes and the background, and the
    modules around the layers know the new number (``num_classes``).

    Args:
        model: changed in place.
        chosen: metadata that names classes to their indices.

    Raises:
        ConfigError: a class layer of unknown form.
    """
    layers = {
        path: layer
        for path, layer in class_layers(model).items()
        if list(chosen.get(layer.kind, ())) not in ([], list(range(_number(model, path, layer))))
    }
    for path, layer in layers.items():
        module = model.get_submodule(path)
        channels = _channels(module, path)
        if channels != layer.inner:  # else it serves all classes
            kept, total = _labels(model, path, layer, chosen[layer.kind])
            _keep_rows(module, _rows(path, layer, channels, total, kept))
    for path, layer in layers.items():
        number = len(chosen[layer.kind]) + bool(layer.labels)
        for owner in _owners(model, path):
            if isinstance(getattr(owner, "num_classes", None), int):
                owner.num_classes = number
    for name, kind in {(x.labels, x.kind) for x in layers.values() if x.labels}:
        table = getattr(model, name)
        setattr(model, name, table.new_tensor([-1, *range(len(chosen[kind]))]))


def _number(model: nn.Module, path: str, layer: ClassLayer) -> int:
    """K of a class layer: what the nearest module around it says, else its channels."""
    if layer.labels:
        return int(getattr(model, layer.labels).max()) + 1
    for owner in _owners(model, path):
        if isinstance(getattr(owner, "num_classes", None), int):
            return owner.num_classes
    return _channels(model.get_submodule(path), path) // layer.inner - layer.background


def _labels(model: nn.Module, path: str, layer: ClassLayer, classes: Sequence[int]):
    """Labels of classes, and how many labels there are; without a table classes are labels."""
    if not layer.labels:
        return list(classes), _number(model, path, layer)
    table = getattr(model, layer.labels).tolist()
    return [0, *(table.index(k) for k in classes)], len(table)


def _owners(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules around a submodule, nearest first."""
    parts = path.split(".")[:-1]
    return [model.get_submodule(".".join(parts[:k])) for k in range(len(parts), -1, -1)]


def _channels(module: nn.Module, path: str) -> int:
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or getattr(module, "groups", 1) != 1:
        raise ConfigError(
            f"{KEY}: the teacher's class layer {path} is a {type(module).__name__}; layers that "
            "can be mapped are Linear and Conv2d without groups (register_detector)"
        )
    return len(module.weight)


def _rows(path: str, layer: ClassLayer, channels: int, total: int, classes: list[int]):
    rows = torch.arange(channels - layer.background)
    if len(rows) % (total * layer.inner):
        raise ConfigError(
            f"{KEY}: the teacher's class layer {path} has {channels} channels, which are no "
            f"multiple of {total} classes x {layer.inner} (register_detector)"
        )
    kept = rows.view(-1, total, layer.inner)[:, classes].flatten()
    return torch.cat([kept, torch.arange(channels)[len(rows) :]])


def _keep_rows(module: nn.Module, rows: torch.Tensor) -> None:
    for name in ("weight", "bias"):
        value = getattr(module, name)
        if value is not None:
            kept = value[rows.to(value.device)]
            setattr(module, name, nn.Parameter(kept, requires_grad=value.requires_grad))
    size = "out_features" if isinstance(module, nn.Linear) else "out_channels"
    setattr(module, size, len(rows))
