"""What distillation knows about each detector. One call beside its meta-arch says it::

    register_detector(
        "RetinaNet",
        taps={"features": TapSpec("backbone"), "dense": dense_tap("logits", "boxes")},
        class_key="MODEL.RETINANET.NUM_CLASSES",
        predictor=RetinaNetPredictor,
    )

detectron2's own detectors are in ``modeling/stock.py``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from .errors import ConfigError
from .levels import PaddingRule
from .taps import TapSpec, resolve_tap


@dataclass(frozen=True)
class ClassLayer:
    """A layer whose output channels are classes: channel ``(o * K + k) * inner + i`` is of class k.

    Attributes:
        inner: numbers of a class that lie side by side, e.g. 4 of a box; a layer of so few channels
            serves all classes alike.
        background: the last channel is the background's.
        kind: metadata that names the classes.
        labels: buffer of the detector, (labels,) with the class of each label, -1 = none; k above
            is then a label. Label 0 stays, whatever is chosen: the background. "" = k is a class.
    """

    inner: int = 1
    background: bool = False
    kind: str = "thing_classes"
    labels: str = ""


@dataclass
class _Detector:
    taps: dict[str, TapSpec] = field(default_factory=dict)
    class_key: str | None = None
    class_names: str = "thing_classes"
    pseudo_anchors: float | None = None
    predictors: list[type] = field(default_factory=list)
    label_maps: bool = True
    padding: PaddingRule | None = None
    class_layers: dict[str, ClassLayer] = field(default_factory=dict)


_DETECTORS: dict[str, _Detector] = {}


def register_detector(
    arch: str,
    *,
    taps: Mapping[str, TapSpec] = MappingProxyType({}),
    class_key: str | None = None,
    class_names: str = "thing_classes",
    pseudo_anchors: float | None = None,
    predictor: type | None = None,
    label_maps: bool | None = None,
    padding: PaddingRule | None = None,
    class_layers: Mapping[str, ClassLayer] = MappingProxyType({}),
) -> None:
    """Register what a meta-arch offers to distillation; a second call adds to the first.

    Args:
        arch: class name of the meta-arch. Subclasses inherit taps, pseudo anchors and predictors.
        taps: tap name to place. ``features`` (the backbone, giving a dict of levels) is needed for
            every feature head; ``dense`` is for the outputs of the head by level
            (:func:`~projects.kd.predict.outputs.dense_tap`); other names are free.
        class_key: the config key that holds its number of classes, e.g.
            "MODEL.RETINANET.NUM_CLASSES" (checked against the data set).
        class_names: the data set's metadata that lists these classes, "thing_classes" or (classes
            of pixels) "stuff_classes".
        pseudo_anchors: side, in strides of a level, of square anchors for imitation masks; for
            detectors without anchors, or whose anchors say nothing about the size of objects.
        predictor: a :class:`~projects.kd.predict.Predictor`, for heads on predictions. Several may
            be registered for one meta-arch; the first that ``fits`` the model is taken.
        label_maps: False = it trains without label maps (``sem_seg``), so the loader does not read
            them. This holds for the meta-arch itself, not for its subclasses.
        padding: ``padding(model, sizes)`` gives the (height, width) that it pads a batch of images
            with these (height, width) to, in pixels. For detectors that do not pad to the
            ``size_divisibility`` of their backbone, as Mask2Former and many DETRs; subclasses
            inherit it. The teacher pads further by its own rule, its maps are cut to this size.
        class_layers: paths of the layers that predict classes (``*`` stands for anything) to what
            their channels mean, so that KD.TEACHER.CLASS_MAP can choose among a teacher's classes.
            A path that a model does not have is passed over. Subclasses inherit them.
    """
    own = _DETECTORS.setdefault(arch, _Detector())
    own.taps.update(taps)
    if class_key is not None:
        own.class_key, own.class_names = class_key, class_names
    if pseudo_anchors is not None:
        own.pseudo_anchors = float(pseudo_anchors)
    if predictor is not None:
        own.predictors.append(predictor)
    if label_maps is not None:
        own.label_maps = label_maps
    if padding is not None:
        own.padding = padding
    own.class_layers.update(class_layers)


def _lineage(cls: type) -> Iterator[_Detector]:
    """What is registered for a class and its bases, nearest first."""
    return (_DETECTORS[base.__name__] for base in cls.__mro__ if base.__name__ in _DETECTORS)


def taps_for(model: nn.Module | type) -> dict[str, TapSpec]:
    """The taps that a detector (or its class) and its base classes registered.

    Raises:
        ConfigError: nothing is registered for it; lists the architectures that are.
    """
    cls = model if isinstance(model, type) else type(model)
    found: dict[str, TapSpec] = {}
    for registered in reversed(list(_lineage(cls))):
        found.update(registered.taps)
    if not found:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE {cls.__name__} has no registered taps (register_detector "
            f"beside the meta-arch); known: {architectures_with(())}"
        )
    return found


def offers(arch: str, name: str) -> bool:
    """Whether a meta-arch, by its name in META_ARCH_REGISTRY, has a tap."""
    if arch not in META_ARCH_REGISTRY:
        return False
    cls = META_ARCH_REGISTRY.get(arch)
    return isinstance(cls, type) and any(name in x.taps for x in _lineage(cls))


def reads_label_maps(arch: str) -> bool:
    """Whether a meta-arch may train on label maps; True unless it was registered as one without."""
    return arch not in _DETECTORS or _DETECTORS[arch].label_maps


def architectures_with(names: Iterable[str]) -> list[str]:
    """Registered meta-archs that offer all taps in ``names``, and one at least."""
    wanted = set(names)
    return sorted(arch for arch, x in _DETECTORS.items() if x.taps and wanted <= set(x.taps))


def tapped_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule of a detector that a registered tap reads.

    Raises:
        ConfigError: a tap or a submodule that the detector does not have.
    """
    specs = taps_for(model)
    if name not in specs:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE {type(model).__name__} registered no tap '{name}'; "
            f"it has {', '.join(sorted(specs))} (register_detector)"
        )
    return model.get_submodule(resolve_tap(model, name, specs[name]))


