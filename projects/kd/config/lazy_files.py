"""LazyConfig files: read into a config that carries both their parts and this project's keys.

The ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and ``train`` of a file are used as
they are. What this project's code asks a config for (MODEL.DEVICE, SOLVER.MAX_ITER, DATASETS.TRAIN,
...) is read from them into the keys of the same meaning, :data:`ALIASES`; KD comes from the file's
``kd``. Everything else of the config has detectron2's defaults and no effect.
"""

from __future__ import annotations

import builtins
import os
import re
from collections.abc import Mapping, Sequence

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..errors import ConfigError, UserError
from ..files import beside
from .config_paths import default_output, resolve_relative

# this project's key -> the place in a LazyConfig file that it is read from
ALIASES = {
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "CUDNN_BENCHMARK": "train.cudnn_benchmark",
    "MODEL.DEVICE": "train.device",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.AMP.DTYPE": "train.amp.dtype",
    "SOLVER.DDP_FIND_UNUSED_PARAMETERS": "train.ddp.find_unused_parameters",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.KEEP_CHECKPOINTS": "train.checkpointer.max_to_keep",
    "SOLVER.GATHER_METRIC_PERIOD": "train.log_period",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.WEIGHT_DECAY": "optimizer.weight_decay",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": "dataloader.train.dataset.filter_empty",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "INPUT.FORMAT": "dataloader.train.mapper.image_format",
    "INPUT.MASK_FORMAT": "dataloader.train.mapper.instance_mask_format",
    "MODEL.PIXEL_MEAN": "model.pixel_mean",
    "MODEL.PIXEL_STD": "model.pixel_std",
    **{
        f"MODEL.{name}.NUM_CLASSES": "model.num_classes"
        for name in ("RETINANET", "FCOS", "GFL", "REPPOINTS", "CONDITIONAL_DETR")
    },
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "model.sem_seg_head.num_classes",
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": "model.sem_seg_head.ignore_value",
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": "model.roi_heads.keypoint_head.num_keypoints",
}
# keys of this project that act on a LazyConfig student, beside ALIASES and KD
ACTING = (
    "SOLVER.ACCUM_STEPS",
    "SOLVER.EMA",
    "SOLVER.CLIP_GRADIENTS",
    "SOLVER.CHANNELS_LAST",
    "SOLVER.SAFETENSORS",
    "DATALOADER.IMAGE_CHECK_SECONDS",
    "INPUT.WHITE",
    "TEST.AUG",
    "TEST.BEST_METRIC",
    "TEST.BEST_MODE",
    "TEST.PATIENCE",
    "TEST.PRECISE_BN",
    "TEST.TILES",
    "TEST.EXPECTED_RESULTS",
)
# What the project or detectron2's own training script reads of ``train``.
_TRAIN_KEYS = (
    *("output_dir", "init_checkpoint", "max_iter", "amp", "ddp", "checkpointer", "eval_period"),
    *("log_period", "device", "seed", "cudnn_benchmark"),
)
LISTS = ("DATASETS.TRAIN", "DATASETS.TEST")
_STOCK_OUTPUT = "./output"  # what detectron2's common/train.py has for every file


class LazyNode(CN):
    """A config whose detector, data and optimizer come from a LazyConfig file.

    Attributes:
        lazy: the file's parts with all overrides, a ``DictConfig``; ALIASES are read from it.
        path: the file.
    """

    def holds(self, key: str) -> bool:
        """Whether the file says what a key of MODEL or INPUT says, or the key acts by itself."""
        place = ALIASES.get(key)
        if key in ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"):
            return test_resize(self.lazy) is not None
        return select(self.lazy, place) is not None if place else not key.startswith("MODEL.")

    def shown(self, key: str) -> str:
        """A key's name for messages, with its place in the file."""
        return f"{ALIASES[key]} ({key})" if self.holds(key) and key in ALIASES else key

    @classmethod
    def _decode_cfg_value(cls, value):
        return CN._decode_cfg_value(value)  # its groups are ordinary nodes

    def dump(self, **kwargs) -> str:
        """As yacs, with what only the file holds under its own names (callables as text)."""
        text = super().dump(**kwargs)
        rest = plain(self.lazy)
        for place in ALIASES.values():
            _drop(rest, place.split("."))
        return text + yaml.safe_dump(rest, sort_keys=True)


