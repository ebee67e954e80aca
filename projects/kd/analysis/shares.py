"""Where the time of training steps goes: torch.profiler's events by the part that caused them.

The training code marks its parts with ranges ``kd/...`` (``torch.profiler.record_function``). An
operation belongs to the innermost range around it. One of the backward pass belongs to the part
whose forward pass made its node of the graph, which torch numbers: so each head's share of the
backward pass is known, although there is only one.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.autograd import DeviceType

RANGE = "kd/"
BACKWARD = f"{RANGE}backward"
_NODE = "autograd::engine::evaluate_function: "
_REST = f"{RANGE}rest"


@dataclass
class Shares:
    """Milliseconds of all profiled steps together.

    Attributes:
        host: by part, of the CPU; the parts exclude each other.
        device: by part, of the GPU's kernels; empty without a GPU.
        stacks: by the path of ranges, modules and operations, of the CPU.
        total: of the steps, by the clock.
    """

    total: float
    host: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    device: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stacks: dict[tuple[str, ...], float] = field(default_factory=lambda: defaultdict(float))


def shares_of(events: Iterable, total: float) -> Shares:
    """Attribute events of ``torch.profiler.profile`` (``events()``) to parts.

    Args:
        events: of whole steps.
        total: milliseconds of the steps by the clock; what no range covers is the part "rest".
    """
    result = Shares(total)
    places: dict[int, tuple[str, tuple[str, ...]]] = {}
    makers: dict[int, tuple[str, tuple[str, ...]]] = {}  # number of a node -> where it was made
    own = [e for e in events if e.device_type == DeviceType.CPU and not e.is_async]
    # a parent before its children, and a forward pass before its backward pass
    for event in sorted(own, key=lambda e: (e.time_range.start, -e.time_range.end)):
        parent = event.cpu_parent
        part, path = places.get(id(parent), ("", ()))
        if event.name.startswith(_NODE):
            made = makers.get(event.sequence_nr)
            part, path = (f"{made[0]}/backward", made[1]) if made else (BACKWARD, ())
            path = ("backward", *path, event.name.removeprefix(_NODE))
        elif event.name.startswith(RANGE):
            part, path = event.name, (*path, event.name.removeprefix(RANGE))
        elif "::" not in event.name or parent is None or "::" not in parent.name:
            path = (*path, event.name)  # of operations inside of operations only the outermost
        places[id(event)] = part, path
        if event.sequence_nr >= 0 and part and not path[:1] == ("backward",):
            makers[event.sequence_nr] = part, path  # the last one before it is its maker
        spent = event.self_cpu_time_total / 1e3
        if part:
            result.host[part] += spent
            result.stacks[path] += spent
        if event.kernels:
            result.device[part or _REST] += sum(k.duration for k in event.kernels) / 1e3
    rest = total - sum(result.host.values())
    if rest > 0:
        result.host[_REST] = rest
        result.stacks[("rest",)] += rest
    return result


def label(part: str) -> str:
    """ "kd/student/backbone/backward" as a reader says it."""
    return part.removeprefix(RANGE).replace("/", ", ")


@contextlib.contextmanager
def marked(model: nn.Module, part: str, depth: int = 4) -> Iterator[None]:
    """Inside, each forward pass of a model's modules is a range, down to a depth.

    Those of the model's direct children are parts of their own, ``<part>/<child>``.

    Args:
        model: a detector.
        part: its own range, e.g. "kd/student".
        depth: of nested modules.
    """
    open_ranges: list[torch.profiler.record_function] = []

    def enter(name):
        def hook(*_):
            open_ranges.append(torch.profiler.record_function(name))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_):
        open_ranges.pop().__exit__(None, None, None)

    handles = []
    for name, module in model.named_modules():
        levels = name.count(".") + 1
        if not name or levels > depth or isinstance(module, nn.ModuleList):
            continue
        if levels > 1 and not any(module.children()):
            continue  # an operation shows it; and a hook at a norm would keep it from being fused
        shown = f"{part}/{name}" if levels == 1 else name
        handles.append(module.register_forward_pre_hook(enter(shown), prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
