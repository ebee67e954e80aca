"""Reading weights into a detector, without running code from files nobody vouched for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from ..errors import ConfigError, one_line
from ..files import may_unpickle, resolve_weights, split_query
from .files import (
    choose_state,
    is_plain_pickle,
    modules_in,
    read_pickle,
    read_torch_file,
)

logger = logging.getLogger(__name__)

_QUERY = "?matching_heuristics=True"
_FROM_CONFIG = ("num_batches_tracked", "pixel_mean", "pixel_std")  # never listed as missing


class SafeCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer with ``weights_only`` reading and one-line errors.

    The content decides how a file is read, not its name: torch's archives, safetensors, and (only
    the model zoo's own, or any with ``allow_pickle``) pickles. The state dict is looked for under
    the usual names, and a prefix before all of its names is taken away.

    Args:
        model: the module whose ``state_dict`` the checkpoint's ``model`` entry fills.
        save_dir: folder for ``save``.
        key: the config key that names the weights, for error messages.
        allow_pickle: the value of KD.ALLOW_PICKLE.
        **checkpointables: see detectron2's ``DetectionCheckpointer``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        key: str = "MODEL.WEIGHTS",
        allow_pickle: bool = False,
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.key = key
        self.allow_pickle = allow_pickle
        self.names: tuple[str, ...] = ()  # of the state dict in the file read last
        self._name = ""
        self._heuristics = False

    def load(self, path, checkpointables=None):
        """As in detectron2; ConfigError for a missing, truncated, forbidden or unfit file."""
        self._name = path
        if not path:
            return Checkpointer.load(self, path, checkpointables)
        self._name, query = split_query(path)
        self._heuristics = self._parse(query)
        return Checkpointer.load(self, resolve_weights(path, self.key), checkpointables)

    def _parse(self, query: str) -> bool:
        if query and parse_qs(query) != {"matching_heuristics": ["True"]}:
            raise ConfigError(
                f"{self.key}: '?{query}' after '{self._name}': only {_QUERY} is known there"
            )
        return bool(query)

    def _trusted(self, filename: str) -> bool:
        return may_unpickle(self._name, filename, self.key, self.allow_pickle)

    def _load_file(self, filename):
        content = self._read(filename)
        content = dict(content) if isinstance(content, Mapping) else content
        place, state = choose_state(content, self.model.state_dict(), self.key, self._name)
        if place not in ((), ("model",)):
            self.logger.info(f"The weights are those under '{'.'.join(place)}' in the file")
        rest = {k: v for k, v in content.items() if k not in ("model", *place[:1])} if place else {}
        heuristics = self._heuristics or rest.pop("matching_heuristics", False)
        return {**rest, "model": state, "matching_heuristics": heuristics}

    def _read(self, filename):
        if filename.endswith(".pkl") and is_plain_pickle(filename, self.key):
            if not self._trusted(filename):
                raise ConfigError(
                    f"{self.key}: '{self._name}' is a pickle file, reading it runs code from the "
                    "file; set KD.ALLOW_PICKLE True if you trust it"
                )
            content = read_pickle(filename, self.key)
            if isinstance(content, Mapping) and not (
                "model" in content and "__author__" in content
            ):
                # of Caffe2 or Detectron 1, in which ImageNet models have no "blobs"
                blobs = content.get("blobs", content)
                blobs = {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")}
                content = {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
            return content
        content = read_torch_file(filename, self.key, lambda: self._trusted(filename))
        if filename.endswith(".pyth") and isinstance(content, Mapping):  # of pycls
            content = {**content, "matching_heuristics": True}
        return content

    def _load_model(self, checkpoint):
        state = checkpoint["model"]
        self.names = tuple(state)
        if checkpoint.pop("matching_heuristics", False):
            state = self._align(state, checkpoint.get("__author__") == "Caffe2")
        own = self.model.state_dict()
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        checkpoint["model"] = {
            name: self._fit(name, value, own[name], name in parameters) if name in own else value
            for name, value in state.items()
        }
        return super()._load_model(checkpoint)

    def _align(self, state: dict, from_caffe2: bool) -> dict:
        """detectron2's matching of names by their ends."""
        try:
            self._convert_ndarray_to_tensor(state)
            return align_and_update_state_dicts(self.model.state_dict(), state, from_caffe2)
        except Exception as error:  # it asserts on names and shapes
            raise ConfigError(
                f"{self.key}: the names in '{self._name}' cannot be matched to "
                f"{type(self.model).__name__}: {error}"
            ) from error

    def _fit(self, name: str, value, own: torch.Tensor, is_parameter: bool):
        """An entry as a tensor that may be copied; ConfigError if it cannot be meant for ``own``.

        Entries of another shape are left to the report of what does not fit.
        """
        if not isinstance(value, torch.Tensor):
            try:
                value = torch.from_numpy(value)
            except (TypeError, ValueError) as error:
                raise self._refuse(name, f"is an array of type {value.dtype}") from error
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            kind = "quantized" if value.is_quantized else "sparse"
            raise self._refuse(name, f"is {kind}, convert it to an ordinary tensor")
        if value.is_meta:
            raise self._refuse(name, "has no data (it was saved from the meta device)")
        if value.shape != own.shape:
            return value
        floating = value.dtype.is_floating_point
        if value.dtype.is_complex or (own.dtype.is_floating_point and not floating):
            raise self._refuse(name, f"is {_dtype(value)}, the model has {_dtype(own)}")
        converted = value.to(own.dtype)
        if own.dtype.is_floating_point:
            # a buffer may hold an infinity (masks of attention), never NaN
            bad = ~torch.isfinite(converted) if is_parameter else torch.isnan(converted)
            if bad.any():
                raise self._refuse(
                    name,
                    f"holds {int(bad.sum())} values of {bad.numel()} that are NaN or infinite"
                    + (f" as {_dtype(own)}" if torch.isfinite(value.double()).all() else "")
                    + ": the file is of a training that diverged, or damaged",
                )
        return converted

    def _refuse(self, name: str, what: str) -> ConfigError:
        return ConfigError(f"{self.key}: '{self._name}': {name} {what}")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Loaded:
    """What :func:`load_weights` did.

    Attributes:
        missing: parameters and buffers that the file did not hold, or held in another shape.
            ``pixel_mean``/``pixel_std`` come from the config and are never listed.
        names: of the state dict in the file.
    """

    missing: list[str]
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"its {len(self.names)} entries are {modules_in(self.names)}"


