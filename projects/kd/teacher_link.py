"""What ties one teacher to the student: levels, images, and the heads that it teaches through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .errors import ConfigError, DataError
from .levels import scaled_divisibility, scaled_size
from .taps import TapSpec
from .teacher import Teacher
from .teacher_cache import digest

_IMAGES = ("image", "image_teacher")
_DIGESTS = "teacher_digests"  # of an example: by name of the teacher


@dataclass
class TeacherLink:
    """One teacher of a student.

    Attributes:
        teacher: see :class:`Teacher`; :meth:`connect` places its taps.
        level_map: student level to teacher level.
        heads: names of the modules of its heads.
        name: in KD.TEACHERS; "" = the one of KD.TEACHER. With a name losses and scalars have it.
        scale: side of its images in parts of the student's; where it is not 1 every example has to
            bring ``image_teacher``.
        weight: factor of its heads' ``loss_kd_*``.
        compiled: compile its backbone.
    """

    teacher: Teacher
    level_map: Mapping[str, str]
    heads: tuple[str, ...]
    name: str = ""
    scale: float = 1.0
    weight: float = 1.0
    compiled: bool = False
    strides: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The config node."""
        return f"KD.TEACHERS.{self.name}" if self.name else "KD.TEACHER"

    def connect(self, heads: Mapping[str, nn.Module], student_strides: Mapping[str, int]) -> int:
        """Place the taps that its heads read.

        Args:
            heads: all heads by the names of their modules.
            student_strides: level to stride.

        Returns:
            What the sides of the student's canvas must be multiples of for its sake.
        """
        own = {name: heads[name] for name in self.heads}
        needed = {"features"}.union(*(head.requires for head in own.values()))
        self.teacher.tap(needed, self.compiled, extra_taps(own, "teacher"), self._read(own))
        theirs = self.teacher.model.backbone.output_shape()
        self.strides = {ours: theirs[x].stride for ours, x in self.level_map.items()}
        strides = {x: (student_strides[x], self.strides[x]) for x in self.level_map}
        return scaled_divisibility(self.scale, strides, self.teacher.size_divisibility)

    def _read(self, heads: Mapping[str, nn.Module]) -> set[str] | None:
        """Levels of the teacher that some head reads; None = all."""
        read = [head.reads_of_teacher() for head in heads.values()]
        if None in read:
            return None
        return {self.level_map.get(level, level) for levels in read for level in levels}

    def images(self, batch: Sequence[dict]) -> list[torch.Tensor]:
        """Per image what the teacher sees, (3, H, W): ``image`` at scale 1, else ``image_teacher``.

        Raises:
            DataError: the latter is missing or of another size than the scale says.
        """
        if self.scale == 1:
            return [x["image"] for x in batch]
        key = f"{self.key}.INPUT_SCALE is {self.scale:g}"
        for x in batch:
            if "image_teacher" not in x:
                raise DataError(
                    f"{key}, and the data set mapper gives no 'image_teacher'; use this project's "
                    "MultiResolutionMapper, or set INPUT_SCALE to 1.0"
                )
            own, theirs = (tuple(x[name].shape[-2:]) for name in ("image", "image_teacher"))
            if theirs != scaled_size(own, self.scale):
                raise DataError(
                    f"{key}: the data set mapper gives an 'image' of {own} and an 'image_teacher' "
                    f"of {theirs} pixels, not {scaled_size(own, self.scale)}"
                )
        return [x["image_teacher"] for x in batch]

    def observe(self, batch: Sequence[dict], canvas: tuple[int, int], image_format: str) -> dict:
        """Run the teacher on a batch; see :meth:`Teacher.observe`."""
        theirs = scaled_size(canvas, self.scale)
        digests = [x[_DIGESTS][self.name] for x in batch if self.name in x.get(_DIGESTS, ())]
        return self.teacher.observe(self.images(batch), theirs, image_format, digests)

    def fields(self, seen: dict[str, Any], sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Its fields of a :class:`~projects.kd.context.DistillContext`.

        Args:
            seen: what :meth:`observe` gave; its features are taken out.
            sizes: (height, width) of each of the student's images.
        """
        features = seen.pop("features")
        return {
            "teacher_features": {
                ours: features[x] for ours, x in self.level_map.items() if x in features
            },
            "teacher_outputs": seen,
            "teacher_scale": self.scale,
            "teacher_image_sizes": [scaled_size(size, self.scale) for size in sizes],
            "teacher_strides": self.strides,
            "teacher": self.teacher,
            "teacher_name": self.name.lower(),
        }

    def told(self, losses: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A head's losses with the teacher's name and weight."""
        if not self.name:
            return dict(losses)
        found = {}
        for key, loss in losses.items():
            start = next((x for x in ("loss_kd_", "loss_aux_") if key.startswith(x)), "loss_")
            value = loss * self.weight if start == "loss_kd_" else loss
            found[f"{start}{self.name.lower()}_{key.removeprefix(start)}"] = value
        return found


def extra_taps(heads: Mapping[str, nn.Module], side: str) -> dict[str, TapSpec]:
    """Those of all heads for a side; ConfigError where two want one name for different places."""
    found: dict[str, TapSpec] = {}
    for name, head in heads.items():
        for tap, spec in head.extra_taps.get(side, {}).items():
            if found.setdefault(tap, spec) != spec:
                raise ConfigError(f"KD.HEADS: {name} and another head tap different {tap}")
    return found


def with_digests(batch: list[dict], links: Sequence[TeacherLink]) -> list[dict]:
    """The batch, and what teachers with a cache find its images by.

    On a GPU it costs a wait to compute that of images that are there already.
    """
    seen = {link.name: link.images(batch) for link in links if link.teacher.cache is not None}
    if not seen:
        return batch
    return [
        {**x, _DIGESTS: {name: digest(images[n]) for name, images in seen.items()}}
        for n, x in enumerate(batch)
    ]


def on_device(batch: list[dict], device: torch.device) -> list[dict]:
    """The batch with its images on a device, so that student and teacher need one copy.

    Where they are there already it is the batch itself.
    """
    if all(x[k].device == device for x in batch for k in _IMAGES if k in x):
        return batch
    return [
        {k: v.to(device, non_blocking=True) if k in _IMAGES else v for k, v in x.items()}
        for x in batch
    ]
