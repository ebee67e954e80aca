"""Parts of data sets by name: ``shapes_train[:150]`` are the first 150 images of ``shapes_train``.

Images count in the order of the data set, for COCO files that of ascending ids.
"""

from __future__ import annotations

import re

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import DataError

_FORM = re.compile(r"(?P<base>.+)\[(?P<start>\d*):(?P<stop>\d*)\]")
# of the whole file: what reads it by this name would not see the part
_OF_THE_FILE = ("name", "json_file", "checked_annotations")


def base_of(name: str) -> str:
    """The data set that a name is a part of; the name itself where it is none."""
    found = _FORM.fullmatch(name)
    return found["base"] if found else name


def register_slice(name: str) -> None:
    """Register ``base[start:stop]`` where ``base`` is registered; does nothing for other names."""
    found = _FORM.fullmatch(name)
    if not found or found["base"] not in DatasetCatalog:
        return
    base, ends = found["base"], [int(x) if x else None for x in (found["start"], found["stop"])]
    if name in DatasetCatalog:  # the classes of the base may have another order now
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    DatasetCatalog.register(name, lambda: _load(name, base, slice(*ends)))
    facts = MetadataCatalog.get(base).as_dict()
    kept = {key: value for key, value in facts.items() if key not in _OF_THE_FILE}
    MetadataCatalog.get(name).set(**kept)


def _load(name: str, base: str, part: slice) -> list[dict]:
    images = DatasetCatalog.get(base)
    if not isinstance(images, list):
        raise DataError(f"data set '{name}': '{base}' is no list, it has no parts")
    if not images[part]:
        raise DataError(f"data set '{name}' is empty: '{base}' has {len(images)} images")
    return images[part]
