"""ONNX files of lower precision: the networks in float16 or int8, everything else as it was.

Boxes, scores and suppression stay in float32: half precision has steps of half a pixel at 1000.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator

import torch

from ..errors import ConfigError, one_line
from ..files import replacing, write_atomically
from .facts import KEY

PRECISIONS = ("float32", "float16", "int8")
# what has the weights
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def lower(path: str, target: str, precision: str, images: Iterable[torch.Tensor] = ()) -> None:
    """Write an ONNX file in lower precision, and its facts beside it.

    Args:
        path: of the file.
        target: of the new one; an old file there is replaced when the new one is whole.
        precision: "float16", or "int8": onnxruntime's static quantisation, weights by channel.
        images: for "int8", (1, 3, H, W) in 0 to 255, whose activations set the ranges.

    Raises:
        ConfigError: no images, or the packages cannot convert this file.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = list(images)
    if precision == "int8" and not images:
        raise ConfigError("--precision int8: there are no images to calibrate with")
    facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    facts[KEY] = json.dumps({**json.loads(facts[KEY]), "precision": precision})
    try:
        with tempfile.TemporaryDirectory() as folder:
            clean = os.path.join(folder, "clean.onnx")  # weights by their names, shared ones too
            quant_pre_process(path, clean, skip_symbolic_shape=True, skip_onnx_shape=True)
            if precision == "float16":
                model = _half(onnx.load(clean))
            else:
                quantised = os.path.join(folder, "int8.onnx")
                _quantise(clean, quantised, images)
                model = onnx.load(quantised)
    except Exception as error:
        raise ConfigError(
            f"--precision {precision}: {os.path.basename(path)} cannot be converted "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error
    onnx.helper.set_model_props(model, facts)
    with replacing(target) as file:
        file.write(model.SerializeToString())
    write_atomically(target + ".json", json.dumps(json.loads(facts[KEY]), indent=1))


def _half(model):
    """Weights and their products in float16, with casts before and after.

    onnxruntime's own converter cannot be used: it mixes types in the branches of a suppression.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    weights = {x.name: x for x in graph.initializer if x.data_type == TensorProto.FLOAT}
    nodes, halves = [], set()
    for node in graph.node:
        if node.op_type not in _WEIGHTED or not any(name in weights for name in node.input[1:]):
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            half = f"{name}_half"
            node.input[place] = half if name else ""
            if not name or half in halves:
                continue
            halves.add(half)
            if name in weights:
                value = numpy_helper.to_array(weights[name]).astype("float16")
                graph.initializer.append(numpy_helper.from_array(value, half))
            else:
                nodes.append(helper.make_node("Cast", [name], [half], to=TensorProto.FLOAT16))
        (output,) = node.output
        node.output[0] = f"{output}_single"
        cast = helper.make_node("Cast", list(node.output), [output], to=TensorProto.FLOAT)
        nodes += [node, cast]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in _nodes(graph) for name in node.input}
    left = [x for x in graph.initializer if x.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)
    return model


def _nodes(graph) -> Iterator:
    """The nodes of a graph and of those inside of it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


class _Images:
    """What onnxruntime asks for calibration data."""

    def __init__(self, images: Iterable[torch.Tensor]):
        self._images = iter(images)

    def get_next(self) -> dict | None:
        """The next input, None after the last."""
        image = next(self._images, None)
        return None if image is None else {"image": image.float().numpy()}


def _quantise(path: str, target: str, images: Iterable[torch.Tensor]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    quantize_static(
        path,
        target,
        type("Reader", (_Images, CalibrationDataReader), {})(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=list(_WEIGHTED),
    )
