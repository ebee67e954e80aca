"""The frozen teacher, held outside of every module tree."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import ImageList
from torch import nn
from torch.profiler import record_function

from .config import DTYPES
from .context import ModelInfo
from .detectors import taps_for
from .errors import ConfigError
from .levels import canvas_size, cut, needed_divisibility, square_side
from .modeling.half_on_cpu import use_full_precision
from .shared_classes import SharedClasses
from .taps import FeatureTaps, TapSpec, run_tapped
from .teacher_cache import FeatureCache, digest, identity
from .teacher_form import TeacherForm, choose_form


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
        cache: of what its backbone gives, or None.
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
        cache: FeatureCache | None = None,
    ):
        self.model = use_full_precision(model).eval().requires_grad_(False)
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
        self.cache = cache
        self._identity = ""

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
        inner = [name for name, path in self.taps.paths.items() if "backbone." in path]
        for key, used in (("COMPILE", compile_backbone), ("CACHE", self.cache is not None)):
            if inner and used:
                raise ConfigError(
                    f"KD.TEACHER.{key}: tap {', '.join(inner)} lies inside the backbone, of which "
                    "the output alone is there then; turn it off for these heads"
                )
        self._levels = None if levels is None else frozenset(levels)
        self._compiled = compile_backbone
        self._take_form()

    def _take_form(self) -> None:
        side = max(64, *self.own_canvas((64, 64)))
        self.form = choose_form(self.model, self.taps.specs, self._levels, self.fuse, side)
        if self._compiled:
            self.form.backbone.compile(dynamic=True)
        if self.cache is not None:
            own = self.input_format, self.memory_format, self.form.text
            self._identity = identity(self.model, *own)

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
        self,
        images: list[torch.Tensor],
        canvas: tuple[int, int],
        image_format: str,
        digests: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Run the teacher as far as the placed taps need it.

        Where its own padding rule asks for more than the canvas (a square, other multiples), it
        gets that, and its maps are cut to the canvas before its heads read them.

        Args:
            images, canvas, image_format: see :meth:`preprocess`.
            digests: of the images, for its cache; () = they are computed here.

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
                    if self.cache is None:
                        features = self._run_backbone(tensor)
                    else:
                        keys = self._keys(digests or map(digest, images), padded, image_format)
                        features = self.cache.features(
                            keys, lambda missing: self._run_backbone(tensor[missing]), tensor.device
                        )
                inside = {} if padded == canvas else self._cut_taps(features, canvas)
                features = inside.get("features", features)
                seen = ImageList(tensor[..., : canvas[0], : canvas[1]], sizes)
                with record_function("kd/teacher/head"):
                    run_tapped(self.model, self.taps.specs.values(), features, seen)
            whole = {**inside, "features": features}
            return {x: whole[x] if x in whole else self.taps[x] for x in self.taps.specs}
        finally:
            self.taps.clear()

    def _run_backbone(self, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return self.form.only_read(self.form.backbone(tensor))

    def _keys(
        self, digests: Iterable[str], canvas: tuple[int, int], image_format: str
    ) -> list[str]:
        """Of the images in the cache; for other precisions there are others."""
        kind = self.model.pixel_mean.device.type
        on = torch.is_autocast_enabled(kind)
        precision = torch.get_autocast_dtype(kind) if on else torch.float32
        common = f"{self._identity} {precision} {canvas} {image_format}"
        return [digest(common, x) for x in digests]

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
