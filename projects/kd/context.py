"""What one training step offers to the imitation heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from .errors import ConfigError, DataError
from .levels import scaled_size
from .shared_classes import ALL, SharedClasses


@dataclass(frozen=True)
class ModelInfo:
    """One side of a pair, as a head sees it when it is built.

    Attributes:
        model: the detector.
        shapes: level name to ShapeSpec (channels, stride); the student's level names on both sides
            once levels are paired, with the teacher's own channels and strides on its side.
        taps: names of the taps that the detector offers.
        cfg: its yacs config, None for a LazyConfig teacher.
        own_names: level to its name in this side's own backbone; {} = the same.
        shared: of a teacher, by the metadata that names classes, which of the student's it
            predicts; a kind that is missing is not mapped (:meth:`classes`).
    """

    model: nn.Module
    shapes: Mapping[str, ShapeSpec]
    taps: frozenset[str]
    cfg: Any = None
    own_names: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, SharedClasses] = field(default_factory=dict)

    def classes(self, kind: str = "thing_classes") -> SharedClasses:
        """The student's classes that this teacher predicts."""
        return self.shared.get(kind, ALL)

    @property
    def arch(self) -> str:
        """Class name of the meta-arch."""
        return type(self.model).__name__

    def paired_names(self, needed: Sequence[str], key: str) -> dict[str, str]:
        """Translate own names of levels to the student's names of the paired levels.

        Args:
            needed: own names.
            key: what asks, for the message.

        Raises:
            ConfigError: a level that is not paired with any of the student's.
        """
        names = {self.own_names.get(level, level): level for level in self.shapes}
        missing = [own for own in needed if own not in names]
        if missing:
            raise ConfigError(
                f"KD.LEVEL_MAP: {key} needs the teacher's {', '.join(needed)}; paired with no "
                f"level of the student: {', '.join(missing)}"
            )
        return {own: names[own] for own in needed}


