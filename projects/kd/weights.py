"""Reading weights into a detector, without running code from files nobody vouched for."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .errors import ConfigError
from .files import is_zoo_file, resolve_weights

logger = logging.getLogger(__name__)


class SafeCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer with ``weights_only`` reading and one-line errors.

    ``.pth`` files are read with ``torch.load(weights_only=True)``. Pickle files run code when they
    are read: only the model zoo's own names, or any with ``allow_pickle``, are opened.

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
        self._name = ""

    def load(self, path, *args, **kwargs):
        """As in detectron2; ConfigError for a missing, truncated or forbidden file."""
        self._name = path
        self._parsed_url_during_load = None  # a load that failed before must not block this one
        if path:
            resolve_weights(path.split("?")[0], self.key)
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename):
        if filename.endswith(".pkl") and not self._trusted():
            raise ConfigError(
                f"{self.key}: '{self._name}' is a pickle file, reading it runs code from the "
                "file; set KD.ALLOW_PICKLE True if you trust it"
            )
        try:
            loaded = super()._load_file(filename)
        except ConfigError:
            raise
        except Exception as error:  # unpickling a torn file can raise anything
            raise ConfigError(
                f"{self.key}: '{self._name}' is truncated or not a checkpoint ({error})"
            ) from error
        state = loaded["model"]
        arrays = (torch.Tensor, np.ndarray)
        if not (isinstance(state, dict) and all(isinstance(x, arrays) for x in state.values())):
            raise ConfigError(
                f"{self.key}: '{self._name}' holds no state dict (names to arrays) under 'model'"
            )
        return loaded

    def _trusted(self) -> bool:
        return self.allow_pickle or is_zoo_file(self._name)

    def _torch_load(self, filename):
        return read_torch_file(filename, self.key, self._trusted())


def read_torch_file(path: str, key: str, trusted: bool = False):
    """``torch.load`` onto the CPU with ``weights_only``; full unpickling only when ``trusted``.

    Raises:
        ConfigError: one line with ``key`` and ``path``: truncated, no checkpoint, or code inside.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        holds_code = "weights_only" in str(error).lower() or "Unsupported" in str(error)
        if not trusted and holds_code and not _is_torn(path):
            raise ConfigError(
                f"{key}: '{path}' holds more than tensors, reading it runs code from the file; "
                "set KD.ALLOW_PICKLE True if you trust it, or save only its state dict"
            ) from error
        if not trusted:
            raise ConfigError(f"{key}: '{path}' is truncated or not a checkpoint") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{key}: '{path}' is truncated or not a checkpoint") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise ConfigError(f"{key}: '{path}' is truncated or not a checkpoint") from error


def _is_torn(path: str) -> bool:
    """A zip file that lost its end (torch saves zip archives)."""
    import zipfile

    with open(path, "rb") as file:
        return file.read(2) == b"PK" and not zipfile.is_zipfile(path)


def load_detector(
    model: nn.Module, weights: str, key: str, allow_pickle: bool = False
) -> list[str]:
    """Fill ``model`` from ``weights`` and list the parameters and buffers that were not in it.

    Args:
        model: a detectron2 meta-arch.
        weights: path or URL; the model zoo's names work as in detectron2.
        key: config key for messages.
        allow_pickle: the value of KD.ALLOW_PICKLE.

    Returns:
        Names of parameters and buffers that the file did not hold, or held in another shape.
        ``pixel_mean``/``pixel_std`` come from the config and are never listed.
    """
    checkpointer = SafeCheckpointer(model, key=key, allow_pickle=allow_pickle)
    missing: list[str] = []
    load_model = checkpointer._load_model

    def load_and_note(checkpoint):
        incompatible = load_model(checkpoint)
        if incompatible is not None:
            missing.extend(incompatible.missing_keys)
            missing.extend(name for name, *_ in incompatible.incorrect_shapes)
        return incompatible

    checkpointer._load_model = load_and_note
    checkpointer.load(weights)
    counters = ("num_batches_tracked", "pixel_mean", "pixel_std")
    return sorted({name for name in missing if not name.endswith(counters)})