def lazy_of(cfg) -> DictConfig | None:
    """The LazyConfig parts of a config, None of one that is read from YAML."""
    return cfg.lazy if isinstance(cfg, LazyNode) else None


def is_lazy_file(path: str) -> bool:
    """Whether a config file is a LazyConfig."""
    return path.endswith(".py")


def load_lazy(path: str) -> tuple[DictConfig, CN]:
    """Execute a LazyConfig file; this RUNS ITS CODE, as detectron2 does.

    Args:
        path: the file.

    Returns:
        (its parts without ``kd``, the node ``{"KD": {...}}`` of its ``kd`` with names in capitals).

    Raises:
        ConfigError: it cannot be executed, or has no model.
    """
    own_import = builtins.__import__
    try:
        lazy = LazyConfig.load(path)
    except Exception as error:
        raise ConfigError(
            f"{path}: cannot be read as a LazyConfig ({type(error).__name__}: {error})"
        ) from error
    finally:
        builtins.__import__ = own_import  # detectron2 leaves its own behind after an error
    if not isinstance(lazy.get("model"), DictConfig) or "_target_" not in lazy.model:
        raise ConfigError(
            f"{path}: a LazyConfig needs a model, e.g. model = LazyCall(RetinaNet)(...)"
        )
    kd = lazy.pop("kd") if "kd" in lazy else {}
    raw = CN({"KD": capitals(plain(kd), path)})
    resolve_relative(raw, path)
    return lazy, raw


def capitals(node: dict, path: str, prefix: str = "kd") -> dict:
    """Settings with their names in capitals, as the keys of KD are."""
    found: dict = {}
    for name, value in node.items():
        key = str(name).upper()
        if key in found:
            raise ConfigError(f"{path}: {prefix}.{name} stands twice, in two spellings")
        is_group = isinstance(value, dict)
        found[key] = capitals(value, path, f"{prefix}.{name}") if is_group else value
    return found


def with_floats(node: Mapping, like: Mapping) -> dict:
    """Settings in which a whole number stands as a float where ``like`` has a float."""
    found = {}
    for key, value in node.items():
        old = like.get(key)
        if isinstance(value, Mapping):
            value = with_floats(value, old if isinstance(old, Mapping) else {})
        found[key] = float(value) if isinstance(old, float) and type(value) is int else value
    return found


def plain(node):
    """A LazyConfig's content as dicts, lists, numbers and text; the rest as its name or repr."""
    if isinstance(node, (DictConfig, ListConfig)):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain(value) for value in node]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if callable(node) and hasattr(node, "__qualname__"):
        return _stable(f"{node.__module__}.{node.__qualname__}")
    return _stable(f"{type(node).__module__}.{type(node).__qualname__} {node!r}")


def _stable(text: str) -> str:
    """Text of an object without addresses and detectron2's random module names."""
    return re.sub(r" at 0x\w+|(?<=_cfg_loader)\w{4}\b", "", text)


def attach(cfg: CN, lazy: DictConfig, path: str) -> LazyNode:
    """The config that carries ``lazy``, its keys read from it.

    Args:
        cfg: with all keys of the project, and KD as the file says.
        lazy: of :func:`load_lazy`.
        path: the file.
    """
    node = LazyNode()
    node.update(cfg)
    vars(node).update(vars(cfg), lazy=lazy, path=path)
    lazy.setdefault("train", {})
    if lazy.train.get("output_dir", _STOCK_OUTPUT) == _STOCK_OUTPUT:
        lazy.train.output_dir = default_output(path)
    weights = lazy.train.get("init_checkpoint", "")
    if weights:
        lazy.train.init_checkpoint = beside(str(weights), os.path.dirname(path))
    project(node)
    return node


