"""Registration of data sets: the known ones on import, those of KD.DATASETS from a config.

A data set named in the config needs no Python: class names, keypoint names, left/right pairs and
the skeleton are read from the annotation file's categories.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import ConfigError
from .check import load_checked
from .coco_fields import keypoint_names, skeleton
from .coco_json import inspect_annotations
from .sem_seg import register_sem_seg_datasets
from .shapes import register_shapes
from .slices import base_of, register_slice
from .unlabelled import register_folder
from .visdrone import register_visdrone

# metadata that give an index its meaning, and what is indexed
KINDS = {
    "thing_classes": "classes",
    "stuff_classes": "classes of pixels",
    "keypoint_names": "keypoints",
}
_LIMB_COLOURS = [(255, 128, 0), (0, 128, 255), (0, 200, 80), (230, 60, 160), (150, 90, 255)]
# name -> (json file, image folder, evaluator type)
_configured: dict[str, tuple[str, str, str]] = {}
_logger = logging.getLogger(__name__)

register_shapes()
register_visdrone()


def register_configured(cfg, class_order: Sequence[str] | None = None) -> None:
    """Register each ``[name, json file, image folder]`` of ``cfg.KD.DATASETS``.

    A fourth value is the data set's ``evaluator_type``, "coco" where there is none. Those of
    ``cfg.KD.SEM_SEG_DATASETS`` too (:mod:`.sem_seg`), parts of data sets that DATASETS.TRAIN or
    KD.UNLABELED.DATASETS names (:mod:`.slices`), and folders in the latter.

    In place of the image folder the name of another data set may stand, one that is registered or
    comes before, whose images they are. Paths may be relative to the working directory and may hold
    ``~`` and ``$VARIABLES``. Doing it again with the same entries changes nothing. Annotations are
    checked here, image files when the data set is loaded.

    Args:
        cfg: the config.
        class_order: names of the classes by index. A data set of KD.DATASETS that lists the same
            names in another order gets this one. None: that of the first of DATASETS.TRAIN.

    Raises:
        ConfigError: a malformed entry, a missing annotation file, or a name that already stands
            for another data set.
        DataError: see :func:`~projects.kd.data.coco_json.inspect_annotations`.
    """
    if class_order is None:
        trained = cfg.DATASETS.TRAIN[:1]
        class_order = names_by_kind([cfg], *trained).get("thing_classes", ()) if trained else ()
    for entry in _entries(cfg):
        register_coco_data(*entry, class_order=class_order)
    register_sem_seg_datasets(cfg)
    for name in (*cfg.DATASETS.TRAIN, *cfg.KD.UNLABELED.DATASETS):
        register_slice(name)
    for name in cfg.KD.UNLABELED.DATASETS:
        register_folder(name)


def names_by_kind(cfgs: Iterable, dataset: str) -> dict[str, list[str]]:
    """``thing_classes``, ``stuff_classes`` and ``keypoint_names`` of a data set, as far as known.

    Args:
        cfgs: whose KD.DATASETS and KD.SEM_SEG_DATASETS are asked first, in this order. They need
            not be registered, and the order of the names is that of the file.
        dataset: else it is a registered one. Of a part of a data set: those of the whole.

    Raises:
        ConfigError, DataError: as :func:`register_configured`.
    """
    dataset = base_of(dataset)
    for cfg in cfgs:
        for name, json_file, *_ in _entries(cfg):
            if name == dataset:
                _require_file(name, json_file)
                metadata = _metadata(inspect_annotations(json_file).categories, json_file)
                return {kind: metadata[kind] for kind in KINDS if kind in metadata}
        for entry in cfg.KD.SEM_SEG_DATASETS:
            if isinstance(entry, (list, tuple)) and len(entry) == 4 and entry[0] == dataset:
                return {"stuff_classes": list(entry[3])}
    if dataset not in MetadataCatalog:
        return {}
    metadata = MetadataCatalog.get(dataset)
    return {kind: list(metadata.get(kind)) for kind in KINDS if metadata.get(kind)}


def _entries(cfg) -> list[tuple[str, ...]]:
    """(name, json file, image folder) of KD.DATASETS, the evaluator type behind it if given."""
    entries = []
    for entry in cfg.KD.DATASETS:
        parts = list(entry) if isinstance(entry, (list, tuple)) else [entry]
        if len(parts) not in (3, 4) or not all(isinstance(part, str) and part for part in parts):
            raise ConfigError(
                f"KD.DATASETS: {entry} is not [name, json file, image folder], with evaluator_type "
                "as a fourth value if it is not coco"
            )
        above = {name: folder for name, _, folder, *_ in entries}
        folder = above.get(parts[2]) or _image_folder(parts[2])
        entries.append((parts[0], _expand(parts[1]), folder, *parts[3:]))
    return entries


def _image_folder(name: str) -> str:
    """A folder, or that of a registered data set where its name is given."""
    known = MetadataCatalog.get(name).get("image_root") if name in DatasetCatalog.list() else None
    return os.path.abspath(known) if known else _expand(name)


def register_coco_data(
    name: str,
    json_file: str,
    image_root: str,
    evaluator_type: str = "coco",
    class_order: Sequence[str] = (),
) -> None:
    """Register one COCO-format data set; see :func:`register_configured`."""
    facts = (json_file, image_root, evaluator_type)
    if name in _configured and _configured[name] != facts:
        raise ConfigError(
            f"KD.DATASETS: '{name}' is registered with {' and '.join(_configured[name])} already, "
            f"now it comes with {json_file} and {image_root} and {evaluator_type}: give one of "
            "them another name"
        )
    if name in DatasetCatalog.list() and name not in _configured:
        raise ConfigError(f"KD.DATASETS: '{name}' is an existing data set: choose another name")
    _require_file(name, json_file)
    metadata = _metadata(inspect_annotations(json_file).categories, json_file)
    is_mapped = _order_classes(metadata, class_order)
    if name in _configured:
        if MetadataCatalog.get(name).get("thing_classes") == metadata["thing_classes"]:
            return
        DatasetCatalog.pop(name, None)  # another config has another order
        MetadataCatalog.pop(name, None)
    if is_mapped:
        _logger.warning(
            f"{json_file}: '{name}' lists the classes in another order than the training set; they "
            f"are matched by name: {', '.join(metadata['thing_classes'][:8])}"
        )
    DatasetCatalog.register(name, lambda: load_checked(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        evaluator_type=evaluator_type,
        json_file=json_file,
        image_root=image_root,
        checked_annotations=True,
        **metadata,
    )
    _configured[name] = facts


def is_configured(name: str) -> bool:
    """True for data sets of KD.DATASETS."""
    return name in _configured


def keypoint_flip_map(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that a horizontal flip swaps: left_eye/right_eye, L-hip/R-hip, ..."""
    pairs = []
    for name in names:
        other = re.sub("left", "right", name)
        other = re.sub("Left", "Right", re.sub("LEFT", "RIGHT", other))
        other = re.sub(r"(?<![a-zA-Z])l(?![a-zA-Z])", "r", other)
        other = re.sub(r"(?<![a-zA-Z])L(?![a-zA-Z])", "R", other)
        if other != name and other in names:
            pairs.append((name, other))
    return pairs


