"""The values of the methods, ``configs/methods``: read by recipes, and by configs as their bases.

``<method>_<family>.yaml`` holds what a method sets for a family of detector, ``<method>.yaml`` what
it sets for every family that has no file of its own. The first line is a comment that says where
the values come from. KD.HEADS names the imitation heads; LEVELS of a head's node is taken by a
recipe as "so many of the finest levels that both sides have".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from detectron2.modeling import GeneralizedRCNN, SemanticSegmentor
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

from ..errors import ConfigError, did_you_mean
from ..files import shipped_configs

ONE_STAGE, TWO_STAGE, SEGMENTATION = "one-stage", "two-stage", "segmentation"
OTHER = "other"
_FAMILIES = (ONE_STAGE, TWO_STAGE, SEGMENTATION)


def family(detector: nn.Module) -> str:
    """The family of a detector; a subclass belongs to that of its base, and "other" is the rest."""
    if isinstance(detector, DenseDetector):
        return ONE_STAGE
    if isinstance(detector, SemanticSegmentor):
        return SEGMENTATION
    return TWO_STAGE if isinstance(detector, GeneralizedRCNN) else OTHER


def method_files() -> dict[tuple[str, str], str]:
    """The files of ``configs/methods`` by method and family ("" = for every family)."""
    folder = os.path.join(shipped_configs(), "methods")
    files = {}
    for name in sorted(os.listdir(folder)):
        stem, extension = os.path.splitext(name)
        if extension == ".yaml":
            end = next((x for x in _FAMILIES if stem.endswith("_" + x.replace("-", "_"))), "")
            method = stem[: -len(end) - 1] if end else stem
            files[method, end] = os.path.join(folder, name)
    return files


def method_names(wanted: str, heads: Iterable[str]) -> tuple[str, ...]:
    """The methods that a user has named.

    Args:
        wanted: names with commas between them, in any case, with or without underscores.
        heads: registry names of the imitation heads, each of which is a method as well.

    Returns:
        The registry name of a head, else the name in ``configs/methods``.

    Raises:
        ConfigError: a name that is neither.
    """
    known = {_plain(method): method for method, _ in method_files()}
    known |= {_plain(head): head for head in heads}
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if _plain(name) not in known:
            raise ConfigError(
                f"--method: no method or imitation head '{name}'; choose from "
                f"{', '.join(sorted(known.values(), key=str.lower))}"
                f"{did_you_mean(name, known.values())}"
            )
    return tuple(known[_plain(name)] for name in names)


def method_file(method: str, kind: str) -> str | None:
    """The file with the values of a method for a family of detector, None where there is none."""
    files = {(_plain(name), end): path for (name, end), path in method_files().items()}
    return files.get((_plain(method), kind), files.get((_plain(method), "")))


def families_of(method: str) -> list[str]:
    """The families that a method has values for; all where its file is for all."""
    ends = [end for name, end in method_files() if _plain(name) == _plain(method)]
    return list(_FAMILIES) if "" in ends else ends


def source_of(path: str) -> str:
    """Where the values of a method's file come from: its first line."""
    with open(path, encoding="utf-8") as file:
        return file.readline().lstrip("#").strip().rstrip(".")


def _plain(name: str) -> str:
    return re.sub(r"[_-]", "", name).lower()
