"""KD.TEACHER.CACHE: what a frozen teacher's backbone gives for an image, kept and used again.

An answer is found by the pixels that the teacher sees, the size they are padded to, and all that
the answer depends on: weights, modules, normalisation, precision. So flips, and a few sizes, are
answers of their own, and a teacher or an image that has changed is never answered with something
old. Ours: methods that distil from stored outputs keep them by the name of the image, and
have to forbid augmentation for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from .config.lazy_files import LazyNode
from .data.cache import free_memory
from .errors import ConfigError
from .files import partial_name, writable_folder, write_atomically

MIB = 2**20
Answer = dict[str, torch.Tensor]  # of one image: level to (C, H, W) on the CPU

logger = logging.getLogger(__name__)


class FeatureCache:
    """Features of single images by key, in memory or in files, within a bound.

    They take 16 bits a value: bfloat16 and float16 stay what they are, float32 is rounded to
    float16 (an error of at most 5e-4 of a value). New answers are rounded like old ones, so that
    results do not depend on what was found.

    Args:
        capacity: bytes.
        folder: of the files, one for each answer; "" = in memory. Several processes and runs can
            share it, and it can be deleted at any time.
    """

    def __init__(self, capacity: int, folder: str = ""):
        self.capacity = capacity
        self.folder = folder
        self.taken = _size(folder) if folder else 0
        self.asked = self.found = 0
        self._kept: dict[str, Answer] = {}
        self._told: set[str] = set()

    def features(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], Mapping[str, torch.Tensor]],
        device: torch.device,
    ) -> dict[str, torch.Tensor]:
        """The levels of a batch.

        Args:
            keys: of its N images.
            compute: gives the levels (M, C, H, W) of the images at M places in the batch.
            device: where the result is to be.

        Returns:
            Level to (N, C, H, W).
        """
        answers: list = [self._get(key) for key in keys]
        missing = [n for n, answer in enumerate(answers) if answer is None]
        self.asked += len(keys)
        self.found += len(keys) - len(missing)
        if missing:
            new = compute(missing)
            for place, n in enumerate(missing):
                one = {level: _half(value[place]) for level, value in new.items()}
                answers[n] = one
                self._put(keys[n], one)
        near = device if missing else torch.device("cpu")  # one copy where all come from there
        return {
            level: _full(torch.stack([x[level].to(near) for x in answers]).to(device))
            for level in answers[0]
        }

    def hits(self) -> float | None:
        """Share of the images since the last call that were found; None = there were none."""
        asked, found, self.asked, self.found = self.asked, self.found, 0, 0
        return found / asked if asked else None

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, key[:2], f"{key}.safetensors")

    def _get(self, key: str) -> Answer | None:
        if not self.folder:
            return self._kept.get(key)
        try:
            return load_file(self._path(key))
        except (OSError, SafetensorError):  # not there, or deleted or cut off meanwhile
            return None

    def _put(self, key: str, answer: Answer) -> None:
        if any(x.dtype == torch.float32 for x in answer.values()):
            self._tell("range", "values beyond the range of float16: such answers are not kept")
            return
        data = save({level: x.contiguous() for level, x in answer.items()}) if self.folder else b""
        size = len(data) or sum(x.nbytes for x in answer.values())
        if self.taken + size > self.capacity:
            full = f"{self.taken / MIB:.1f} MiB are kept, no more fit (CACHE_MB or what is free)"
            self._tell("full", f"{full}: other answers are computed each time")
        elif not self.folder:
            self._kept[key] = {level: x.cpu().clone() for level, x in answer.items()}
            self.taken += size
        elif self._write(self._path(key), data):
            self.taken += size

    def _write(self, path: str, data: bytes) -> bool:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_atomically(path, data)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(partial_name(path))
            self._tell("disk", f"'{self.folder}': {error.strerror}: what is not there is computed")
            return False
        return True

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("KD.TEACHER.CACHE: %s", text)


def _half(value: torch.Tensor) -> torch.Tensor:
    """In 16 bits; as it is where that would be infinite."""
    if value.dtype != torch.float32:
        return value
    half = value.half()
    return half if half.isfinite().all() else value


def _full(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype == torch.float16 else value


def _size(folder: str) -> int:
    """Bytes of all files below a folder."""
    found = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # deleted meanwhile
                found += os.path.getsize(os.path.join(path, name))
    return found


def digest(*parts: bytes | str | torch.Tensor) -> str:
    """32 hexadecimal digits that stand for texts, bytes, and tensors with their type and shape."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, torch.Tensor):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def identity(model: nn.Module, *more: object) -> str:
    """What the answers of a teacher's backbone depend on but the image.

    Args:
        model: the teacher.
        *more: what else, as text.
    """
    backbone = model.backbone
    tensors = {**backbone.state_dict(), "mean": model.pixel_mean, "std": model.pixel_std}
    parts = [x for name in sorted(tensors) for x in (name, tensors[name])]
    return digest(repr(backbone), *map(repr, more), *parts)


