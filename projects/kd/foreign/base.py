"""What a model of another library has to offer as a teacher, and the registry of such libraries.

::

    @register_teacher("mylib")
    def build(request):
        model = mylib.create(request.name)
        mylib.load(model, request.weights)
        return ForeignDetector(
            MyBackbone(model, {"p3": ShapeSpec(channels=256, stride=8)}),
            pixel_mean=[123.675, 116.28, 103.53],
            pixel_std=[58.395, 57.12, 57.375],
        )

makes ``KD.TEACHER.CONFIG_FILE: "mylib://NAME"`` a teacher. No other part of the toolkit knows of
it: :class:`ForeignDetector` has what a teacher needs of a detector.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from ..detectors import register_detector
from ..errors import ConfigError, did_you_mean, one_line
from ..taps import TapSpec

logger = logging.getLogger(__name__)

KEY = "KD.TEACHER.CONFIG_FILE"


@dataclass(frozen=True)
class TeacherRequest:
    """What the config asks a library for.

    Attributes:
        name: what stands behind the scheme.
        options: KD.TEACHER.OPTS as a dict; read it with :meth:`read_options`.
        weights: KD.TEACHER.WEIGHTS; "" = those that the library publishes, from its own cache.
        random: do not read weights, leave the parameters as the library starts them
            (KD.TEACHER.ALLOW_MISSING without weights, and outlines on the meta device).
        device: where the weights are wanted; the result may lie on another one.
        allow_pickle: KD.ALLOW_PICKLE.
    """

    name: str
    options: Mapping[str, Any]
    weights: str = ""
    random: bool = False
    device: str = "cpu"
    allow_pickle: bool = False

    def read_options(self, **defaults) -> dict[str, Any]:
        """The options over their defaults.

        Raises:
            ConfigError: an option that is not among the defaults, or a value that is no number,
                text, list, ... where the default is one (lists and tuples count alike).
        """
        for name, value in self.options.items():
            if name not in defaults:
                raise ConfigError(
                    f"KD.TEACHER.OPTS: this teacher has no option '{name}'; it has "
                    f"{', '.join(defaults) or 'none'}{did_you_mean(name, defaults)}"
                )
            kind = _kind(defaults[name])
            if kind is not None and _kind(value) != kind:
                raise ConfigError(f"KD.TEACHER.OPTS: {name} is {value!r}, it must be a {kind}")
        return {**defaults, **self.options}


def _kind(value) -> str | None:
    if value is None:
        return None
    kinds = ((bool, "bool"), ((int, float), "number"), (str, "text"), ((list, tuple), "list"))
    return next((name for types, name in kinds if isinstance(value, types)), type(value).__name__)


Builder = Callable[[TeacherRequest], "ForeignDetector"]
_SCHEMES: dict[str, Builder] = {}


def register_teacher(scheme: str) -> Callable[[Builder], Builder]:
    """Decorator: the function builds the teachers of ``scheme://NAME``.

    It returns a :class:`ForeignDetector` with its weights; on which device does not matter.
    """

    def register(build: Builder) -> Builder:
        _SCHEMES[scheme] = build
        return build

    return register


def foreign_scheme(name: str) -> str:
    """The scheme of a KD.TEACHER.CONFIG_FILE, "" if it is a file or a ``model_zoo://`` name.

    Raises:
        ConfigError: a scheme that nobody registered.
    """
    scheme, found, _ = name.partition("://")
    if not found or scheme == "model_zoo":
        return ""
    if scheme not in _SCHEMES:
        raise ConfigError(
            f"{KEY}: '{name}': no teachers are registered for {scheme}://; known are model_zoo and "
            f"{', '.join(sorted(_SCHEMES))} (register_teacher; is its module in KD.IMPORTS?)"
            f"{did_you_mean(scheme, _SCHEMES)}"
        )
    return scheme


def build_foreign(
    node, device: str, allow_pickle: bool = False, outline: bool = False
) -> ForeignDetector:
    """The teacher of another library that a config names.

    Args:
        node: KD.TEACHER.
        device: MODEL.DEVICE.
        allow_pickle: KD.ALLOW_PICKLE.
        outline: only its shapes matter: no weights, and the meta device where the library can.

    Raises:
        ConfigError: unknown names or options, weights that are missing or do not fit, or maps that
            are not those of a pyramid.
    """
    scheme = foreign_scheme(node.CONFIG_FILE)
    opts = list(node.OPTS)
    if len(opts) % 2 or not all(isinstance(x, str) for x in opts[::2]):
        raise ConfigError(f"KD.TEACHER.OPTS: they come in pairs NAME VALUE, here is {opts}")
    request = TeacherRequest(
        name=node.CONFIG_FILE.partition("://")[2],
        options=dict(zip(opts[::2], opts[1::2], strict=True)),
        weights=node.WEIGHTS,
        random=outline or (node.ALLOW_MISSING and not node.WEIGHTS),
        device="cpu" if outline else device,
        allow_pickle=allow_pickle,
    )
    if not request.name:
        raise ConfigError(f"{KEY}: '{node.CONFIG_FILE}' names nothing behind {scheme}://")
    model = _SCHEMES[scheme](request).eval()
    model.backbone.check(f"{KEY}: '{node.CONFIG_FILE}'")
    return model if outline else model.to(device)


class ForeignBackbone(Backbone):
    """A model of another library that gives maps.

    Subclasses define :meth:`maps`.

    Args:
        model: of the library; everything of it hangs below this module once.
        shapes: level to its channels and stride in pixels of the input, in the order of
            :meth:`maps`. Channels that are None are those that :meth:`check` finds.
        multiple: of the input's sides; 0 = the least multiple of all strides, so that every level
            covers the input exactly. A pyramid that rounds its grids up, as detectron2's do, needs
            a smaller one only.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, ShapeSpec], multiple: int = 0):
        super().__init__()
        self.model = model
        self._shapes = dict(shapes)
        self._multiple = multiple or math.lcm(*(shape.stride for shape in shapes.values()))

    def maps(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """(N, 3, H, W) normalised images to one (N, C, H/stride, W/stride) a level."""
        raise TypeError(f"{type(self).__name__} does not define maps")

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Level to its map, see :meth:`maps`."""
        return dict(zip(self._shapes, self.maps(images), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each level."""
        return dict(self._shapes)

    @property
    def size_divisibility(self) -> int:
        """What the sides of its input are multiples of."""
        return self._multiple

    def check(self, source: str) -> None:
        """ConfigError unless the maps of an image of zeros have the shapes that are said.

        Channels that are not said are taken from the maps. In eval mode and on the meta device,
        which computes nothing; a backbone whose model does not run there overrides :meth:`probe`.
        """
        size = (2 * self._multiple, 3 * self._multiple)
        size = tuple(side * -(-64 // side) for side in size)
        try:
            found = self.probe(size)
        except ConfigError:
            raise
        except Exception as error:  # whatever the library raises
            raise ConfigError(
                f"{source}: it does not take an image of {size[0]}x{size[1]} pixels "
                f"({one_line(error)}); a teacher has to take the student's images"
            ) from error
        for name, shape in self._shapes.items():
            given = tuple(found[name].shape[1:])
            channels = given[0] if shape.channels is None else shape.channels
            wanted = (channels, *(-(-side // shape.stride) for side in size))
            if given != wanted:
                raise ConfigError(
                    f"{source}: of a {size[0]}x{size[1]} image {name} is {given} and not {wanted} "
                    f"(channels, height, width at stride {shape.stride}), it cannot be laid over "
                    "the student's maps"
                )
            self._shapes[name] = ShapeSpec(channels=channels, stride=shape.stride)

    def probe(self, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The maps of one image of ``size`` = (height, width), without values."""
        return run_on_meta(self, size)


class ForeignDetector(nn.Module):
    """A model of another library with what a teacher needs of a detector: its tap is ``features``.

    Args:
        backbone: gives the levels; the whole model hangs below it.
        pixel_mean, pixel_std: three numbers in the units of an image of 0..255 and in the order of
            ``input_format``.
        input_format: "RGB" or "BGR".
        names: what it was trained to find ("thing_classes", "keypoint_names"), as far as known.
        weights: file that the parameters come from, for messages; "" = random ones.
    """

    predicts = False  # whether it detects, called with a batch in eval mode
    resizes = False  # whether it then resizes images by itself; can be switched off
    # keys of the config that describe its own evaluation, such as {"INPUT.MIN_SIZE_TEST": 800}
    evaluated_with: Mapping[str, Any] = {}

    def __init__(
        self,
        backbone: ForeignBackbone,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        names: Mapping[str, Sequence[str]] | None = None,
        weights: str = "",
    ):
        super().__init__()
        self.backbone = backbone
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, three_numbers(values, name), persistent=False)
        if not (self.pixel_std.is_meta or self.pixel_std.gt(0).all()):
            raise ConfigError(f"{KEY}: pixel_std of a teacher is {pixel_std}, it must be positive")
        self.input_format = input_format
        self.names = dict(names or {})
        self.weights = weights

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Detections as detectron2 gives them; ConfigError where it gives features alone."""
        raise ConfigError(
            f"{KEY}: {type(self.backbone.model).__name__} gives features and no detections, there "
            "is nothing to evaluate"
        )


register_detector("ForeignDetector", taps={"features": TapSpec("backbone")})


def three_numbers(values, name: str) -> torch.Tensor:
    """(3, 1, 1) fp32 of three numbers; ConfigError names the option."""
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ConfigError(f"{KEY}: {name} of a teacher is {values}, it must be three numbers")
    try:
        numbers = [float(x) for x in values]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{KEY}: {name} of a teacher is {values}, not numbers") from error
    return torch.tensor(numbers)[:, None, None]


@torch.no_grad()
def run_on_meta(module: nn.Module, size: tuple[int, int]):
    """What a module gives for one image of ``size`` = (height, width), without computing it."""
    held = (*module.named_parameters(), *module.named_buffers())
    state = {name: value.to("meta") for name, value in held}
    image = torch.zeros(1, 3, *size, device="meta")
    with torch.device("meta"):  # for what a model makes on the way
        return torch.func.functional_call(module, state, (image,))
