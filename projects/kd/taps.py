"""Feature taps: named places inside a detector whose outputs distillation reads.

A detector says beside its meta-arch what it offers
(:func:`~projects.kd.detectors.register_detector`), and :class:`FeatureTaps` reads those places with
forward hooks. A hook never copies what it sees, costs about 2 us a call, and keeps nothing after
``clear``. Tap only modules whose output no consumer changes in place (FPN outputs, head outputs and
predictors are such places).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.structures import ImageList
from torch import nn

from .errors import ConfigError


@dataclass(frozen=True)
class TapSpec:
    """One place that can be tapped.

    Attributes:
        path: submodule path, or several tried in order.
        run: ``run(model, features)`` runs the tapped module on backbone features, as a teacher
            executes only its backbone. None: the backbone's own forward pass reaches the module.
        select: turns the module's output into what heads receive. None: the output itself.
        take_input: keep the module's (first) input in place of its output.
        channels: ``channels(model)`` = C of a (N, C, H, W) tap (for ``dense``, of its logits; None
            if unknown). For taps that are compared as maps and are not backbone levels.
        every_call: False keeps the first output of a step, True the list of all outputs, for a
            module that is called for each level, stage or image. A ``ModuleList`` always gives the
            list of its members' outputs.
        with_images: ``run`` gets the images as well: ``run(model, features, images)``, with
            detectron2's ``ImageList`` of the padded batch and the sizes before padding.
    """

    path: str | tuple[str, ...]
    run: Callable[..., Any] | None = None
    select: Callable[[Any], Any] | None = None
    every_call: bool = False
    take_input: bool = False
    channels: Callable[[nn.Module], int | None] | None = None
    with_images: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """The candidate paths as a tuple."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)


class FeatureTaps:
    """Forward hooks on named submodules of a detector.

    Args:
        root: the detector.
        specs: tap name to :class:`TapSpec`.

    Raises:
        ConfigError: a path that ``root`` does not have; lists the nearest module names.
    """

    def __init__(self, root: nn.Module, specs: Mapping[str, TapSpec]):
        self.specs = dict(specs)
        self.paths = {name: resolve_tap(root, name, spec) for name, spec in self.specs.items()}
        self._values: dict[str, Any] = {}
        self._recording = False
        modules = {name: root.get_submodule(path) for name, path in self.paths.items()}
        self._lists = {name for name, module in modules.items() if _members(module)}
        self._lists |= {name for name, spec in self.specs.items() if spec.every_call}
        self._handles = [
            part.register_forward_hook(functools.partial(self._keep, name))
            for name, module in modules.items()
            for part in _members(module) or [module]
        ]

    # a bound method, not a closure: a deep copy of the detector then records into its own taps
    def _keep(self, name: str, module: nn.Module, inputs, output) -> None:
        spec = self.specs[name]
        if not self._recording or (name in self._values and name not in self._lists):
            return
        value = inputs[0] if spec.take_input else output
        value = value if spec.select is None else spec.select(value)
        if name in self._lists:
            self._values.setdefault(name, []).append(value)
        else:
            self._values[name] = value

    @contextlib.contextmanager
    def record(self):
        """Hooks keep outputs only inside this context (evaluation passes leave no trace)."""
        self.clear()  # what a step left behind that ended in an exception
        self._recording = True
        try:
            yield self
        finally:
            self._recording = False

    def clear(self) -> None:
        """Forget all recorded outputs."""
        self._values.clear()

    def remove(self) -> None:
        """Remove the hooks from the detector."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise RuntimeError(f"tap '{name}' ({self.paths.get(name)}) did not run in this step")
        return self._values[name]


def run_tapped(
    model: nn.Module, specs: Iterable[TapSpec], features: Mapping[str, Any], images: ImageList
) -> None:
    """Run the modules of taps that the backbone does not reach, each ``run`` once.

    Args:
        model: the detector.
        specs: of the taps.
        features: of its backbone.
        images: the padded batch and the sizes before padding.
    """
    reached = [spec for spec in specs if spec.run is not None]
    for run, with_images in dict.fromkeys((x.run, x.with_images) for x in reached):
        run(model, features, *((images,) if with_images else ()))


def _members(module: nn.Module) -> list[nn.Module]:
    """Those of a ModuleList, which itself never runs."""
    return list(module) if isinstance(module, nn.ModuleList) else []


def resolve_tap(root: nn.Module, name: str, spec: TapSpec) -> str:
    """The first of a tap's paths that the detector has; ConfigError names the nearest ones."""
    modules = [path for path, _ in root.named_modules() if path]
    for path in spec.paths:
        if path in modules:
            return path
    near = difflib.get_close_matches(spec.paths[0], modules, n=3, cutoff=0.0)
    raise ConfigError(
        f"tap '{name}': {type(root).__name__} has no module {' or '.join(map(repr, spec.paths))}; "
        f"nearest names: {', '.join(near)} (register_detector)"
    )
