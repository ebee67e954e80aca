"""DATALOADER.CACHE: images that are kept, in memory or in a file of pixels, once they are read.

A worker process that has read an image puts it into one store that all of them share, until that is
full. Where the first augmentation is a resize to one size, as with a single INPUT.MIN_SIZE_TRAIN,
the resized image is kept, else the decoded one. What the model gets is the same to the bit.
"""

from __future__ import annotations

import logging
import math
import mmap
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.utils import comm

from ..config import register_config
from ..config.key_table import add_rule
from ..config.rules import COUNT, one_of
from ..files import writable_folder

SLOT = "cache_slot"  # of a data set dict: the number of its image in the store
_MIB = 2**20
_DTYPES = (np.dtype(np.uint8), np.dtype(np.float32))
# columns of the table: 1 + place (0 = not there), shape of the kept array, number of its type,
# (height, width) of the image as read
_COLUMNS = 7
_CGROUP_V1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")

logger = logging.getLogger(__name__)


@register_config
def add_cache_config(cfg: CfgNode) -> None:
    """Add DATALOADER.CACHE and CACHE_MB."""
    # Training images are kept once they are read, resized where INPUT resizes to one size and does
    # nothing before: "ram" = in memory, "disk" = as pixels in a file in OUTPUT_DIR, which is gone
    # when the run ends. "off" = each is read from its file each time. Results are the same.
    cfg.DATALOADER.CACHE = "off"
    # At most so many MiB on this machine, for all processes and their workers together. What does
    # not fit is read each time.
    cfg.DATALOADER.CACHE_MB = 2048


add_rule("DATALOADER.CACHE", one_of("off", "ram", "disk"))
add_rule("DATALOADER.CACHE_MB", COUNT)


class ImageStore:
    """Arrays by number that this process and those that it forks share.

    Args:
        slots: numbers are below it.
        capacity: bytes of all arrays together.
        folder: where their file lies; "" = in memory.
    """

    def __init__(self, slots: int, capacity: int, folder: str = ""):
        self.capacity = capacity
        self._file = tempfile.TemporaryFile(dir=folder) if folder else None
        self._memory = None if folder else mmap.mmap(-1, max(capacity, 1))
        # a shared mapping of its own; pages come into being when they are written
        self._state = mmap.mmap(-1, 8 * (2 + slots * _COLUMNS))
        numbers = np.frombuffer(self._state, np.int64)
        self._head, self._table = numbers[:2], numbers[2:].reshape(slots, _COLUMNS)
        self._lock = multiprocessing.Lock()

    def size(self, slot: int) -> tuple[int, int] | None:
        """(height, width) that the image of a slot had when it was read; None = not kept."""
        with self._lock:
            row = self._table[slot].tolist()
        return (row[5], row[6]) if row[0] else None

    def get(self, slot: int) -> np.ndarray | None:
        """A copy of the array (H, W, C) of a slot; None = not kept."""
        with self._lock:
            place, *shape, kind, _, _ = self._table[slot].tolist()
        if not place:
            return None
        dtype, count, start = _DTYPES[kind], math.prod(shape), place - 1
        if self._file is None:
            found = np.frombuffer(self._memory, dtype, count, start).copy()
        else:
            length = count * dtype.itemsize
            found = np.frombuffer(bytearray(_read(self._file.fileno(), length, start)), dtype)
        return found.reshape(shape)

    def put(self, slot: int, array: np.ndarray, size: tuple[int, int]) -> None:
        """Keep an array (H, W, C) of uint8 or float32, if there is room and it is not there.

        Args:
            slot: its number.
            array: the pixels.
            size: (height, width) of the image as read.
        """
        if array.dtype not in _DTYPES or array.ndim != 3:
            return
        # places of float32 arrays are multiples of 4
        length = -(-array.nbytes // 8) * 8
        with self._lock:
            start = int(self._head[0])
            if self._table[slot, 0] or self._head[1] or start + length > self.capacity:
                return
            self._head[0] = start + length
        pixels = np.ascontiguousarray(array).tobytes()
        if self._file is None:
            self._memory[start : start + len(pixels)] = pixels
        else:
            try:
                _write(self._file.fileno(), pixels, start)
            except OSError as error:  # the disk is full
                with self._lock:
                    first, self._head[1] = not self._head[1], 1
                if first:
                    logger.warning(
                        "DATALOADER.CACHE disk: %s in OUTPUT_DIR; what is not kept yet is read "
                        "from its file each time",
                        error.strerror,
                    )
                return
        with self._lock:  # another process may have been faster
            if not self._table[slot, 0]:
                kind = _DTYPES.index(array.dtype)
                self._table[slot] = (start + 1, *array.shape, kind, *size)

    def kept(self) -> tuple[int, int]:
        """How many arrays there are, and the bytes taken."""
        with self._lock:
            return int((self._table[:, 0] > 0).sum()), int(self._head[0])


def _read(file: int, length: int, start: int) -> bytes:
    parts = []
    while length:
        parts.append(os.pread(file, length, start))
        if not parts[-1]:
            raise OSError("DATALOADER.CACHE disk: the file of pixels was cut off")
        start, length = start + len(parts[-1]), length - len(parts[-1])
    return b"".join(parts)


def _write(file: int, data: bytes, start: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, start)
        view, start = view[done:], start + done


class ResizedInput(T.AugInput):
    """An image whose first transform, the same resize each time, may have been kept.

    Where it was, the image as read is never needed: the resize asks for its size alone.

    Args:
        store, slot: where the resized image is, or is to be put.
        read: gives the image as read.
        sem_seg: label map (H, W), or None.
    """

    def __init__(self, store: ImageStore, slot: int, read: Callable[[], np.ndarray], sem_seg=None):
        self._kept = store.get(slot)
        self._place = store, slot
        self._first = True
        if self._kept is None:
            image = read()
        else:
            blank = np.zeros((), self._kept.dtype)
            image = np.broadcast_to(blank, (*store.size(slot), self._kept.shape[2]))
        super().__init__(image, sem_seg=sem_seg)

    def transform(self, tfm: T.Transform) -> None:
        """See the base class."""
        if not self._first:
            super().transform(tfm)
            return
        self._first = False
        if self._kept is None:
            store, slot = self._place
            resized = tfm.apply_image(self.image)
            store.put(slot, resized, self.image.shape[:2])
            self.image = resized
        else:
            self.image = self._kept
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)


