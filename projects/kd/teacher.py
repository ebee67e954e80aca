"""The frozen teacher: built from its own config, held outside of every module tree."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch import nn
from torch.profiler import record_function

from .building import build_detector
from .config import DTYPES, LazyNode, load_config
from .config.key_checks import TEACHER_KEYS, check_each
from .context import ModelInfo
from .data.register import names_by_kind
from .detectors import taps_for
from .errors import ConfigError, UserError, did_you_mean
from .files import published_weights, resolve_config
from .foreign import build_foreign, foreign_scheme
from .levels import canvas_size, cut, needed_divisibility, square_side
from .modeling.class_layers import map_classes
from .modeling.narrow_maps import guard_narrow_maps
from .shared_classes import SharedClasses
from .taps import FeatureTaps, TapSpec, run_tapped
from .teacher_form import TeacherForm, choose_form
from .weights.files import modules_in
from .weights.loading import load_weights

logger = logging.getLogger(__name__)


class Teacher:
    """A detector that only answers.

    Not an ``nn.Module``: ``.train()``, ``.parameters()``, ``.state_dict()``, DDP and EMA of the
    student cannot reach it. It is in eval mode with ``requires_grad`` off, and runs its backbone
    only, unless a head needs more.

    Args:
        model: the detector on its device.
        input_format: "BGR" or "RGB", what the model expects.
        cfg: its config; of a LazyConfig the :class:`~projects.kd.config.LazyNode`.
        names: what it was trained to find, see
            :func:`~projects.kd.data.register.names_by_kind`; a kind that is missing is not known.
        shared: by kind, which of the student's classes it predicts (KD.TEACHER.CLASS_MAP); a kind
            that is missing is not mapped.
        source: config and weights, for ``repr``.
        dtype: "auto" (the step's precision), "float32", "bfloat16" or "float16".
        channels_last: run its convolutions in channels-last memory format.
        fuse: run its backbone with batch norms in the convolutions, where that gives the same.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_format: str = "BGR",
        cfg=None,
        names: Mapping[str, Sequence[str]] | None = None,
        shared: Mapping[str, SharedClasses] | None = None,
        source: str = "",
        dtype: str = "auto",
        channels_last: bool = False,
        fuse: bool = True,
    ):
        self.model = guard_narrow_maps(model).eval().requires_grad_(False)
        self.input_format = input_format
        self.cfg = cfg
        self.names = dict(names or {})
        self.shared = dict(shared or {})
        self.source = source
        self.dtype = dtype
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        if channels_last:
            self.model.backbone.to(memory_format=torch.channels_last)
        self.fuse = fuse
        self.taps: FeatureTaps | None = None
        self._levels: frozenset[str] | None = None
        self._compiled = False
        self.form = TeacherForm(model.backbone)

    def __deepcopy__(self, memo):
        return self  # a copy of the student must not copy the teacher

    def __repr__(self) -> str:
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        return f"Teacher({type(self.model).__name__}, {millions:.1f}M parameters, {self.source})"

    def info(self) -> ModelInfo:
        """Shapes and taps under the teacher's own level names."""
        return ModelInfo(
            model=self.model,
            shapes=self.model.backbone.output_shape(),
            taps=frozenset(taps_for(self.model)),
            cfg=self.cfg,
        )

    def tap(
        self,
        names: Iterable[str],
        compile_backbone: bool = False,
        extra: Mapping[str, TapSpec] | None = None,
        levels: Iterable[str] | None = None,
    ) -> None:
        """Place hooks for the registered taps that the heads read, and for ``extra`` ones.

        Args:
            names: of the taps.
            compile_backbone: see KD.TEACHER.COMPILE.
            extra: further taps.
            levels: of the backbone that heads read; others may be missing among the features.
                None = all.

        Raises:
            ConfigError: a tap inside a backbone that is to be compiled (inner hooks do not fire).
        """
        specs = {name: spec for name, spec in taps_for(self.model).items() if name in set(names)}
        self.taps = FeatureTaps(self.model, {**specs, **(extra or {})})
        if compile_backbone:
            inner = [name for name, path in self.taps.paths.items() if "backbone." in path]
            if inner:
                raise ConfigError(
                    f"KD.TEACHER.COMPILE: tap {', '.join(inner)} lies inside the compiled "
                    "backbone; set it to False for these heads"
                )
        self._levels = None if levels is None else frozenset(levels)
        self._compiled = compile_backbone
        self._take_form()

    def _take_form(self) -> None:
        side = max(64, *self.own_canvas((64, 64)))
        self.form = choose_form(self.model, self.taps.specs, self._levels, self.fuse, side)
        if self._compiled:
            self.form.backbone.compile(dynamic=True)

    @property
    def size_divisibility(self) -> int:
        """What the padded image sides must be multiples of."""
        return needed_divisibility(self.model.backbone)

    def own_canvas(self, canvas: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) that its own padding rule makes of the canvas, at least that size."""
        backbone = self.model.backbone
        return canvas_size([canvas], self.size_divisibility, square_side(backbone), "teacher")

    def preprocess(
        self, images: list[torch.Tensor], canvas: tuple[int, int], image_format: str
    ) -> torch.Tensor:
        """Normalise raw images with the teacher's statistics and pad them onto the canvas.

        Args:
            images: per image (3, H, W) in 0..255 in ``image_format``.
            canvas: (height, width) of the padded batch.
            image_format: "BGR" or "RGB", the order of ``images``.

        Returns:
            (N, 3, *canvas) fp32; padding is 0 after normalisation, as in detectron2.
        """
        mean, std = self.model.pixel_mean, self.model.pixel_std
        flip = image_format != self.input_format
        shape = len(images), max(mean.numel(), images[0].shape[0]), *canvas
        fills = all(tuple(image.shape[-2:]) == tuple(canvas) for image in images)
        batch = torch.empty(shape, dtype=mean.dtype, device=mean.device)
        batch = batch.contiguous(memory_format=self.memory_format)
        if not fills:
            batch.zero_()
        for image, own in zip(images, batch, strict=True):
            image = image.to(mean.device, non_blocking=True)
            place = own[:, : image.shape[1], : image.shape[2]]
            torch.sub(image.flip(0) if flip else image, mean, out=place).div_(std)
        return batch

    @torch.no_grad()  # never inference_mode: its tensors cannot take part in the student's graph
    def observe(
        self, images: list[torch.Tensor], canvas: tuple[int, int], image_format: str
    ) -> dict[str, Any]:
        """Run the teacher as far as the placed taps need it.

        Where its own padding rule asks for more than the canvas (a square, other multiples), it
        gets that, and its maps are cut to the canvas before its heads read them.

        Args:
            images, canvas, image_format: see :meth:`preprocess`.

        Returns:
            Tap name to its value; ``features`` is a dict of level to (N, C, H, W).
        """
        assert not self.model.training, "the teacher left eval mode"
        if self.form.is_stale():
            self._take_form()
        padded = self.own_canvas(canvas)
        with record_function("kd/teacher/preprocess"):
            tensor = self.preprocess(images, padded, image_format)
        sizes = [tuple(image.shape[-2:]) for image in images]
        try:
            with self.taps.record(), self._precision(tensor.device.type):
                with record_function("kd/teacher/backbone"):
                    features = self.form.only_read(self.form.backbone(tensor))
                inside = {} if padded == canvas else self._cut_taps(features, canvas)
                features = inside.get("features", features)
                seen = ImageList(tensor[..., : canvas[0], : canvas[1]], sizes)
                with record_function("kd/teacher/head"):
                    run_tapped(self.model, self.taps.specs.values(), features, seen)
            found = {name: inside.get(name, self.taps[name]) for name in self.taps.specs}
            return {**found, "features": features} if "features" in found else found
        finally:
            self.taps.clear()

    def _cut_taps(self, features: dict, canvas: tuple[int, int]) -> dict[str, Any]:
        """What was tapped inside the backbone, cut to the canvas."""
        found: dict[str, Any] = {}
        for name, path in self.taps.paths.items():
            if path != "backbone" and not path.startswith("backbone."):
                continue
            module = self.model.get_submodule(path)
            value = features if path == "backbone" else self.taps[name]
            if not (isinstance(value, dict) and hasattr(module, "output_shape")):
                raise ConfigError(
                    f"KD.TEACHER.CONFIG_FILE: the teacher pads further than the student, to "
                    f"{self.own_canvas(canvas)}, and tap '{name}' ({path}) gives no levels that "
                    "could be cut to the student's size"
                )
            strides = {level: shape.stride for level, shape in module.output_shape().items()}
            found[name] = cut(value, strides, canvas)
        return found

    def _precision(self, device_type: str):
        if self.dtype == "auto":
            return contextlib.nullcontext()
        dtype = DTYPES[self.dtype]
        if dtype is torch.float32:
            return torch.autocast(device_type, enabled=False)
        return torch.autocast(device_type, dtype=dtype)


def build_teacher(cfg) -> Teacher:
    """Build KD.TEACHER with its weights on MODEL.DEVICE.

    Args:
        cfg: the student's config.

    Raises:
        ConfigError: config or weights missing, or parameters that the weights do not hold.
    """
    node = cfg.KD.TEACHER
    if foreign_scheme(node.CONFIG_FILE):
        model = build_foreign(node, cfg.MODEL.DEVICE, cfg.KD.ALLOW_PICKLE)
        parts = model, None, model.input_format, model.weights, model.names
    else:
        parts = _build_from_file(cfg)
    model, teacher_cfg, input_format, weights, names = parts
    _check_formats(cfg.INPUT.FORMAT, input_format)
    class_map = map_classes(cfg, model, names)
    teacher = Teacher(
        model,
        input_format=input_format,
        cfg=teacher_cfg,
        names={**names, **class_map.names},
        shared=class_map.shared,
        source=f"config {node.CONFIG_FILE}, weights {weights or 'random'}",
        dtype=node.DTYPE,
        channels_last=node.CHANNELS_LAST,
        fuse=node.FUSE,
    )
    logger.info("%r", teacher)
    return teacher


def _build_from_file(cfg):
    """A detectron2 detector with its weights: (model, its config, image format, weights, names)."""
    node = cfg.KD.TEACHER
    path = resolve_config(node.CONFIG_FILE, "KD.TEACHER.CONFIG_FILE")
    model, teacher_cfg, weights, input_format, datasets = build_from_config(cfg, path)
    weights = node.WEIGHTS or published_weights(node.CONFIG_FILE, weights, node.OPTS)
    if weights:
        loaded = load_weights(model, weights, "KD.TEACHER.WEIGHTS", cfg.KD.ALLOW_PICKLE)
        if loaded.missing and not node.ALLOW_MISSING:
            raise ConfigError(
                f"KD.TEACHER.WEIGHTS: '{weights}' lacks {len(loaded.missing)} of the "
                f"{len(model.state_dict())} parameters and buffers of the teacher that "
                f"KD.TEACHER.CONFIG_FILE describes: {modules_in(loaded.missing)}; {loaded}"
            )
    elif not node.ALLOW_MISSING:
        raise ConfigError("KD.TEACHER.WEIGHTS is empty and the teacher's config names no weights")
    return model, teacher_cfg, input_format, weights, _names(cfg, teacher_cfg, datasets)


def _check_formats(ours: str, theirs: str) -> None:
    """Channels can be swapped and grey be shown as a colour; nothing else is converted."""
    colours = ("BGR", "RGB")
    if ours != theirs and not (ours in (*colours, "L") and theirs in colours):
        raise ConfigError(
            f"INPUT.FORMAT is {ours}, and the teacher's is {theirs}: one image serves both, it can "
            "be BGR or RGB on either side, L for the student of such a teacher, or the same"
        )


def build_from_config(cfg, path: str):
    """A teacher from a YAML or a LazyConfig: (model, its config, weights, format, data sets)."""
    try:
        teacher_cfg = load_config(path, cfg.KD.TEACHER.OPTS, "KD.TEACHER.OPTS")
    except ConfigError as error:
        start = "" if str(error).startswith("KD.TEACHER") else "KD.TEACHER.CONFIG_FILE: "
        raise ConfigError(f"{start}{error}") from error
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    source = f"KD.TEACHER.CONFIG_FILE '{path}'"
    source += " with KD.TEACHER.OPTS" if cfg.KD.TEACHER.OPTS else ""
    arch = teacher_cfg.MODEL.META_ARCHITECTURE
    if arch not in META_ARCH_REGISTRY and not isinstance(teacher_cfg, LazyNode):
        raise ConfigError(
            f"{source}: its MODEL.META_ARCHITECTURE '{arch}' is not registered (KD.IMPORTS)"
            f"{did_you_mean(arch, (name for name, _ in META_ARCH_REGISTRY))}"
        )
    check_each(teacher_cfg, TEACHER_KEYS, source)
    teacher_cfg.freeze()
    model = build_detector(teacher_cfg, source)
    weights = teacher_cfg.MODEL.WEIGHTS
    return model, teacher_cfg, weights, teacher_cfg.INPUT.FORMAT, teacher_cfg.DATASETS.TRAIN


def _names(cfg, teacher_cfg, datasets: Sequence[str]) -> dict[str, list[str]]:
    """What the teacher learnt to find: :func:`names_by_kind` of the first of its data sets.

    Its config's own KD.DATASETS come first: a name may stand for another file there.
    """
    if not datasets:
        return {}
    try:
        return names_by_kind([c for c in (teacher_cfg, cfg) if c is not None], datasets[0])
    except UserError as error:  # trained elsewhere: its data need not be here
        logger.warning("KD.TEACHER.CONFIG_FILE: the teacher's classes are not known: %s", error)
        return {}