def class_key(arch: str) -> str | None:
    """The config key of a meta-arch's number of classes, or None."""
    return _DETECTORS[arch].class_key if arch in _DETECTORS else None


def configured_classes(cfg, arch: str | type) -> int | None:
    """The number of classes that a config gives a meta-arch, by its registered key.

    Args:
        cfg: the config of the detector.
        arch: the name in the registry, or the class, whose bases are asked as well.

    Returns:
        None where no ``class_key`` is registered for it.
    """
    names = [arch] if isinstance(arch, str) else [base.__name__ for base in arch.__mro__]
    key = next((class_key(name) for name in names if class_key(name) is not None), None)
    holds = getattr(cfg, "holds", None)  # a LazyConfig says the number, or it is not known
    if key is None or (holds is not None and not holds(key)):
        return None
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def class_names_of(arch: str) -> str:
    """The metadata that lists a meta-arch's classes; "thing_classes" where nothing else is said."""
    return _DETECTORS[arch].class_names if arch in _DETECTORS else "thing_classes"


def class_layers(model: nn.Module) -> dict[str, ClassLayer]:
    """Paths of the layers of a detector that predict classes, to what their channels mean."""
    known: dict[str, ClassLayer] = {}
    for registered in reversed(list(_lineage(type(model)))):
        known.update(registered.class_layers)
    return {
        path: layer
        for path, _ in model.named_modules()
        for pattern, layer in known.items()
        if fnmatch.fnmatchcase(path, pattern)
    }


def pseudo_anchors(model: nn.Module) -> float | None:
    """The ``pseudo_anchors`` of a detector or the nearest base class, or None."""
    found = (x.pseudo_anchors for x in _lineage(type(model)))
    return next((strides for strides in found if strides is not None), None)


def padding_of(model: nn.Module) -> PaddingRule | None:
    """The ``padding`` of a detector or the nearest base class; None = by its backbone."""
    return next((x.padding for x in _lineage(type(model)) if x.padding is not None), None)


def predictors_of(cls: type) -> list[type]:
    """Predictors of a meta-arch and its bases, nearest first, in the order of registration."""
    return [predictor for x in _lineage(cls) for predictor in x.predictors]


def known_predictors() -> list[type]:
    """All registered predictors."""
    return [predictor for x in _DETECTORS.values() for predictor in x.predictors]