def project(cfg: LazyNode, before: DictConfig | None = None) -> None:
    """Read :data:`ALIASES`, and what else the project asks a config for, from the file's parts.

    Args:
        cfg: changed in place.
        before: the parts before an override; what is the same in them stays as it is in ``cfg``.
    """
    lazy = cfg.lazy
    for key, place in ALIASES.items():
        value = select(lazy, place)
        old = None if before is None else select(before, place)
        group = key.rpartition(".")[0].split(".")[1:]
        if group and group[0] not in cfg[key.partition(".")[0]]:
            continue  # a detector whose keys are not registered
        if value is not None and value != old:
            put(cfg, key, _as_key(key, value))
    for key in LISTS:
        if select(lazy, ALIASES[key]) is None:
            put(cfg, key, ())
    model = lazy.model
    cfg.MODEL.META_ARCHITECTURE = target_name(model)
    heads = model.get("roi_heads")
    for key, part in (("MASK_ON", "mask_head"), ("KEYPOINT_ON", "keypoint_head")):
        cfg.MODEL[key] = isinstance(heads, DictConfig) and heads.get(part) is not None
    if select(lazy, ALIASES["INPUT.FORMAT"]) is None:
        cfg.INPUT.FORMAT = model.get("input_format") or "BGR"
    resize = test_resize(lazy)
    if resize is not None:
        edge = resize.get("short_edge_length")
        cfg.INPUT.MIN_SIZE_TEST = edge if isinstance(edge, int) else min(edge)
        cfg.INPUT.MAX_SIZE_TEST = min(int(resize.get("max_size") or 10**6), 10**6)


def built(cfg: LazyNode, place: str, node=None):
    """A part of the file, instantiated.

    Args:
        cfg: of a LazyConfig.
        place: e.g. "lr_multiplier".
        node: what is instantiated in place of what stands there.

    Raises:
        ConfigError: what it calls fails; names the file and the place.
    """
    try:
        return instantiate(select(cfg.lazy, place) if node is None else node)
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{cfg.path}: {place} cannot be instantiated ({type(error).__name__}: {error})"
        ) from error


def test_resize(lazy: DictConfig) -> DictConfig | None:
    """The ResizeShortestEdge of ``dataloader.test``, None where there is none."""
    found = select(lazy, "dataloader.test.mapper.augmentations") or ()
    nodes = (x for x in found if isinstance(x, DictConfig) and "_target_" in x)
    return next((x for x in nodes if target_name(x) == "ResizeShortestEdge"), None)


def _as_key(key: str, value):
    if key in LISTS:
        return (value,) if isinstance(value, str) else tuple(value)
    if isinstance(value, (DictConfig, ListConfig)):
        return OmegaConf.to_container(value)
    return value


def target_name(node: DictConfig) -> str:
    """The name of the class or function that a LazyCall calls."""
    target = node.get("_target_")
    return str(target).rpartition(".")[2] if isinstance(target, str) else target.__name__


def put(cfg: CN, key: str, value) -> None:
    """Set a dotted key of a config."""
    *groups, last = key.split(".")
    for group in groups:
        cfg = cfg[group]
    cfg[last] = value


def select(lazy: DictConfig, place: str):
    """What stands at a dotted place of a file's parts, None where there is nothing."""
    try:
        return OmegaConf.select(lazy, place, default=None)
    except Exception as error:  # an interpolation to nowhere
        raise ConfigError(f"{place} of the LazyConfig cannot be read: {error}") from error


def _drop(node, parts: Sequence[str]) -> None:
    for part in parts[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(parts[-1], None)


def unread(lazy: DictConfig) -> list[str]:
    """Settings of ``train`` that nothing here reads."""
    known = {*_TRAIN_KEYS, *(x.split(".")[1] for x in ALIASES.values() if x.startswith("train."))}
    return [f"train.{name}" for name in lazy.get("train", {}) if name not in known]