def _expand(path: str) -> str:
    return os.path.abspath(os.path.expanduser(os.path.expandvars(path)))


def _require_file(name: str, json_file: str) -> None:
    if not os.path.isfile(json_file):
        raise ConfigError(f"KD.DATASETS: '{name}': there is no annotation file {json_file}")


def _order_classes(metadata: dict, names: Sequence[str]) -> bool:
    """Give the classes of metadata this order, if they are the same ones in another."""
    own, names = metadata["thing_classes"], list(names)
    if own == names or sorted(own) != sorted(names):
        return False
    metadata["thing_classes"] = names
    metadata["thing_dataset_id_to_contiguous_id"] = {
        number: names.index(own[index])
        for number, index in metadata["thing_dataset_id_to_contiguous_id"].items()
    }
    return True


def _metadata(categories: list[dict], json_file: str) -> dict:
    """detectron2 metadata of COCO categories, which come by ascending id."""
    metadata = {
        "thing_classes": [category["name"] for category in categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
    }
    with_keypoints = [category for category in categories if keypoint_names(category)]
    if not with_keypoints:
        return metadata
    names = keypoint_names(with_keypoints[0])
    if any(keypoint_names(category) != names for category in with_keypoints):
        _logger.warning(
            f"{json_file}: categories differ in their keypoints; keypoints are not registered"
        )
        return metadata
    limbs = next((skeleton(c) for c in with_keypoints if skeleton(c)), [])
    return metadata | {
        "keypoint_names": names,
        "keypoint_flip_map": keypoint_flip_map(names),
        "keypoint_connection_rules": [
            (names[a - 1], names[b - 1], _LIMB_COLOURS[i % len(_LIMB_COLOURS)])
            for i, (a, b) in enumerate(limbs)
            if 1 <= min(a, b) and max(a, b) <= len(names)
        ],
    }
