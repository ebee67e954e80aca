"""Refuse what cannot work before anything is built, in one line that names the key."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY

from .config import lazy_of
from .config.key_checks import check_values
from .config.lazy_files import select
from .config.teachers import config_of, image_scale, teacher_names, told_of
from .data.classes import check_class_names
from .data.needs import check_data_sets
from .data.slices import base_of
from .data.unlabelled import KEY as UNLABELLED
from .data.unlabelled import check_unlabelled
from .detectors import class_key, class_names_of, configured_classes
from .distiller import DistillMetaArch
from .errors import ConfigError, did_you_mean
from .evaluation.evaluators import check_best_metric
from .evaluation.tiles import check_tiles
from .files import require_pickles, resolve_config, resolve_weights
from .foreign import foreign_scheme
from .heads.base import head_class
from .precision import cpu_computes_bfloat16
from .schedule import build_ramp

logger = logging.getLogger(__name__)


def check_config(cfg, training: bool = True) -> None:
    """Check a config before models and loaders are built.

    Args:
        cfg: with KD.DATASETS registered.
        training: False skips what only training needs (``--eval-only``).

    Raises:
        ConfigError: the first thing found wrong.
    """
    _check_meta_archs(cfg)
    _check_parts(cfg, training)
    check_values(cfg, training)
    _check_datasets(cfg, training)
    check_data_sets(cfg, training)
    check_class_names(cfg, training)
    check_tiles(cfg)
    _check_proposals(cfg, training)
    if training:
        if cfg.INPUT.CROP.AFTER_RESIZE and cfg.INPUT.DETR_AUGMENTATION:
            raise ConfigError("INPUT.CROP.AFTER_RESIZE: INPUT.DETR_AUGMENTATION has its own crop")
        _check_solver(cfg)
        check_best_metric(cfg)
        _check_writers(cfg)
        if cfg.KD.META_ARCHITECTURE:
            _check_teachers(cfg)
        elif cfg.KD.INIT_FROM_TEACHER:
            raise ConfigError("KD.INIT_FROM_TEACHER needs KD.META_ARCHITECTURE and a teacher")
        _warn_of_slow_bfloat16(cfg)


def _check_meta_archs(cfg) -> None:
    names = {"KD.META_ARCHITECTURE": cfg.KD.META_ARCHITECTURE}
    if lazy_of(cfg) is None:  # else the file names the class itself
        names["MODEL.META_ARCHITECTURE"] = cfg.MODEL.META_ARCHITECTURE
    for key, name in names.items():
        if name and name not in META_ARCH_REGISTRY:
            raise ConfigError(
                f"{key}: no meta-arch '{name}' is registered (is its module in KD.IMPORTS?)"
                + did_you_mean(name, [n for n, _ in META_ARCH_REGISTRY])
            )
    if _is_wrapper(cfg.MODEL.META_ARCHITECTURE):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, it names the deployed "
            "student; the training wrapper is KD.META_ARCHITECTURE"
        )
    if cfg.KD.META_ARCHITECTURE and not _is_wrapper(cfg.KD.META_ARCHITECTURE):
        raise ConfigError(
            f"KD.META_ARCHITECTURE is {cfg.KD.META_ARCHITECTURE}, a detector; it must be "
            'DistillMetaArch (or a subclass), or "" for ordinary training'
        )


def _check_parts(cfg, training: bool) -> None:
    """A LazyConfig that is trained has all that detectron2's training script asks for."""
    lazy = lazy_of(cfg)
    if lazy is None or not training:
        return
    places = ("dataloader.train", "optimizer", "lr_multiplier")
    missing = [place for place in places if select(lazy, place) is None]
    if missing:
        raise ConfigError(
            f"{cfg.path}: training needs {', '.join(missing)} too (detectron2's "
            "model_zoo/configs/common has them to import)"
        )


def _is_wrapper(name: str) -> bool:
    arch = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    return isinstance(arch, type) and issubclass(arch, DistillMetaArch)


def check_data_set(key: str, name: str) -> None:
    """ConfigError, which names ``key``, for a data set that is unknown or lacks files."""
    if name not in DatasetCatalog:
        near = difflib.get_close_matches(name, list(DatasetCatalog), n=3, cutoff=0.4)
        folder = ", and no such folder" if key == UNLABELLED else ""
        raise ConfigError(
            f"{key}: no data set '{name}' is registered{folder}; add it to KD.DATASETS"
            + (f" or use {' or '.join(near)}" if near else "")
        )
    _check_files(key, name)


def _check_datasets(cfg, training: bool) -> None:
    keys = {"DATASETS.TEST": cfg.DATASETS.TEST}
    if training:
        keys["DATASETS.TRAIN"] = cfg.DATASETS.TRAIN
        keys[UNLABELLED] = cfg.KD.UNLABELED.DATASETS
        if not (cfg.DATASETS.TRAIN or cfg.KD.UNLABELED.DATASETS or lazy_of(cfg)):
            raise ConfigError("DATASETS.TRAIN is empty: name a data set to train on")
        check_unlabelled(cfg)
    for key, names in keys.items():
        for name in names:
            if key == "DATASETS.TEST" and name in DatasetCatalog and base_of(name) != name:
                raise ConfigError(f"{key}: '{name}' is a part of a data set: name the whole one")
            check_data_set(key, name)
            if key != UNLABELLED:
                _check_classes(cfg, name)