class _Noting(SafeCheckpointer):
    """Keeps what did not fit."""

    missing: tuple[str, ...] = ()

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        shapes = [name for name, *_ in incompatible.incorrect_shapes]
        self.missing = (*incompatible.missing_keys, *shapes)
        return incompatible


def load_weights(model: nn.Module, weights: str, key: str, allow_pickle: bool = False) -> Loaded:
    """Fill ``model`` from ``weights``.

    Args:
        model: a detectron2 meta-arch.
        weights: path or URL; the model zoo's names work as in detectron2.
        key: config key for messages.
        allow_pickle: the value of KD.ALLOW_PICKLE.

    Returns:
        What was missing, and what the file holds.
    """
    checkpointer = _Noting(model, key=key, allow_pickle=allow_pickle)
    checkpointer.load(weights)
    missing = {name for name in checkpointer.missing if not name.endswith(_FROM_CONFIG)}
    return Loaded(sorted(missing), checkpointer.names)


def load_detector(
    model: nn.Module, weights: str, key: str, allow_pickle: bool = False
) -> list[str]:
    """:func:`load_weights`, of which only the names that were missing are wanted."""
    return load_weights(model, weights, key, allow_pickle).missing


def load_run(wrapper: nn.Module, path: str, key: str, allow_pickle: bool = False) -> dict:
    """Student and imitation heads of a checkpoint that a distillation has written.

    Args:
        wrapper: the training model, with ``student`` and ``heads``.
        path: of the checkpoint.
        key: config key or flag that names it, for messages.
        allow_pickle: KD.ALLOW_PICKLE.

    Returns:
        The file's content.

    Raises:
        ConfigError: not such a file, or one of another student or of other heads.
    """
    missing = load_detector(wrapper.student, path, key, allow_pickle)
    content = read_torch_file(resolve_weights(path, key), key, allow_pickle)
    if missing or "distill" not in content:
        raise ConfigError(
            f"{key}: '{path}' holds no student with its imitation heads; give a checkpoint that "
            "distillation has written to its OUTPUT_DIR"
        )
    try:
        wrapper.heads.load_state_dict(content["distill"])
    except RuntimeError as error:
        raise ConfigError(
            f"{key}: the heads in '{path}' are not those of KD.HEADS and their settings: "
            f"{one_line(error)}"
        ) from error
    return content
