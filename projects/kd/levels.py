"""Which student level is compared with which teacher level, and on what canvas."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from detectron2.layers import ShapeSpec
from torch import nn

from .errors import ConfigError, DataError

# (detector, (height, width) of each image) -> (height, width) of the padded batch
PaddingRule = Callable[[nn.Module, Sequence[tuple[int, int]]], tuple[int, int]]


def pair_levels(
    level_map: Sequence[Sequence[str]],
    student: nn.Module,
    teacher: nn.Module,
    required: bool = True,
) -> dict[str, str]:
    """Pair backbone levels.

    Args:
        level_map: KD.LEVEL_MAP, pairs (student level, teacher level); empty = by equal stride.
        student, teacher: the backbones. Levels that an FPN's top block makes (p6, p7) are paired
            only when both top blocks are of the same kind: RetinaNet's p6 is a convolution of res5
            and carries new information, R-CNN's p6 is a subsampled p5. Where several teacher levels
            have the stride (dilated backbones), the one of the same name is taken.
        required: False: no common level is an empty answer (heads on outputs need none).

    Returns:
        Student level to teacher level, finest first.

    Raises:
        ConfigError: a level that does not exist, or no pair.
    """
    ours, theirs = student.output_shape(), teacher.output_shape()
    if level_map:
        pairs = {str(a): str(b) for a, b in level_map}
        _check_names("student", pairs.keys(), ours)
        _check_names("teacher", pairs.values(), theirs)
    else:
        pairs = {}
        for level, shape in ours.items():
            for other, other_shape in theirs.items():
                same_stride = shape.stride == other_shape.stride
                if same_stride and _maker(student, level) == _maker(teacher, other):
                    pairs[level] = level if pairs.get(level) == level else other
    if not pairs and required:
        raise ConfigError(
            f"KD.LEVEL_MAP: student and teacher share no level; student: {describe(ours)}; "
            f"teacher: {describe(theirs)}"
        )
    return dict(sorted(pairs.items(), key=lambda pair: ours[pair[0]].stride))


def levels_read(detector: nn.Module) -> set[str]:
    """Backbone levels that a detector's heads read; empty where they do not say.

    detectron2's heads keep them in ``in_features`` and the like. A level that no head reads (p7 of
    a RetinaNet whose IN_FEATURES end at p6) is never trained.
    """
    names = ("head_in_features", "in_features")
    names += tuple(f"{part}_in_features" for part in ("box", "mask", "keypoint"))
    found: set[str] = set()
    for part in ("", "proposal_generator", "roi_heads", "sem_seg_head"):
        module = getattr(detector, part, None) if part else detector
        for name in names:
            levels = getattr(module, name, None)
            # of a LazyConfig a list of omegaconf
            if isinstance(levels, Sequence) and not isinstance(levels, str):
                found.update(level for level in levels if isinstance(level, str))
    return found


def default_levels(pairs: Mapping[str, str], student: nn.Module, teacher: nn.Module) -> list[str]:
    """Those of the paired levels that heads of both detectors read.

    Args:
        pairs: student level to teacher level.
        student, teacher: the detectors. One that does not say what it reads counts as reading all.

    Returns:
        Student levels in the order of ``pairs``; all of them if nothing would be left.
    """
    ours, theirs = levels_read(student), levels_read(teacher)
    read = [a for a, b in pairs.items() if (not ours or a in ours) and (not theirs or b in theirs)]
    return read or list(pairs)


def _check_names(side: str, names, shapes: Mapping[str, ShapeSpec]) -> None:
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise ConfigError(
            f"KD.LEVEL_MAP: the {side} has no level {', '.join(unknown)}; it has {describe(shapes)}"
        )


def _maker(backbone: nn.Module, level: str) -> str:
    """The kind of top block that made a level, "" for the pyramid's own levels."""
    top = getattr(backbone, "top_block", None)
    if top is None:
        return ""
    names = list(backbone.output_shape())
    made = names[len(names) - top.num_levels :]
    return type(top).__name__ if level in made else ""


def describe(shapes: Mapping[str, ShapeSpec]) -> str:
    """Level names and strides for messages."""
    return ", ".join(f"{name} (stride {shape.stride})" for name, shape in shapes.items())


def canvas_size(
    image_sizes: Sequence[tuple[int, int]], divisibility: int, square: int = 0, who: str = "student"
) -> tuple[int, int]:
    """(height, width) to which detectron2's ``ImageList`` pads images of these sizes.

    Args:
        image_sizes: (height, width) in pixels.
        divisibility: the sides are multiples of it; 0 and 1 say nothing.
        square: side of the canvas of backbones that take one size only (ViTDet); 0 = any.
        who: "student" or "teacher", for the message.

    Raises:
        DataError: an image that a square canvas would cut off, as ``ImageList`` does silently.
    """
    height, width = (max(size[axis] for size in image_sizes) for axis in (0, 1))
    if square > 0:
        if max(height, width) > square:
            raise DataError(
                f"an image has {height} x {width} pixels after augmentation, the {who}'s backbone "
                f"pads to a square of {square} (square_pad): lower INPUT.MAX_SIZE_TRAIN (of a "
                "LazyConfig: the augmentations of its mapper), or raise square_pad"
            )
        height = width = square
    multiple = max(divisibility, 1)
    return (math.ceil(height / multiple) * multiple, math.ceil(width / multiple) * multiple)


def square_side(backbone: nn.Module) -> int:
    """Side of the square that a backbone pads its batches to (ViTDet); 0 = none."""
    return int(getattr(backbone, "padding_constraints", {}).get("square_size", 0))