def _check_files(key: str, dataset: str) -> None:
    metadata = MetadataCatalog.get(dataset)
    for folder in (metadata.get("image_dir"), metadata.get("gt_dir")):
        if folder and not os.path.isdir(folder):
            raise ConfigError(
                f"{key}: data set '{dataset}' needs the folder '{folder}'; put it there, or set "
                "the environment variable DETECTRON2_DATASETS (datasets/README.md)"
            )
    file = metadata.get("json_file")
    if file and "://" not in file and not metadata.get("made_on_first_use", False):
        if not os.path.isfile(file):
            how = metadata.get("made_by", "")
            how = f"make it with {how}" if how else "put it there"
            raise ConfigError(
                f"{key}: data set '{dataset}' needs the file '{file}'; {how}, or set the "
                "environment variable DETECTRON2_DATASETS (datasets/README.md)"
            )


def _check_proposals(cfg, training: bool) -> None:
    """Proposal files are pickles: they are read only when that is allowed."""
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for key in ("PROPOSAL_FILES_TEST", "PROPOSAL_FILES_TRAIN")[: 2 if training else 1]:
        require_pickles(cfg.DATASETS[key], f"DATASETS.{key}", cfg.KD.ALLOW_PICKLE)


def _check_classes(cfg, dataset: str) -> None:
    arch = cfg.MODEL.META_ARCHITECTURE
    names = MetadataCatalog.get(dataset).get(class_names_of(arch), ())
    value = configured_classes(cfg, arch)
    if value is None or not names:
        return
    if value != len(names):
        raise ConfigError(
            f"{class_key(arch)} is {value}, but data set '{dataset}' has {len(names)} classes"
        )


def _check_solver(cfg) -> None:
    solver = cfg.SOLVER
    if solver.AMP.ENABLED and solver.AMP.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        raise ConfigError("SOLVER.AMP.DTYPE: float16 needs a GPU; use bfloat16 on a CPU")
    if solver.EMA.EVAL_ONLY and not solver.EMA.ENABLED:
        raise ConfigError("SOLVER.EMA.EVAL_ONLY needs SOLVER.EMA.ENABLED True")


def _check_writers(cfg) -> None:
    for name in cfg.WRITERS.NAMES:
        if not importlib.util.find_spec(name):
            raise ConfigError(
                f"WRITERS.NAMES: {name} is not installed: pip install {name}, or take it out"
            )
    if cfg.TEST.PICTURES.PERIOD and not cfg.DATASETS.TEST:
        raise ConfigError("TEST.PICTURES.PERIOD needs a data set in DATASETS.TEST")


def _warn_of_slow_bfloat16(cfg) -> None:
    """A CPU without instructions for bfloat16 takes several times as long as with float32."""
    if cfg.MODEL.DEVICE != "cpu" or cpu_computes_bfloat16():
        return
    asked = []
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "bfloat16":
        asked.append("SOLVER.AMP.DTYPE")
    for name in teacher_names(cfg) if cfg.KD.META_ARCHITECTURE else ():
        if config_of(cfg, name).KD.TEACHER.DTYPE == "bfloat16":
            asked.append(f"KD.TEACHERS.{name}.DTYPE" if name else "KD.TEACHER.DTYPE")
    for key in asked:
        logger.warning(
            "%s: this CPU has no instructions for bfloat16, float32 is several times as fast", key
        )


def _check_teachers(cfg) -> None:
    """Each of KD.TEACHERS as if it were the only one, and what they must agree in."""
    kd = cfg.KD
    if kd.TEACHERS:
        for key, value, instead in (
            ("KD.TEACHER.CONFIG_FILE", kd.TEACHER.CONFIG_FILE, "name it among them"),
            ("KD.INIT_FROM_TEACHER", kd.INIT_FROM_TEACHER, "write it in the node of one of them"),
        ):
            if value:
                raise ConfigError(f"{key} is set, and so is KD.TEACHERS: {instead}")
    names = teacher_names(cfg)
    for name in names:
        with told_of(name):
            _check_distillation(config_of(cfg, name))
    image_scale(cfg)
    starts = [name for name in names if name and config_of(cfg, name).KD.INIT_FROM_TEACHER]
    if len(starts) > 1:
        raise ConfigError(
            f"KD.TEACHERS.{starts[1]}.INIT_FROM_TEACHER: the student starts from one teacher, here "
            f"are {' and '.join(starts)}"
        )


def _check_distillation(cfg) -> None:
    kd = cfg.KD
    if not kd.HEADS:
        raise ConfigError('KD.HEADS is empty: name imitation heads, or set KD.META_ARCHITECTURE ""')
    for name in kd.HEADS:
        head_class(name)
        if list(kd.HEADS).count(name) > 1:
            raise ConfigError(f"KD.HEADS names {name} twice")
        if name.upper() not in kd:
            raise ConfigError(f"KD.{name.upper()}: head {name} registered no config node")
        _check_ramp(cfg, name)
    if not kd.TEACHER.CONFIG_FILE:
        raise ConfigError("KD.TEACHER.CONFIG_FILE is empty: name the teacher's config")
    if not foreign_scheme(kd.TEACHER.CONFIG_FILE):
        resolve_config(kd.TEACHER.CONFIG_FILE, "KD.TEACHER.CONFIG_FILE")
    if kd.TEACHER.WEIGHTS and "://" not in kd.TEACHER.WEIGHTS:
        resolve_weights(kd.TEACHER.WEIGHTS, "KD.TEACHER.WEIGHTS")


def _check_ramp(cfg, name: str) -> None:
    ramp = build_ramp(cfg, name)
    where = f"KD.{name.upper()} (or KD)"
    if ramp.end != -1 and ramp.end < ramp.start:
        raise ConfigError(f"{where}: END_ITER {ramp.end} lies before START_ITER {ramp.start}")
