"""Registration of data sets with label maps, those of KD.SEM_SEG_DATASETS."""

from __future__ import annotations

import os
from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import ConfigError, DataError
from .images import IMAGE_SUFFIXES, image_header, image_size, turned_note

IGNORE = 255
_configured: dict[str, tuple] = {}  # name -> (image folder, label folder, classes)


def register_sem_seg_datasets(cfg) -> None:
    """Register each ``[name, image folder, label folder, classes]`` of ``cfg.KD.SEM_SEG_DATASETS``.

    Paths may be relative to the working directory and may hold ``~`` and ``$VARIABLES``. Doing it
    again with the same entries changes nothing.

    Raises:
        ConfigError: a malformed entry, a folder that does not exist, or a name that already stands
            for another data set.
    """
    for entry in cfg.KD.SEM_SEG_DATASETS:
        parts = list(entry) if isinstance(entry, (list, tuple)) else [entry]
        strings = parts[:3]
        if len(parts) == 4 and isinstance(parts[3], (list, tuple)):
            strings = [*parts[:3], *parts[3]]
        if (
            len(parts) != 4
            or len(strings) < 4
            or not all(isinstance(x, str) and x for x in strings)
        ):
            raise ConfigError(
                f"KD.SEM_SEG_DATASETS: {entry} is not [name, image folder, label folder, "
                "[class, ...]]"
            )
        register_sem_seg(parts[0], parts[1], parts[2], parts[3])


def register_sem_seg(name: str, image_root: str, label_root: str, classes: Sequence[str]) -> None:
    """Register one data set; see :func:`register_sem_seg_datasets`."""
    image_root, label_root = (
        os.path.abspath(os.path.expanduser(os.path.expandvars(x))) for x in (image_root, label_root)
    )
    facts = (image_root, label_root, tuple(classes))
    if _configured.get(name) == facts:
        return
    if name in DatasetCatalog.list():
        raise ConfigError(f"KD.SEM_SEG_DATASETS: '{name}' is an existing data set: rename it")
    if len(classes) > IGNORE:
        raise ConfigError(f"KD.SEM_SEG_DATASETS: '{name}': more than {IGNORE} classes")
    for folder in (image_root, label_root):
        if not os.path.isdir(folder):
            raise ConfigError(f"KD.SEM_SEG_DATASETS: '{name}': there is no folder {folder}")
    DatasetCatalog.register(name, lambda: load_sem_seg(image_root, label_root))
    MetadataCatalog.get(name).set(
        evaluator_type="sem_seg",
        image_root=image_root,
        sem_seg_root=label_root,
        stuff_classes=list(classes),
        ignore_label=IGNORE,
    )
    _configured[name] = facts


def load_sem_seg(image_root: str, label_root: str) -> list[dict]:
    """detectron2 dicts of all images of a folder and its subfolders.

    The label map of ``a/b.jpg`` is ``a/b.png`` in the label folder. Sizes come from the files'
    headers.

    Raises:
        DataError: no image, an image without a label map, one that cannot be read, or a label map
            of another size.
    """
    dicts = []
    for folder, _, files in sorted(os.walk(image_root)):
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() not in IMAGE_SUFFIXES:
                continue
            path = os.path.join(folder, file)
            inner = os.path.relpath(folder, image_root)
            labels = os.path.normpath(os.path.join(label_root, inner, stem + ".png"))
            if not os.path.isfile(labels):
                raise DataError(f"{path}: its label map is missing: no file {labels}")
            header = image_header(path)
            width, height = header.width, header.height
            found = image_size(labels)
            if found != (width, height):
                raise DataError(
                    f"{labels}: the label map has {found[0]}x{found[1]} pixels, its image {path} "
                    f"has {width}x{height}{turned_note(header)}"
                )
            dicts.append(
                {
                    "file_name": path,
                    "sem_seg_file_name": labels,
                    "image_id": os.path.relpath(path, image_root),
                    "height": height,
                    "width": width,
                }
            )
    if not dicts:
        raise DataError(f"{image_root}: no image ({', '.join(IMAGE_SUFFIXES)}) in it")
    return dicts