def needed_divisibility(backbone: nn.Module) -> int:
    """What the sides of a backbone's input should be multiples of; at least 1.

    detectron2's SimpleFeaturePyramid has the number and does not give it as
    ``size_divisibility``.
    """
    return max(int(backbone.size_divisibility), int(getattr(backbone, "_size_divisibility", 1)), 1)


def _takes_divisibility(backbone: nn.Module) -> bool:
    """Whether a detector would pad to another ``_size_divisibility`` of its backbone."""
    before = getattr(backbone, "_size_divisibility", None)
    if before is None:
        return False
    other = int(before) + 1
    backbone._size_divisibility = other
    try:
        return int(backbone.size_divisibility) == other
    finally:
        backbone._size_divisibility = before


def common_divisibility(student: nn.Module, teacher_divisibility: int, scale: float = 1.0) -> int:
    """The least multiple of both padding rules, as far as the student can be told to keep it.

    Args:
        student: its backbone.
        teacher_divisibility: what the teacher asks of the student's canvas, see
            :func:`scaled_divisibility`.
        scale: KD.TEACHER.INPUT_SCALE. At 1 a student that cannot be told pads as it does, and the
            teacher pads further on its own.

    Raises:
        ConfigError: another scale, and a backbone that cannot be told to pad to it.
    """
    own = max(int(student.size_divisibility), 1)
    common = math.lcm(own, teacher_divisibility)
    if common == own or _takes_divisibility(student):
        return common
    if scale == 1:
        return own
    raise ConfigError(
        f"KD.TEACHER.INPUT_SCALE: the teacher needs multiples of {teacher_divisibility}, the "
        f"student's {type(student).__name__} pads to {own} and cannot be told otherwise"
    )


class StudentPadding:
    """The padded size of the student's batches.

    Args:
        student: the detector.
        divisibility: what its batches are padded to multiples of in training, see
            :func:`common_divisibility`.
        rule: of a detector that pads in its own way (``register_detector(padding=...)``); None =
            as detectron2's detectors do, by their backbone.
    """

    def __init__(self, student: nn.Module, divisibility: int, rule: PaddingRule | None = None):
        self.student = student
        self.divisibility = divisibility
        self.rule = rule

    def canvas(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(height, width) of the padded batch of images with these (height, width)."""
        if self.rule is not None:
            height, width = self.rule(self.student, sizes)
            return int(height), int(width)
        return canvas_size(sizes, self.divisibility, square_side(self.student.backbone))

    def applied(self):
        """Inside, the student pads to that size."""
        if self.rule is not None:
            return contextlib.nullcontext()
        return padded_to(self.student.backbone, self.divisibility)


def check_input_scale(scale: float) -> None:
    """ConfigError unless KD.TEACHER.INPUT_SCALE is a positive number."""
    if not 0 < scale < math.inf:
        raise ConfigError(f"KD.TEACHER.INPUT_SCALE is {scale}, it must be positive")


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """(height, width) times a scale, rounded to the nearest pixel, halves up, at least 1."""
    height, width = (max(math.floor(scale * side + 0.5), 1) for side in size)
    return height, width


def scaled_divisibility(
    scale: float, strides: Mapping[str, tuple[int, int]], teacher_divisibility: int
) -> int:
    """What the sides of the student's canvas must be multiples of for the teacher's sake.

    At scale 1 that is the teacher's own padding rule: both nets round odd grids alike. Otherwise
    the teacher's canvas, ``scale`` times the student's, has to keep to that rule, and every paired
    level must divide both canvases, so that its two grids are exact multiples.

    Args:
        scale: KD.TEACHER.INPUT_SCALE.
        strides: student level to its stride and that of its teacher level, in pixels of their own
            images.
        teacher_divisibility: the teacher's padding rule.

    Raises:
        ConfigError: a scale that is not positive, or a level whose grids are no whole multiples.
    """
    check_input_scale(scale)
    if scale == 1:
        return teacher_divisibility
    exact = Fraction(scale).limit_denominator(1024)
    for level, (ours, theirs) in strides.items():
        times = exact * ours / theirs  # teacher's cells a student's cell, along one side
        if abs(exact - scale) > 1e-6 * scale or 1 not in (times.numerator, times.denominator):
            raise ConfigError(
                f"KD.TEACHER.INPUT_SCALE {scale:g}: at {level} the teacher's grid is "
                f"{scale * ours / theirs:.6g} times the student's; choose a scale (2.0, 3.0, 0.5) "
                "or KD.LEVEL_MAP that makes it a whole multiple or a whole part"
            )
    # scale * side is a multiple of m where side is one of denominator * m / gcd(numerator, m)
    needed = [teacher_divisibility, *(theirs for _, theirs in strides.values())]
    multiples = [exact.denominator * m // math.gcd(exact.numerator, m) for m in needed]
    return math.lcm(*multiples, *(ours for ours, _ in strides.values()))


def cut(maps: Mapping[str, object], strides: Mapping[str, int], canvas: tuple[int, int]) -> dict:
    """Level to its map without the cells that start beyond the canvas.

    Args:
        maps: level to (N, C, H, W).
        strides: level to pixels a cell.
        canvas: (height, width) in pixels, not larger than what the maps cover.
    """
    height, width = canvas
    return {
        level: value[..., : -(-height // strides[level]), : -(-width // strides[level])]
        for level, value in maps.items()
    }


@contextlib.contextmanager
def padded_to(backbone: nn.Module, divisibility: int):
    """Inside, the detector of ``backbone`` pads its batches to multiples of ``divisibility``."""
    if max(int(backbone.size_divisibility), 1) == divisibility:
        yield
        return
    before = backbone._size_divisibility
    backbone._size_divisibility = divisibility
    try:
        yield
    finally:
        backbone._size_divisibility = before
