"""What a file of weights holds: told from its content, read without running code from it."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError

# First bytes of what people take for weights, and what to say.
_OTHERS = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file: fetch it with 'git lfs pull'",
    ),
    (b"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (b"\xfd7zXZ", "is compressed with xz: unpack it first"),
    (b"BZh", "is compressed with bzip2: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it first"),
    (b"\x89HDF", "is an HDF5 file (Keras?), not one of torch or safetensors"),
    (b"<!doctype", "is a web page: the download went to another place"),
    (b"<html", "is a web page: the download went to another place"),
)
# Entries that hold the weights of the model itself, the usual name first.
_CONTAINERS = ("model", "state_dict", "model_state_dict", "model_state", "net", "weights")
_DEPTH = 3  # containers in containers


def read_torch_file(path: str, key: str, trusted: bool | Callable[[], bool] = False) -> Any:
    """What ``torch.save`` or safetensors wrote, on the CPU, told apart by the first bytes.

    Torch files are read with ``weights_only``, and unpickled fully only when ``trusted``. The
    checksums of a torch archive are compared, which torch itself does not do.

    Args:
        path: a local file.
        key: the config key or flag that names it, for messages.
        trusted: whether code in the file may run, or a function that says so when it is asked.

    Raises:
        ConfigError: one line with ``key`` and ``path``: truncated, damaged, no checkpoint, or code
            inside.
    """
    kind = _kind(path, key)
    if kind == "safetensors":
        return _read_safetensors(path, key)
    if kind == "zip":
        _check_archive(path, key)
    try:
        return _torch_load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        holds_code = "weights_only" in str(error).lower() or "Unsupported" in str(error)
        if not holds_code:
            raise _torn(path, key) from error
        if not (trusted() if callable(trusted) else trusted):
            raise ConfigError(
                f"{key}: '{path}' holds more than tensors, reading it runs code from the file; "
                "set KD.ALLOW_PICKLE True if you trust it, or save only its state dict"
            ) from error
    except Exception as error:  # a torn file can raise anything
        raise _torn(path, key) from error
    try:
        return _torch_load(path, weights_only=False)
    except Exception as error:
        raise _torn(path, key) from error


def _torch_load(path: str, weights_only: bool) -> Any:
    # an open file, as newer versions of torch believe a name that ends in .safetensors
    with open(path, "rb") as file:
        return torch.load(file, map_location="cpu", weights_only=weights_only)


def read_pickle(path: str, key: str) -> Any:
    """Unpickle a file, which RUNS CODE from it; the caller has to have asked."""
    try:
        with open(path, "rb") as file:
            return pickle.load(file, encoding="latin1")
    except Exception as error:  # whatever the bytes do
        raise _torn(path, key) from error


def is_plain_pickle(path: str, key: str) -> bool:
    """Whether a file named ``.pkl`` is one: no torch archive or safetensors under that name."""
    return _kind(path, key) == "other"


def _torn(path: str, key: str) -> ConfigError:
    return ConfigError(f"{key}: '{path}' is truncated or not a checkpoint")


def _kind(path: str, key: str) -> str:
    """ "zip", "safetensors" or "other" (torch's old format, or a pickle)."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ConfigError(f"{key}: '{path}' cannot be read: {error.strerror}") from error
    for magic, what in _OTHERS:
        if head.lstrip().lower().startswith(magic) or head.startswith(magic):
            raise ConfigError(f"{key}: '{path}' {what}")
    if head[:1] == b"\x08" and head[2:3] == b"\x12":  # ir_version and producer_name of the format
        raise ConfigError(
            f"{key}: '{path}' is an ONNX graph, good for inference: name a checkpoint"
        )
    if head.startswith(b"PK"):
        return "zip"
    starts = head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8
    pickled = head.startswith(b"\x80")
    return "safetensors" if starts or path.endswith(".safetensors") and not pickled else "other"


def _read_safetensors(path: str, key: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        text = f"is truncated or not a safetensors file ({error})"
        raise ConfigError(f"{key}: '{path}' {text}") from error


def _check_archive(path: str, key: str) -> None:
    """ConfigError for a zip file that is torn, damaged, or not what ``torch.save`` writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            # torch can be told to leave checksums out, they are all 0 then
            damaged = archive.testzip() if stored and any(e.CRC for e in entries) else None
    except Exception as error:  # zipfile raises many kinds on a torn file
        raise _torn(path, key) from error
    if damaged is not None:
        raise ConfigError(
            f"{key}: '{path}' is damaged: its part {damaged} does not have the checksum it was "
            "saved with; copy or download it again"
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise ConfigError(
            f"{key}: '{path}' is a TorchScript program, not a checkpoint; save a state dict"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise ConfigError(f"{key}: '{path}' is a zip archive, not a checkpoint: unpack it first")


def is_array(value: Any) -> bool:
    """What a state dict may hold."""
    return isinstance(value, (torch.Tensor, np.ndarray))


def state_dicts(content: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple, dict]]:
    """All state dicts (names to arrays) in what a file holds, each with the keys that lead to it.

    What else lies between the arrays (numbers, metadata) is left out; where arrays are the smaller
    part it is no state dict.
    """
    if not isinstance(content, Mapping):
        return
    arrays = {k: v for k, v in content.items() if isinstance(k, str) and is_array(v)}
    if arrays and 2 * len(arrays) >= len(content):
        yield place, arrays
    if len(place) < _DEPTH:
        for name, value in content.items():
            if isinstance(name, str):
                yield from state_dicts(value, (*place, name))


def choose_state(
    content: Any, wanted: Mapping[str, Any], key: str, path: str
) -> tuple[tuple[str, ...], dict]:
    """The state dict in a file that fits a model, under the model's names.

    A prefix that tools put before all names (``module.``, ``model.``, ``student.``, ...) is taken
    away. ``model`` is preferred, as in detectron2, then the usual names, then what fits best.

    Args:
        content: of the file.
        wanted: the model's state dict.
        key, path: for messages.

    Returns:
        The keys that lead to the state dict, and the state dict.

    Raises:
        ConfigError: none is there, or several fit equally well.
    """
    found = [(place, *_unwrap(state, wanted)) for place, state in state_dicts(content)]
    if not found:
        raise ConfigError(
            f"{key}: '{path}' holds no state dict (names to arrays), it holds {describe(content)}"
        )
    found.sort(key=lambda item: _rank(item[0]))
    best = max(fits for *_, fits in found)
    if best == 0:  # bare backbones and foreign names: the caller decides
        return found[0][0], found[0][1]
    if not (found[0][0] in ((), ("model",)) and found[0][3]):
        found = [item for item in found if 2 * item[3] > best]
    place, state, prefixes, _ = found[0]
    rivals = [item for item in found[1:] if _rank(item[0]) == _rank(place)]
    if rivals and not any(place == item[0][: len(place)] for item in rivals):
        names = ", ".join(f"'{'.'.join(item[0])}'" for item in found)
        raise ConfigError(
            f"{key}: '{path}' holds several models, under {names}; save the one that is meant"
        )
    if len(prefixes) > 1:
        names = ", ".join(f"'{prefix}'" for prefix in prefixes)
        raise ConfigError(
            f"{key}: '{path}' holds several models, with the prefixes {names}; save the one that "
            "is meant, without prefix"
        )
    prefix = prefixes[0]
    return place, {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def _rank(place: tuple[str, ...]) -> tuple[int, int]:
    known = [_CONTAINERS.index(x) if x in _CONTAINERS else len(_CONTAINERS) for x in place]
    return (max(known, default=0), len(place) if known and max(known) < len(_CONTAINERS) else 0)


def _unwrap(state: dict, wanted: Mapping) -> tuple[dict, list[str], int]:
    """The state dict without torch.compile's marks, the prefixes that fit, and how many names do.

    The first prefix is "" where names fit as they are.
    """
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    counts: dict[str, int] = {}
    for name in state:
        start = 0
        while start >= 0:
            if name[start:] in wanted:
                counts[name[:start]] = counts.get(name[:start], 0) + 1
            dot = name.find(".", start)
            start = dot + 1 if dot >= 0 else -1
    most = max(counts.values(), default=0)
    if counts.get("", 0) and 2 * counts[""] >= most:
        return state, [""], counts[""]
    return state, [p for p, n in counts.items() if 2 * n > most] or [""], most


def describe(content: Any, most: int = 4) -> str:
    """What a file holds, in a few words."""
    if is_array(content):
        return f"a single array of shape {tuple(content.shape)}"
    if isinstance(content, Mapping):
        parts = [f"{k} ({type(v).__name__})" for k, v in list(content.items())[:most]]
        more = f" and {len(content) - most} more" if len(content) > most else ""
        return f"a dict with {', '.join(parts) or 'nothing in it'}{more}"
    return f"a {type(content).__name__}"


def modules_in(names: Iterable[str], most: int = 5) -> str:
    """Names of a state dict by their first two parts, with numbers: ``head.cls_score (2)``."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    parts = [f"{name} ({count})" for name, count in list(counts.items())[:most]]
    more = f" and {len(counts) - most} more modules" if len(counts) > most else ""
    return (", ".join(parts) or "none") + more