def resized_shape(augmentation, height: int, width: int) -> tuple[int, int] | None:
    """(height, width) that an augmentation resizes any image of this size to.

    None where that is drawn at random, or something else than a resize.
    """
    if type(augmentation) is T.Resize:
        return tuple(augmentation.shape)
    if type(augmentation) is T.ResizeShortestEdge:
        lengths = set(augmentation.short_edge_length)
        if len(lengths) == 1 and 0 not in lengths:
            longest = augmentation.max_size
            return augmentation.get_output_shape(height, width, lengths.pop(), longest)
    return None


def inside_wrappers(mapper, attribute: str):
    """The first that has the attribute, of a mapper and those that it wraps; else the innermost."""
    while not hasattr(mapper, attribute) and hasattr(mapper, "mapper"):
        mapper = mapper.mapper
    return mapper


class CachePlan:
    """Collects the images of a loader and opens one store for them.

    Args:
        cfg: the full config.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg
        self.kind = cfg.DATALOADER.CACHE
        self.slots = 0
        self.bytes = 0
        self._unknown = False
        self._mappers: list = []

    def add(self, images: Sequence[dict], mapper) -> Sequence[dict]:
        """The data set dicts with their numbers in the store.

        Args:
            images: of one data set.
            mapper: what maps them; its innermost ``mapper`` is a
                :class:`~projects.kd.data.mapper.ImageMapper`, or there is no cache for them.
        """
        if self.kind == "off":
            return images
        mapper = inside_wrappers(mapper, "use_store")
        if not hasattr(mapper, "use_store") or not isinstance(images, list):
            logger.warning(
                "DATALOADER.CACHE %s: without effect, %s reads its images itself",
                self.kind,
                type(mapper).__name__,
            )
            return images
        self._mappers.append(mapper)
        numbers: dict[str, int] = {}
        result = []
        for image in images:
            slot = numbers.setdefault(image["file_name"], self.slots + len(numbers))
            result.append({**image, SLOT: slot})
            if slot == self.slots + len(numbers) - 1:
                self._count(image, mapper)
        self.slots += len(numbers)
        return result

    def _count(self, image: dict, mapper) -> None:
        if "height" not in image or "width" not in image:
            self._unknown = True
            return
        pixels = math.prod(mapper.kept_size(image["height"], image["width"]))
        values = {"L": 1, "YUV-BT.601": 3 * 4}.get(self.cfg.INPUT.FORMAT, 3)
        self.bytes += -(-pixels * values // 8) * 8

    def open(self) -> ImageStore | None:
        """Make the store and give it to the mappers; one line says what it is, or why not."""
        if not self._mappers:
            return None
        start = f"DATALOADER.CACHE {self.kind}"
        folder = ""
        if self.kind == "disk":
            folder = writable_folder(self.cfg.OUTPUT_DIR, "OUTPUT_DIR")
        if self.cfg.DATALOADER.NUM_WORKERS and multiprocessing.get_start_method() != "fork":
            logger.warning(f"{start}: worker processes share no memory here, nothing is kept")
            return None
        processes = comm.get_local_size()
        bound = self.cfg.DATALOADER.CACHE_MB * _MIB // processes
        needed = bound if self._unknown else self.bytes
        free = shutil.disk_usage(folder).free if folder else free_memory()
        capacity = min(needed, bound)
        what = "disk" if folder else "memory"
        if free is not None and capacity * processes > free:
            logger.warning(
                f"{start}: {capacity * processes / _MIB:.0f} MiB are wanted (at most "
                f"DATALOADER.CACHE_MB), {free / _MIB:.0f} MiB of {what} are free: images are read "
                "from their files each time"
            )
            return None
        try:
            store = ImageStore(self.slots, capacity, folder)
        except (OSError, ValueError) as error:
            logger.warning(f"{start}: {error}: images are read from their files each time")
            return None
        form = " and ".join(sorted({m.use_store(store) for m in self._mappers}))
        room = "" if needed <= bound else f", of {needed / _MIB:.0f}: the rest is read each time"
        size = f"{capacity / _MIB:.1f} MiB of {what}"
        logger.info(f"{start}: {self.slots} {form} images, {size}{room}")
        return store


def free_memory() -> int | None:
    """Bytes of memory that this machine, or the container's limit, has left; None = not known."""
    found = []
    try:
        with open("/proc/meminfo") as file:
            rows = dict(line.split(":", 1) for line in file)
        found.append(int(rows["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    for limit, used in (("memory.max", "memory.current"), _CGROUP_V1):
        try:
            values = []
            for name in (limit, used):
                with open(f"/sys/fs/cgroup/{name}") as file:
                    values.append(int(file.read()))
            found.append(max(values[0] - values[1], 0))
        except (OSError, ValueError):  # "max": no limit
            continue
    return min(found, default=None)
