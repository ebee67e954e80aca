"""A detector around an exported file, which evaluation and the demo take like any other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from operator import mod

import torch
from torch import nn

from ..errors import ConfigError, DataError, one_line
from ..files import resolve_weights
from .facts import KEY, NAME
from .finish import finish
from .formats import format_of, require_onnx


class ExportedDetector(nn.Module):
    """Runs an exported detector; results are detectron2's.

    Args:
        run: (1, 3, H, W) float32 in 0 to 255 to the graph's outputs, in the order of their names.
        facts: of the file.
    """

    def __init__(self, run: Callable[[torch.Tensor], Sequence[torch.Tensor]], facts: Mapping):
        super().__init__()
        self.run, self.facts = run, facts  # run is no module: what was exported has one mode
        self.eval()

    @classmethod
    def load(cls, path: str, key: str = "MODEL.WEIGHTS", threads: int = 0) -> ExportedDetector:
        """Read a file that :func:`~projects.kd.deploy.formats.write` has written.

        Args:
            path: of the file; its suffix decides about the format.
            key: config key or flag that names it, for messages.
            threads: of onnxruntime; 0 = as many as it takes. The other formats have torch's.

        Raises:
            ConfigError: no such file, or not one of this project.
        """
        loader = _LOADERS[format_of(path, key)]
        path = resolve_weights(path, key)
        try:
            run, text = loader(path, key, threads)
            facts = json.loads(text)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{key}: '{path}' is not a detector that kd-export has written "
                f"({type(error).__name__}: {one_line(error)})"
            ) from error
        return cls(run, facts)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """One image after the other, as the detector itself would.

        Args:
            batched_inputs: ``image`` (3, H, W), and ``height`` and ``width`` of the results.

        Raises:
            DataError: an image of another size than the file was made for (torch.export), or of
                sides that are no multiples of what it needs (DeepLab).
        """
        results = []
        shape, multiples = self.facts["input"]["shape"][2:], self.facts["input"]["multiples_of"]
        for item in batched_inputs:
            size = list(item["image"].shape[1:])
            takes = f"multiples of {multiples}" if any(map(mod, size, multiples)) else ""
            if shape != size and "height" not in shape:
                takes = f"{shape}"
            if takes:
                raise DataError(
                    f"{item.get('file_name', 'an image')} has {tuple(size)} pixels (height, "
                    f"width) after resizing, the exported detector takes {takes}"
                )
            outputs = self.run(item["image"][None].float())
            named = dict(zip(self.facts["outputs"], outputs, strict=True))
            results.append(finish(named, self.facts, item))
        return results


def _load_onnx(path: str, key: str, threads: int):
    require_onnx(key)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    known = onnxruntime.get_available_providers()
    providers = [x for x in ("CUDAExecutionProvider", "CPUExecutionProvider") if x in known]
    session = onnxruntime.InferenceSession(path, options, providers=providers)

    def run(image: torch.Tensor):
        return [torch.from_numpy(x) for x in session.run(None, {"image": image.numpy()})]

    return run, session.get_modelmeta().custom_metadata_map[KEY]


def _load_torchscript(path: str, key: str, threads: int):
    extra = {NAME: ""}
    traced = torch.jit.load(path, map_location="cpu", _extra_files=extra)
    return lambda image: traced(image), extra[NAME]


def _load_exported(path: str, key: str, threads: int):
    extra = {NAME: ""}
    program = torch.export.load(path, extra_files=extra).module()
    return lambda image: program(image), extra[NAME]


_LOADERS = {
    "ONNX": _load_onnx,
    "TorchScript": _load_torchscript,
    "torch.export": _load_exported,
}
