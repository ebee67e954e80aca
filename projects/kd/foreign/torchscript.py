"""Exported programs as teachers: ``torchscript://my_teacher.yaml``.

The YAML file says what the program of ``torch.jit.save`` takes and gives:

.. code-block:: yaml

    WEIGHTS: "my_teacher.ts"       # beside this file; KD.TEACHER.WEIGHTS comes before it
    OUTPUTS: {p3: 8, p4: 16}       # level: stride in pixels; in order, or by the keys of a dict
    FORMAT: "RGB"                  # or "BGR"
    PIXEL_MEAN: [123.675, 116.28, 103.53]    # of an image of 0..255
    PIXEL_STD: [58.395, 57.12, 57.375]
    MULTIPLE_OF: 1                 # sides of its input, beside the strides: the patch of a ViT

An output is a map (N, C, H, W), or tokens (N, L, C) row by row, of which the last ones are taken
where a class token or registers stand before them. A program is run: it is code of its author.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence

import torch
import yaml
from detectron2.layers import ShapeSpec
from torch import nn

from ..config.yaml_files import read_yaml_text
from ..errors import ConfigError, did_you_mean, one_line, require_one_of
from ..files import beside, expand, find_shipped, resolve_weights
from .base import ForeignBackbone, ForeignDetector, TeacherRequest, register_teacher

_KEYS = ("WEIGHTS", "OUTPUTS", "FORMAT", "PIXEL_MEAN", "PIXEL_STD", "MULTIPLE_OF")


class ScriptBackbone(ForeignBackbone):
    """The outputs of a TorchScript program as levels.

    Args:
        program, shapes, multiple: see :class:`ForeignBackbone`.
        device: that the program was read onto.
        path: the file that describes it, for messages.
        weights: the file of the program, for messages.
    """

    def __init__(self, program, shapes, multiple: int, *, device: str, path: str, weights: str):
        super().__init__(program, shapes, multiple)
        self.device, self.path, self.weights = device, path, weights

    def maps(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """The program's outputs in the order of the levels."""
        outputs = self.model(images)
        if isinstance(outputs, torch.Tensor):
            outputs = [outputs]
        if isinstance(outputs, Mapping):
            missing = [name for name in self._shapes if name not in outputs]
            if missing:
                raise ConfigError(
                    f"OUTPUTS: the program gives {', '.join(map(str, outputs))}, not "
                    f"{', '.join(missing)}"
                )
            outputs = [outputs[name] for name in self._shapes]
        if len(outputs) != len(self._shapes):
            raise ConfigError(
                f"OUTPUTS names {len(self._shapes)} maps, the program gives {len(outputs)}"
            )
        strides = [shape.stride for shape in self._shapes.values()]
        return [as_map(x, images, s) for x, s in zip(outputs, strides, strict=True)]

    def probe(self, size):
        """On the program's device: a program does not run on the meta device.

        ConfigError names the file: what the outputs are not, or why the program does not run.
        """
        try:
            with torch.no_grad():
                found = self(torch.zeros(1, 3, *size, device=self.device))
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from error
        except Exception as error:  # of another device, for another size of image, ...
            raise ConfigError(
                f"KD.TEACHER.WEIGHTS: the program '{self.weights}' does not run with an image of "
                f"{size[0]}x{size[1]} pixels on {self.device}, MODEL.DEVICE: {last_line(error)}; "
                "export it for any size, and so that it runs on the device of its input"
            ) from error
        for name, value in found.items():
            if value.ndim != 4:
                raise ConfigError(
                    f"{self.path}: OUTPUTS: {name} has the shape {tuple(value.shape)}, no map"
                )
        return found


def as_map(output: torch.Tensor, images: torch.Tensor, stride: int) -> torch.Tensor:
    """(N, C, H/stride, W/stride) of that, or of tokens (N, L, C) whose last ones are cells."""
    if output.ndim != 3:
        return output
    height, width = (side // stride for side in images.shape[-2:])
    return output[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))


@register_teacher("torchscript")
def build(request: TeacherRequest) -> ForeignDetector:
    """The teacher that a YAML file describes; it has no options in KD.TEACHER.OPTS."""
    request.read_options()
    path = find_shipped(expand(request.name))
    if not os.path.isfile(path):
        raise ConfigError(
            f"KD.TEACHER.CONFIG_FILE: no such file '{request.name}'; behind torchscript:// stands "
            "a YAML file that names the outputs of a program"
        )
    said = _read(path)
    weights = request.weights or beside(said["WEIGHTS"], os.path.dirname(path))
    if not weights:
        raise ConfigError(f"{path}: WEIGHTS (or KD.TEACHER.WEIGHTS): name the file of the program")
    program = load_program(weights, request.device)
    for parameter in program.parameters():
        parameter.requires_grad_(False)
    program.eval()
    shapes = {str(k): ShapeSpec(stride=v) for k, v in said["OUTPUTS"].items()}
    multiple = math.lcm(said["MULTIPLE_OF"], *(shape.stride for shape in shapes.values()))
    backbone = ScriptBackbone(
        program, shapes, multiple, device=request.device, path=path, weights=weights
    )
    return ForeignDetector(
        backbone,
        pixel_mean=said["PIXEL_MEAN"],
        pixel_std=said["PIXEL_STD"],
        input_format=said["FORMAT"],
        weights=weights,
    )


def load_program(weights: str, device: str) -> nn.Module:
    """A file of ``torch.jit.save`` on a device; ConfigError for anything else."""
    key = "KD.TEACHER.WEIGHTS"
    path = resolve_weights(weights, key)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(path, map_location=device)
    except Exception as error:
        raise ConfigError(
            f"{key}: '{weights}' is no TorchScript program that torch {torch.__version__} reads on "
            f"{device}: {one_line(error, 160)}; save it with torch.jit.save"
        ) from error


def last_line(error: BaseException) -> str:
    """What went wrong in a program: its tracebacks end in it."""
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    return one_line(RuntimeError(lines[-1] if lines else type(error).__name__))


def _read(path: str) -> dict:
    said = yaml.safe_load(read_yaml_text(path))
    if not isinstance(said, dict):
        raise ConfigError(f"{path}: it must hold keys, {', '.join(_KEYS)}")
    for key in said:
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key {key}{did_you_mean(key, _KEYS)}")
    for key in ("OUTPUTS", "PIXEL_MEAN", "PIXEL_STD"):
        if not said.get(key):
            raise ConfigError(f"{path}: {key} is missing; see the guide on teachers")
    said = {"WEIGHTS": "", "FORMAT": "RGB", "MULTIPLE_OF": 1, **said}
    require_one_of(f"{path}: FORMAT", said["FORMAT"], ("RGB", "BGR"))
    outputs = said["OUTPUTS"]
    counts = list(outputs.values()) if isinstance(outputs, dict) else [None]
    if not all(_whole(x) for x in (*counts, said["MULTIPLE_OF"])):
        raise ConfigError(
            f"{path}: OUTPUTS is {outputs} and MULTIPLE_OF {said['MULTIPLE_OF']}; write level: "
            "stride in pixels, and a whole number"
        )
    return said


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