@dataclass
class DistillContext:
    """Features, outputs and ground truth of one step.

    Shapes: N images, C channels, (H, W) cells of a level; boxes are XYXY in pixels of the
    student's input. A teacher that sees images of another size has its own grids (Ht, Wt).

    Attributes:
        iteration: counted from 0.
        image_sizes: (height, width) of each student input before padding.
        canvas: (height, width) of the padded student batch.
        gt: per image the Instances (``gt_boxes``, ``gt_classes``, ...) on the model's device, or
            None where the batch has none.
        student_features, teacher_features: level to (N, C, H, W), under the student's level names,
            in the precision of the step, the teacher's (N, C, Ht, Wt) on its own grid. Teacher
            features carry no gradient.
        student_outputs, teacher_outputs: tap name to what that tap gives.
        strides: level to the student's stride in input pixels.
        teacher_scale: KD.TEACHER.INPUT_SCALE; the teacher's canvas is exactly this times
            ``canvas``.
        teacher_image_sizes: (height, width) of each teacher input before padding; () = the
            student's times the scale.
        teacher_strides: level to the stride of its teacher level in pixels of the teacher's input;
            {} = the student's.
        batch: the batch as the data loader gave it.
        student, teacher: the models, for what the fields above do not cover.
        log_scalars: whether :meth:`put_scalar` records in this step.
        labelled: the labelled images of the batch alone, where it has others as well.
        sources: by the ``id`` of a map, the maps that it was put together from.
        teacher_name: of several teachers; it goes into the names of scalars.
        others: module name of a head to the context of its teacher, for the heads of further
            teachers; see :meth:`of_head`.
    """

    iteration: int
    image_sizes: list[tuple[int, int]]
    canvas: tuple[int, int]
    gt: list[Instances] | None
    student_features: Mapping[str, torch.Tensor]
    teacher_features: Mapping[str, torch.Tensor]
    student_outputs: Mapping[str, Any] = field(default_factory=dict)
    teacher_outputs: Mapping[str, Any] = field(default_factory=dict)
    strides: dict[str, int] = field(default_factory=dict)
    teacher_scale: float = 1.0
    teacher_image_sizes: list[tuple[int, int]] = field(default_factory=list)
    teacher_strides: dict[str, int] = field(default_factory=dict)
    batch: list[dict] = field(default_factory=list)
    student: nn.Module | None = None
    teacher: Any = None
    log_scalars: bool = False
    labelled: DistillContext | None = None
    sources: Mapping[int, tuple[torch.Tensor, ...]] = field(default_factory=dict, repr=False)
    teacher_name: str = ""
    others: dict[str, DistillContext] = field(default_factory=dict, repr=False)
    _masks: dict[tuple, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """The student's."""
        maps = (self.labelled or self).student_features  # joined ones are made when asked for
        return next(iter(maps.values())).device

    def origins(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Maps of the batch as the detector computed them, part by part."""
        return [part for x in maps for part in self.sources.get(id(x), (x,))]

    def of_head(self, module: str) -> DistillContext:
        """What a head reads, by its module name: the step with the teacher that it belongs to."""
        return self.others.get(module, self)

    def stride(self, level: str) -> int:
        """Stride of a student level in input pixels."""
        return self.strides[level]

    def boxes_on_cpu(self) -> list[torch.Tensor]:
        """Per image its ground-truth boxes (G, 4); the loader's own, without a wait for the device.

        Raises:
            DataError: the batch has no annotations.
        """
        if self.gt is None:
            raise DataError("KD.HEADS: a head needs boxes, and this batch has no annotations")
        images = [x["instances"] for x in self.batch] or self.gt
        return [image.gt_boxes.tensor.cpu() for image in images]

    def valid_mask(self, level: str) -> torch.Tensor:
        """(N, 1, H, W) bool: True where a cell starts inside the unpadded image.

        Row r of stride s is valid for r < ceil(height / s), columns alike (ICD's rule, read in its
        code).
        """
        return self._mask("student", level, self._student_grid(level))

    def teacher_valid_mask(self, level: str) -> torch.Tensor:
        """(N, 1, Ht, Wt) bool: :meth:`valid_mask` on the teacher's own grid, for its own image."""
        return self._mask("teacher", level, self._teacher_grid(level))

    def canvas_mask(self, size: tuple[int, int]) -> torch.Tensor | None:
        """:meth:`valid_mask` of a map of ``size`` = (rows, columns) that covers the whole canvas.

        None where nothing is padding.
        """
        if all(tuple(image) == tuple(self.canvas) for image in self.image_sizes):
            return None
        key = "canvas", tuple(size)
        if key not in self._masks:
            device = self.device
            sizes = torch.tensor(self.image_sizes, device=device)
            # row r starts at r * canvas / rows pixels
            y = torch.arange(size[0], device=device) * self.canvas[0] < sizes[:, :1] * size[0]
            x = torch.arange(size[1], device=device) * self.canvas[1] < sizes[:, 1:] * size[1]
            self._masks[key] = (y[:, :, None] & x[:, None, :])[:, None]
        return self._masks[key]

    def label_maps(self, ignore: int) -> torch.Tensor:
        """Ground-truth class of each pixel, (N, *canvas) int64 on the student's device.

        Made when first asked for, from ``sem_seg`` (H, W) of the batch.

        Args:
            ignore: label of what has no class; fills the padding.

        Raises:
            DataError: an image without a label map, or with one of another size.
        """
        key = "labels", ignore
        if key not in self._masks:
            device = self.device
            shape = (len(self.batch), *self.canvas)
            labels = torch.full(shape, ignore, dtype=torch.long, device=device)
            for own, item, size in zip(labels, self.batch, self.image_sizes, strict=True):
                name = item.get("file_name", "an image")
                if "sem_seg" not in item:
                    raise DataError(
                        f"{name} has no label map: the data set gives no sem_seg_file_name"
                    )
                found = item["sem_seg"]
                if tuple(found.shape) != tuple(size):
                    raise DataError(
                        f"{name}: the label map has {tuple(found.shape)} pixels, the image {size}"
                    )
                own[: size[0], : size[1]] = found.to(device, torch.long)
            self._masks[key] = labels
        return self._masks[key]

    def has_padding(self, level: str) -> bool:
        """Whether :meth:`valid_mask` is False anywhere; costs no transfer from the device."""
        return _any_padding(*self._student_grid(level))

    def teacher_has_padding(self, level: str) -> bool:
        """Whether :meth:`teacher_valid_mask` is False anywhere; costs no transfer."""
        return _any_padding(*self._teacher_grid(level))

    def padding_mask(self, side: str, feature: torch.Tensor, stride: int) -> torch.Tensor | None:
        """:meth:`valid_mask` for any map of a batch, such as a backbone stage.

        Args:
            side: "student" or "teacher".
            feature: (N, C, H, W) of that side, only size and device matter.
            stride: of the map in pixels of that side's input.

        Returns:
            (N, 1, H, W) bool, None where no cell lies in the padding.
        """
        grid = self._sizes(side), feature.shape[-2:], stride
        return cells_inside(*grid, feature.device) if _any_padding(*grid) else None

    def _sizes(self, side: str) -> list[tuple[int, int]]:
        if side == "student":
            return self.image_sizes
        scaled = [scaled_size(size, self.teacher_scale) for size in self.image_sizes]
        return self.teacher_image_sizes or scaled

    def _student_grid(self, level: str):
        return self.image_sizes, self.student_features[level].shape[-2:], self.strides[level]

    def _teacher_grid(self, level: str):
        stride = (self.teacher_strides or self.strides)[level]
        return self._sizes("teacher"), self.teacher_features[level].shape[-2:], stride

    def _mask(self, side: str, level: str, grid) -> torch.Tensor:
        if (side, level) not in self._masks:
            device = self.student_features[level].device
            self._masks[side, level] = cells_inside(*grid, device)
        return self._masks[side, level]

    def put_scalar(self, name: str, value: torch.Tensor | float) -> None:
        """Log a scalar, at KD.LOG_PERIOD only (reading a tensor waits for the device)."""
        if self.log_scalars:
            value = value.item() if isinstance(value, torch.Tensor) else value
            if self.teacher_name:
                group, slash, last = name.rpartition("/")
                name = f"{group}{slash}{self.teacher_name}_{last}"
            get_event_storage().put_scalar(name, value, smoothing_hint=False)


def cells_inside(
    sizes: Sequence[tuple[int, int]], grid: tuple[int, int], stride: int, device: torch.device
) -> torch.Tensor:
    """(N, 1, H, W) bool: which cells of a padded grid start inside the image.

    Args:
        sizes: (height, width) of each image in pixels before padding.
        grid: (H, W).
        stride: pixels a cell.
        device: of the mask.
    """
    valid = torch.tensor([[-(-side // stride) for side in size] for size in sizes], device=device)
    y = torch.arange(grid[0], device=device) < valid[:, :1]
    x = torch.arange(grid[1], device=device) < valid[:, 1:]
    return (y[:, :, None] & x[:, None, :])[:, None]


def _any_padding(sizes, grid, stride: int) -> bool:
    rows, columns = grid
    return any(h <= (rows - 1) * stride or w <= (columns - 1) * stride for h, w in sizes)
