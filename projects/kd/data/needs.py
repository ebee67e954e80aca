"""What a run needs of its data sets, checked before anything is built.

:func:`check_data_sets` is called once by :func:`projects.kd.check.check_config`, for every data set
of DATASETS.TRAIN and DATASETS.TEST. Counts of an annotation file come from
:func:`~projects.kd.data.coco_json.inspect_annotations`, which remembers them.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..errors import ConfigError, DataError
from .coco_json import CocoSummary, Tally, inspect_annotations
from .slices import base_of


def check_data_sets(cfg: CfgNode, training: bool) -> None:
    """Check the annotation files of all data sets that this project reads itself.

    Args:
        cfg: with KD.DATASETS registered.
        training: False leaves DATASETS.TRAIN out.

    Raises:
        DataError, ConfigError: names the data set's file, or the key to change.
    """
    if training:
        held = {name: checked_summary(name) for name in cfg.DATASETS.TRAIN}
        for name, summary in held.items():
            if summary is not None:
                _check_training_set(cfg, summary)
            _check_keypoints(cfg, name, summary, training=True)
        if held and all(x is not None and not x.objects.count for x in held.values()):
            paths = ", ".join(summary.path for summary in held.values())
            raise DataError(f"{paths}: no annotation to train on")
    for name in cfg.DATASETS.TEST:
        summary = checked_summary(name)
        if summary is not None and not summary.images:
            raise DataError(f"{summary.path}: 'images' is empty, there is nothing to evaluate on")
        _check_keypoints(cfg, name, summary, training=False)


def checked_summary(name: str) -> CocoSummary | None:
    """What a data set's annotation file holds; None for data sets that others load.

    Of a part of a data set: what the whole file holds.
    """
    metadata = MetadataCatalog.get(base_of(name))
    return inspect_annotations(metadata.json_file) if metadata.get("checked_annotations") else None


def _check_training_set(cfg: CfgNode, held: CocoSummary) -> None:
    if not held.images:
        raise DataError(f"{held.path}: 'images' is empty, there is nothing to train on")
    if not held.objects.count and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        raise DataError(
            f"{held.path}: no annotation to train on (beside others, images without objects can be "
            "background: DATALOADER.FILTER_EMPTY_ANNOTATIONS False)"
        )
    if cfg.MODEL.MASK_ON:
        _check_masks(cfg, held)


def _check_masks(cfg: CfgNode, held: CocoSummary) -> None:
    if held.no_mask.count:
        raise DataError(
            f"{held.path}: annotation {_counted(held.no_mask, held)} no segmentation, which "
            "MODEL.MASK_ON needs: add masks, or set MODEL.MASK_ON False"
        )
    if held.objects.count and held.bad_mask.count == held.objects.count:
        raise DataError(f"{held.path}: no mask can be used: {held.problems}")
    if held.runs.count and cfg.INPUT.MASK_FORMAT == "polygon":
        raise ConfigError(
            f"INPUT.MASK_FORMAT is polygon, but in {held.path} annotation "
            f"{_counted(held.runs, held)} run lengths (RLE): set it to bitmask"
        )


def _check_keypoints(cfg: CfgNode, name: str, held: CocoSummary | None, *, training: bool) -> None:
    if not cfg.MODEL.KEYPOINT_ON:
        return
    key, wanted = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    names = MetadataCatalog.get(name).get("keypoint_names")
    where = held.path if held is not None else f"data set '{name}'"
    if training and not names:
        raise DataError(
            f"{where}: MODEL.KEYPOINT_ON needs the names of the keypoints, one list "
            "'keypoints' that is the same in every category that has one"
        )
    count = len(names) if names else held.keypoint_count if held is not None else 0
    if count and count != wanted:
        raise ConfigError(f"{key} is {wanted}, but data set '{name}' has {count} keypoints")
    if training and held is not None and not held.labelled.count:
        listed = f" ({held.problems})" if held.problems.counts else ""
        raise DataError(
            f"{where}: MODEL.KEYPOINT_ON, but no annotation has keypoints of flag 1 or 2{listed}"
        )


def _counted(tally: Tally, held: CocoSummary) -> str:
    others = f" and {tally.count - 1} more of {held.objects.count} have" if tally.count > 1 else ""
    return f"{tally.first}{others or ' has'}"
