"""What a run needs of its data sets, checked before anything is built.

:func:`check_data_sets` is called once by :func:`projects.kd.check.check_config`, for every data set
of DATASETS.TRAIN and DATASETS.TEST. Checks that need the content of an annotation file take it from
:func:`~projects.kd.data.coco_json.read_coco`.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..errors import DataError
from .coco_json import CocoFile, read_coco


def check_data_sets(cfg: CfgNode, training: bool) -> None:
    """Check the annotation files of all data sets that this project reads itself.

    Args:
        cfg: with KD.DATASETS registered.
        training: False leaves DATASETS.TRAIN out.

    Raises:
        DataError, ConfigError: names the data set's file, or the key to change.
    """
    for name in cfg.DATASETS.TRAIN if training else ():
        if (data := checked_data(name)) is not None:
            _check_training_set(data)
    for name in cfg.DATASETS.TEST:
        if (data := checked_data(name)) is not None:
            _check_test_set(data)


def checked_data(name: str) -> CocoFile | None:
    """The content of a data set's annotation file; None for data sets that others load."""
    metadata = MetadataCatalog.get(name)
    return read_coco(metadata.json_file) if metadata.get("checked_annotations") else None


def _check_training_set(data: CocoFile) -> None:
    if not any(row["iscrowd"] == 0 for row in data.annotations):
        raise DataError(f"{data.path}: holds no annotation to train on")


def _check_test_set(data: CocoFile) -> None:
    if not data.images:
        raise DataError(f"{data.path}: 'images' is empty, there is nothing to evaluate on")