def expected_size(
    cfg: CfgNode, shapes: Mapping[str, ShapeSpec], canvas: tuple[int, int]
) -> tuple[int, int]:
    """How many answers training asks for an image, and the bytes of the largest.

    Args:
        cfg: the student's.
        shapes: of the levels that are kept.
        canvas: (height, width) of the largest image, as the teacher pads it. Where batches are
            padded to several sizes, there are as many answers for each.
    """
    sizes = len(set(cfg.INPUT.MIN_SIZE_TRAIN)) * (1 if cfg.INPUT.RANDOM_FLIP == "none" else 2)
    cells = [
        shape.channels * math.prod(-(-side // shape.stride) for side in canvas)
        for shape in shapes.values()
    ]
    return sizes, 2 * sum(cells)


def check_cache(cfg: CfgNode) -> None:
    """Refuse a cache where training never shows the teacher an image twice.

    Args:
        cfg: the student's, with one teacher.

    Raises:
        ConfigError: crops, or sizes drawn from a range.
    """
    kind, node = cfg.KD.TEACHER.CACHE, cfg.INPUT
    if kind == "off" or isinstance(cfg, LazyNode):  # what that does to images is not known here
        return
    why = ""
    if node.CROP.ENABLED or node.DETR_AUGMENTATION:
        key = "CROP.ENABLED" if node.CROP.ENABLED else "DETR_AUGMENTATION"
        why = f"INPUT.{key} cuts another part of an image each time"
    elif node.MIN_SIZE_TRAIN_SAMPLING == "range" and len(set(node.MIN_SIZE_TRAIN)) > 1:
        why = "INPUT.MIN_SIZE_TRAIN_SAMPLING 'range' draws another size each time"
    if why:
        raise ConfigError(
            f"KD.TEACHER.CACHE is '{kind}': {why}, so that no answer of the teacher could be used "
            "again; set it to off"
        )


def build_cache(cfg: CfgNode) -> FeatureCache | None:
    """The cache of KD.TEACHER, or None.

    Of what is free, a cache in memory takes half at most, one on the disk nine tenths.

    Args:
        cfg: the student's, with one teacher.

    Raises:
        ConfigError: a folder that cannot be written.
    """
    node = cfg.KD.TEACHER
    if node.CACHE == "off":
        return None
    folder = ""
    if node.CACHE == "disk":
        key = "KD.TEACHER.CACHE_DIR" if node.CACHE_DIR else "OUTPUT_DIR"
        folder = node.CACHE_DIR or os.path.join(cfg.OUTPUT_DIR, "teacher_cache")
        folder = writable_folder(folder, key)
    free = shutil.disk_usage(folder).free * 0.9 if folder else (free_memory() or 2**62) / 2
    bound = node.CACHE_MB * MIB
    cache = FeatureCache(bound, folder)
    kept = cache.taken
    capacity = int(min(bound, kept + free))
    if capacity < bound:
        logger.warning(
            "KD.TEACHER.CACHE %s: %.0f MiB (CACHE_MB is %d), of what is free",
            *(node.CACHE, capacity / MIB, node.CACHE_MB),
        )
    # each process counts what it adds itself
    cache.capacity = kept + max(capacity - kept, 0) // comm.get_local_size()
    return cache
