"""What a config's place decides: relative names in it, and its OUTPUT_DIR."""

from __future__ import annotations

import os

from ..files import beside
from .teachers import GROUP, given_teachers

# keys whose relative value is looked for beside the file that holds it, as _BASE_ is
RELATIVE_KEYS = (
    "KD.TEACHER.CONFIG_FILE",
    "KD.TEACHER.WEIGHTS",
    "MODEL.WEIGHTS",
    "MODEL.TIMM.WEIGHTS",
)


def resolve_relative(raw: dict, path: str) -> None:
    """Turn the relative names in a config file into paths, where such files lie beside it.

    Args:
        raw: the file's content; it is changed.
        path: the file.
    """
    several = given_teachers(raw)
    own = [f"{GROUP}.{name}.{key}" for name in several for key in ("CONFIG_FILE", "WEIGHTS")]
    for key in (*RELATIVE_KEYS, *own):
        *groups, last = key.split(".")
        node = raw
        for group in groups:
            node = node.get(group) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(last), str) and node[last]:
            node[last] = beside(node[last], os.path.dirname(path))


def default_output(path: str) -> str:
    """OUTPUT_DIR of a config that names none: ``output/`` and its path below ``configs/``.

    Args:
        path: the config file; one that lies in no folder ``configs`` goes by its name alone.
    """
    *folders, name = os.path.abspath(path).split(os.sep)
    if "configs" in folders:
        last = len(folders) - 1 - folders[::-1].index("configs")
        folders = folders[last + 1 :]
    else:
        folders = []
    return "/".join(("output", *folders, os.path.splitext(name)[0]))
