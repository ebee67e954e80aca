"""A graph of a detector, written as TorchScript, ONNX or torch.export."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import warnings
from collections.abc import Callable
from operator import mod
from typing import BinaryIO

import torch
from torch.onnx import symbolic_helper

from ..errors import ConfigError, UserError, one_line
from ..files import replacing, write_atomically
from .facts import KEY, NAME
from .graphs import DenseGraph, Graph, RCNNGraph

# of the file's name; it decides about the format
SUFFIXES = {".onnx": "ONNX", ".ts": "TorchScript", ".pt2": "torch.export"}
OPSETS = (17, 20)  # of ONNX: the oldest that is offered, and the newest that torch's tracer writes
OPSET = 19
DEFORMABLE = 19  # the first with DeformConv
# (height, width) that a graph is traced with: padded, and not square
SAMPLE = (99, 131)


def format_of(path: str, key: str = "--output") -> str:
    """The format that a file's name asks for.

    Raises:
        ConfigError: none of SUFFIXES.
    """
    suffix = os.path.splitext(path)[1]
    if suffix not in SUFFIXES:
        known = ", ".join(f"{end} ({name})" for end, name in SUFFIXES.items())
        raise ConfigError(f"{key}: '{path}' has to end in {known}")
    return SUFFIXES[suffix]


def is_exported(path: str) -> bool:
    """Whether a name of weights is that of an exported detector."""
    return os.path.splitext(path)[1] in SUFFIXES


def require_onnx(flag: str) -> None:
    """ConfigError, with what to install, where the packages of ONNX are missing."""
    missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(f"{flag}: ONNX needs pip install {' '.join(missing)}")


def check_opset(opset: int, graph: Graph | None = None) -> None:
    """ConfigError for an opset that cannot be written, or not with this detector."""
    low, high = OPSETS
    if not low <= opset <= high:
        raise ConfigError(f"--opset is {opset}, it must lie in [{low}, {high}]")
    if graph is not None and opset < DEFORMABLE and "RepPoints" in type(graph.model).__name__:
        raise ConfigError(
            f"--opset is {opset}: RepPoints has deformable convolutions, which ONNX has from "
            f"opset {DEFORMABLE} on"
        )


def check_size(size: tuple | None, graph: Graph | None = None) -> None:
    """ConfigError for torch.export without a size, or with one that the detector cannot take."""
    if size is None:
        raise ConfigError(
            "--size: a torch.export file takes images of one size, give HEIGHTxWIDTH as "
            "INPUT.MIN_SIZE_TEST resizes to"
        )
    if graph is not None and any(map(mod, size, graph.multiples)):
        raise ConfigError(
            f"--size is {size[0]}x{size[1]}, this detector takes multiples of "
            f"{graph.multiples[0]}x{graph.multiples[1]}, its INPUT.CROP.SIZE"
        )


def write(
    path: str, graph: Graph, facts: dict, opset: int = OPSET, size: tuple | None = None
) -> dict:
    """Write the detector to ``path``, and its facts beside it as ``path`` + ``.json``.

    An old file is replaced when the new one is whole.

    Args:
        path: its suffix decides about the format.
        graph: of :func:`~projects.kd.deploy.graphs.graph_of`, on the CPU.
        facts: of :func:`~projects.kd.deploy.facts.facts_of`; written into the file as well.
        opset: of ONNX.
        size: (height, width) of the only images that a torch.export file takes, one at a time;
            the other formats take any.

    Returns:
        The facts as they were written, with the format and, for ONNX, the opset.

    Raises:
        ConfigError: the format cannot hold this detector, and why.
    """
    writer = _WRITERS[format_of(path)]
    sides = size or [-(-side // of) * of for side, of in zip(SAMPLE, graph.multiples, strict=True)]
    image = torch.zeros(1, 3, *sides)
    facts = {**facts, "format": format_of(path)}
    facts |= {"opset": opset} if facts["format"] == "ONNX" else {}
    if facts["format"] == "torch.export":
        check_size(size, graph)
        facts |= {"batch": False, "input": {**facts["input"], "shape": [1, 3, *size]}}
    with replacing(path) as file, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing; what they are about is tested
        try:
            writer(file, graph, image, facts, opset)
        except UserError:
            raise
        except Exception as error:
            raise ConfigError(
                f"--output: {facts['detector']} cannot be written as {facts['format']}: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
    write_atomically(path + ".json", json.dumps(facts, indent=1))
    return facts


def _write_torchscript(file: BinaryIO, graph: Graph, image, facts: dict, opset: int) -> None:
    traced = torch.jit.trace(graph, (image,), check_trace=False)
    torch.jit.save(traced, file, _extra_files={NAME: json.dumps(facts)})


def _write_exported(file: BinaryIO, graph: Graph, image, facts: dict, opset: int) -> None:
    if isinstance(graph, RCNNGraph):
        raise ConfigError(
            f"--output: {facts['detector']} cannot be written as torch.export: how many regions "
            "its second stage gets depends on the image; take .onnx or .ts"
        )
    if isinstance(graph, DenseGraph):
        raise ConfigError(
            f"--output: {facts['detector']} cannot be written as torch.export with its "
            "suppression, whose sizes depend on the image: add --no-nms, or take .onnx or .ts"
        )
    # sizes left free cost minutes of symbolic arithmetic, and a graph that refuses small images
    program = torch.export.export(graph, (image,), strict=False)
    torch.export.save(program, file, extra_files={NAME: json.dumps(facts)})


def _write_onnx(file: BinaryIO, graph: Graph, image, facts: dict, opset: int) -> None:
    require_onnx("--output")
    check_opset(opset, graph)
    import onnx

    torch.onnx.register_custom_op_symbolic("torchvision::deform_conv2d", _deform, DEFORMABLE)
    free = {2: "height", 3: "width"} | ({0: "images"} if graph.batch else {})
    content = io.BytesIO()
    torch.onnx.export(
        graph,
        (image,),
        content,
        dynamo=False,
        opset_version=opset,
        input_names=["image"],
        output_names=list(graph.outputs),
        dynamic_axes={"image": free},
    )
    model = onnx.load_from_string(content.getvalue())
    del model.graph.value_info[:]  # shapes of the sample, which another size contradicts
    _free_outputs(model, graph)
    set_facts(model, facts)
    onnx.checker.check_model(model)
    file.write(model.SerializeToString())


def _free_outputs(model, graph: Graph) -> None:
    """Take the sample's sizes out of the outputs' shapes."""
    for output in model.graph.output:
        shape = output.type.tensor_type.shape
        if output.name in ("masks", "heatmaps"):
            names = ["detections", None, None, None]
        elif output.name == "sem_seg":
            names = ["images" if graph.batch else None, None, "height", "width"]
        elif graph.batch and output.name != "levels":
            names = ["images", "boxes", None][: len(shape.dim)]
        else:
            names = ["boxes" if output.name == "levels" else "detections", None]
        for dim, name in zip(shape.dim, names, strict=False):
            if name:
                dim.dim_param = name


def set_facts(model, facts: dict) -> None:
    """Write the facts into an ONNX model's metadata, class names also by themselves."""
    import onnx

    names = {
        key: json.dumps(facts[key]) for key in ("thing_classes", "stuff_classes") if key in facts
    }
    onnx.helper.set_model_props(model, {KEY: json.dumps(facts), **names})


def _deform(g, x, weight, offset, mask, bias, *numbers):
    """torchvision's deformable convolution without a mask, as ONNX's."""
    numbers = [symbolic_helper._get_const(number, "i", "number") for number in numbers]
    stride, padding, dilation = numbers[0:2], numbers[2:4], numbers[4:6]
    groups, offset_groups, use_mask = numbers[6:]
    if use_mask:
        raise ConfigError("--output: a deformable convolution with a mask cannot be written")
    return g.op(
        "DeformConv",
        *(x, weight, offset, bias),
        kernel_shape_i=symbolic_helper._get_tensor_sizes(weight)[2:],
        strides_i=stride,
        pads_i=[*padding, *padding],
        dilations_i=dilation,
        group_i=groups,
        offset_group_i=offset_groups,
    )


_WRITERS: dict[str, Callable] = {
    "ONNX": _write_onnx,
    "TorchScript": _write_torchscript,
    "torch.export": _write_exported,
}
