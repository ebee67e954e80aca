"""Feature taps: named places inside a detector whose outputs distillation reads.

A detector says what it offers beside its meta-arch::

    register_taps("RetinaNet", features=TapSpec("backbone"), dense=TapSpec("head", run=...))

and :class:`FeatureTaps` reads those places with forward hooks. A hook never copies what it sees,
costs about 2 us a call, and keeps nothing after ``clear``. Tap only modules whose output no
consumer changes in place (FPN outputs, head outputs and predictors are such places).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from .errors import ConfigError


@dataclass(frozen=True)
class TapSpec:
    """One place that can be tapped.

    Attributes:
        path: submodule path, or several tried in order.
        run: ``run(model, features)`` makes the tapped module run on backbone features, for a
            teacher of which only the backbone is executed. None: the backbone's own forward pass
            reaches the module.
        select: turns the module's output into what heads receive. None: the output itself.
        take_input: keep the module's (first) input in place of its output.
        channels: ``channels(model)`` = C of a (N, C, H, W) tap (of ``dense``: of its logits; None
            if it is not known), for taps that are compared as maps and are no backbone levels.
        every_call: False keeps the first output of a step, True the list of all outputs (a module
            called for each level, stage or image). A ``ModuleList`` always gives the list of its
            members' outputs.
        with_images: ``run`` gets the images too, ``run(model, features, images)``, as detectron2's
            ``ImageList``: the padded batch and the sizes before padding.
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


_TAPS: dict[str, dict[str, TapSpec]] = {}


def register_taps(arch: str, **taps: TapSpec) -> None:
    """Declare (or extend) what a meta-arch offers.

    Args:
        arch: class name of the meta-arch. Subclasses inherit its taps.
        **taps: tap name to place. ``features`` (the backbone, giving a dict of levels) is needed
            for every feature head; ``dense`` are per-level head outputs; other names are free.
    """
    _TAPS.setdefault(arch, {}).update(taps)


def taps_for(model: nn.Module | type) -> dict[str, TapSpec]:
    """The taps that a detector (or its class) and its base classes registered.

    Raises:
        ConfigError: nothing is registered for it; lists the architectures that are.
    """
    cls = model if isinstance(model, type) else type(model)
    found: dict[str, TapSpec] = {}
    for base in reversed(cls.__mro__):
        found.update(_TAPS.get(base.__name__, {}))
    if not found:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE {cls.__name__} has no registered taps "
            f"(register_taps beside the meta-arch); known: {sorted(_TAPS)}"
        )
    return found


def offers(arch: str, name: str) -> bool:
    """Whether a meta-arch, by its name in META_ARCH_REGISTRY, has a tap."""
    if arch not in META_ARCH_REGISTRY:
        return False
    bases = getattr(META_ARCH_REGISTRY.get(arch), "__mro__", ())
    return any(name in _TAPS.get(base.__name__, {}) for base in bases)


def architectures_with(names: Iterable[str]) -> list[str]:
    """Registered meta-archs that offer all taps in ``names``."""
    wanted = set(names)
    return sorted(arch for arch, taps in _TAPS.items() if wanted <= set(taps))


def tapped_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule of a detector that a registered tap reads.

    Raises:
        ConfigError: a tap or a submodule that the detector does not have.
    """
    specs = taps_for(model)
    if name not in specs:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE {type(model).__name__} registered no tap '{name}'; "
            f"it has {', '.join(sorted(specs))} (register_taps)"
        )
    return model.get_submodule(_resolve(model, name, specs[name]))


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
        self.paths = {name: _resolve(root, name, spec) for name, spec in self.specs.items()}
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
        """Take the hooks off the detector."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise RuntimeError(f"tap '{name}' ({self.paths.get(name)}) did not run in this step")
        return self._values[name]


def _members(module: nn.Module) -> list[nn.Module]:
    """Those of a ModuleList, which itself never runs."""
    return list(module) if isinstance(module, nn.ModuleList) else []


def _resolve(root: nn.Module, name: str, spec: TapSpec) -> str:
    modules = [path for path, _ in root.named_modules() if path]
    for path in spec.paths:
        if path in modules:
            return path
    near = difflib.get_close_matches(spec.paths[0], modules, n=3, cutoff=0.0)
    raise ConfigError(
        f"tap '{name}': {type(root).__name__} has no module {' or '.join(map(repr, spec.paths))}; "
        f"nearest names: {', '.join(near)} (register_taps)"
    )


_CLASS_KEYS: dict[str, tuple[str, str]] = {}


def register_class_key(arch: str, key: str, names: str = "thing_classes") -> None:
    """Say which config key holds a meta-arch's number of classes (checked against the data set).

    Args:
        arch: class name of the meta-arch.
        key: e.g. "MODEL.RETINANET.NUM_CLASSES".
        names: the data set's metadata that lists these classes, "thing_classes" or (classes of
            pixels) "stuff_classes".
    """
    _CLASS_KEYS[arch] = key, names


def class_key(arch: str) -> str | None:
    """The key given to :func:`register_class_key`, or None."""
    return _CLASS_KEYS.get(arch, (None, ""))[0]


def configured_classes(cfg, arch: str | type) -> int | None:
    """The number of classes that a config gives a meta-arch, by its registered key.

    Args:
        cfg: the config of the detector.
        arch: the name in the registry, or the class, whose bases are asked as well.

    Returns:
        None where :func:`register_class_key` was not called for it.
    """
    names = [arch] if isinstance(arch, str) else [base.__name__ for base in arch.__mro__]
    key = next((class_key(name) for name in names if class_key(name) is not None), None)
    if key is None:
        return None
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def class_names_of(arch: str) -> str:
    """The metadata given to :func:`register_class_key`; "thing_classes" without a call."""
    return _CLASS_KEYS.get(arch, (None, "thing_classes"))[1]


_PSEUDO_ANCHORS: dict[str, float] = {}


def register_pseudo_anchors(arch: str, strides: float) -> None:
    """Give a detector square anchors for imitation masks: side = ``strides`` strides of a level.

    For detectors without anchors, or whose own say nothing about the size of objects.
    """
    _PSEUDO_ANCHORS[arch] = float(strides)


def pseudo_anchors(model: nn.Module) -> float | None:
    """What :func:`register_pseudo_anchors` gave the detector or a base class, or None."""
    found = [
        _PSEUDO_ANCHORS[c.__name__] for c in type(model).__mro__ if c.__name__ in _PSEUDO_ANCHORS
    ]
    return found[0] if found else None
