"""Time, memory and gradients of training steps: what the measuring tools share."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances
from torch import nn

from ..errors import ConfigError

PAIRS = 11
WARM_UP = 3


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Quartiles by linear interpolation between the values."""
        low, median, high = np.percentile(list(values), (25, 50, 75)).tolist()
        return cls(median, low, high)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


class Progress:
    """A line on stderr about every ``period`` seconds: what runs, the share done, the time left.

    Args:
        total: number of :meth:`tick` calls to come.
        period: seconds between lines.
    """

    def __init__(self, total: int, period: float = 5.0):
        self.total = max(total, 1)
        self.period = period
        self.done = 0
        self._start = self._shown = time.monotonic()

    def tick(self, label: str) -> None:
        """One more part is done."""
        self.done += 1
        now = time.monotonic()
        if now - self._shown < self.period and self.done != self.total:
            return
        self._shown = now
        left = (now - self._start) / self.done * max(self.total - self.done, 0)
        print(
            f"[{self.done}/{self.total}] {label}, ETA {int(left) // 60}:{int(left) % 60:02d}",
            file=sys.stderr,
            flush=True,
        )


def require_device(device: str) -> None:
    """ConfigError, which names ``--device``, for a CUDA device on a machine without a GPU."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: there is no GPU here")


def synchronize(device: torch.device | str) -> None:
    """Wait for a GPU's queue; nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    actions: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    *,
    rounds: int = PAIRS,
    warm_up: int = WARM_UP,
    tick: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time actions in turns, so that a drift of the machine meets all of them alike.

    Every round runs each action once, every second round in reverse order.

    Args:
        actions: name to a function without arguments.
        device: synchronised before and after each action.
        rounds: timed rounds.
        warm_up: rounds before them that are not counted.
        tick: called after each round.
        clock: gives seconds; ``time.process_time`` counts those that this process computes.

    Returns:
        Name to seconds, one value a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for index in range(warm_up + rounds):
        order = list(actions) if index % 2 == 0 else list(actions)[::-1]
        for name in order:
            synchronize(device)
            start = clock()
            actions[name]()
            synchronize(device)
            if index >= warm_up:
                seconds[name].append(clock() - start)
        tick()
    return seconds


def inference(model: nn.Module, items: Sequence[Mapping]) -> Callable[[], None]:
    """An action for :func:`interleave`: a detector on each image by itself.

    Args:
        model: takes detectron2's inputs.
        items: one dict for each image.
    """

    @torch.no_grad()
    def run():
        for item in items:
            model([item])

    return run


@contextlib.contextmanager
def torch_threads(number: int):
    """Inside, torch computes with so many threads on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the ratios of the pairs measured in the same round."""
    return Spread.of(a / b for a, b in zip(numerator, denominator, strict=True))


def peak_bytes(action: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensors that ``action`` holds at once, beyond those held before.

    Counted from the allocator's events, temporaries inside of operations included; views and
    libraries' own workspaces cost nothing. Memory that was allocated before and is freed inside
    does not lower the count on a CPU.

    Args:
        action: runs once.
        device: "cpu" or a CUDA device, whose allocations are counted.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        action()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum([0, *changes]).max())


def random_batch(
    size: tuple[int, int],
    boxes: int,
    classes: int,
    images: int = 1,
    seed: int = 0,
    label_maps: bool = False,
) -> list[dict]:
    """A batch of noise as detectron2's loader gives it.

    Args:
        size: (height, width) in pixels.
        boxes: an image; XYXY inside of it, sides log-uniform from 16 pixels to the whole side.
        classes: labels are drawn from 0 to classes - 1.
        images: in the batch.
        seed: of all numbers.
        label_maps: add ``sem_seg`` (H, W), a random class for each block of 16x16 pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    sides = torch.tensor([width, height], dtype=torch.float32)
    batch = []
    for _ in range(images):
        smallest = (16 / sides).clamp(max=1.0)
        lengths = sides * smallest ** torch.rand(boxes, 2, generator=generator)
        corners = torch.rand(boxes, 2, generator=generator) * (sides - lengths)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corners, corners + lengths], dim=1))
        instances.gt_classes = torch.randint(classes, (boxes,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        item = {"image": image, "instances": instances, "height": height, "width": width}
        if label_maps:
            blocks = torch.randint(
                classes, (-(-height // 16), -(-width // 16)), generator=generator
            )
            labels = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)
            item["sem_seg"] = labels[:height, :width].contiguous()
        batch.append(item)
    return batch


@torch.no_grad()
def settle_norms(model: nn.Module, images: torch.Tensor) -> None:
    """Set the statistics of frozen norms to those of their input, layer after layer.

    A deep network with random weights and frozen norms of mean 0 and variance 1 overflows.

    Args:
        model: a backbone.
        images: (N, 3, H, W), normalised.
    """

    def adopt(module, inputs):
        (x,) = inputs
        module.running_mean.copy_(x.mean((0, 2, 3)))
        module.running_var.copy_(x.var((0, 2, 3), unbiased=False))

    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    if not norms:
        return
    handles = [norm.register_forward_pre_hook(adopt) for norm in norms]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
