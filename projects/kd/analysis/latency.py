"""How fast detectors are side by side: students, their teacher, exported files."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from fvcore.nn import FlopCountAnalysis
from tabulate import tabulate
from torch import nn

from ..config import load_config
from ..data.mapper import ImageMapper
from ..data.register import register_configured
from ..deploy.graphs import graph_of
from ..deploy.use import used_detector
from ..errors import ConfigError
from .measure import Spread, inference, interleave, ratio, torch_threads
from .report import read_jsonl

METRICS = ("bbox/AP", "keypoints/AP", "segm/AP", "sem_seg/mIoU")  # the last that a run has counts


@dataclass
class Candidate:
    """A detector to be timed.

    Attributes:
        model: takes detectron2's inputs.
        items: of each image, as this model wants them.
        ap: what the run's last evaluation found; None where that is not known.
        parameters, macs: numbers; multiplications and additions on the first item.
        bytes: of its file.
    """

    model: nn.Module
    items: Sequence[Mapping]
    ap: float | None = None
    parameters: int | None = None
    macs: float | None = None
    bytes: int = 0


def candidate_of(
    cfg: CfgNode, records: Sequence[Mapping], model: nn.Module | None = None
) -> Candidate:
    """The student of a config, with the options of TEST.QUICK.

    Args:
        cfg: MODEL.WEIGHTS names its checkpoint.
        records: data set dicts of the images.
        model: the detector where it is built already.
    """
    model = used_detector(cfg) if model is None else model
    mapper = ImageMapper(cfg, is_train=False)
    items = [mapper(record) for record in records]
    parameters = sum(x.numel() for x in model.parameters())
    return Candidate(
        model,
        items,
        last_ap(os.path.dirname(cfg.MODEL.WEIGHTS)),
        parameters or None,
        macs_of(model, items[0]["image"]) if parameters else None,
        os.path.getsize(cfg.MODEL.WEIGHTS),
    )


def named_run(words: str) -> tuple[str, str, str]:
    """``NAME=FOLDER`` of a finished run: its name, config and last checkpoint.

    Raises:
        ConfigError: not such words, or no ``config.yaml`` and ``model_final.pth`` in the folder.
    """
    name, _, folder = words.partition("=")
    if not (name and folder):
        raise ConfigError(f"--benchmark: '{words}' is not NAME=FOLDER, e.g. teacher=output/teacher")
    files = [os.path.join(folder, x) for x in ("config.yaml", "model_final.pth")]
    for path in files:
        if not os.path.isfile(path):
            raise ConfigError(f"--benchmark: {name}: there is no {path}")
    return name, *files


def candidate_of_run(words: str, records: Sequence[Mapping]) -> tuple[str, Candidate]:
    """Name and detector of a finished run, see :func:`named_run`."""
    name, config, weights = named_run(words)
    cfg = load_config(config, ["MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu"])
    register_configured(cfg)
    return name, candidate_of(cfg, records)


def last_ap(folder: str) -> float | None:
    """The metric of the last evaluation that a run has written to its ``metrics.json``."""
    lines = read_jsonl(os.path.join(folder, "metrics.json"))
    evaluated = [line for line in lines if any(key in line for key in METRICS)]
    if not evaluated:
        return None
    return next(evaluated[-1][key] for key in reversed(METRICS) if key in evaluated[-1])


def macs_of(model: nn.Module, image: torch.Tensor) -> float:
    """Multiplications and additions, one each counted together, for one image (3, H, W)."""
    counter = FlopCountAnalysis(graph_of(model), image[None].float())
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    with torch.no_grad():
        return float(counter.tracer_warnings("none").total())


def latencies(
    candidates: Mapping[str, Candidate], *, threads: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds an image of each, by rounds; the candidates take turns.

    Args:
        candidates: by name; one image at a time goes through network and post-processing.
        threads: of torch; those of onnxruntime are set where a file is loaded.
        rounds: timed ones.
    """

    actions = {name: inference(one.model, one.items) for name, one in candidates.items()}
    with torch_threads(threads):
        seconds = interleave(actions, rounds=rounds, warm_up=1)
    return {
        name: [x / len(candidates[name].items) for x in values] for name, values in seconds.items()
    }


def report(
    candidates: Mapping[str, Candidate], seconds: Mapping[str, Sequence[float]]
) -> list[dict]:
    """Numbers of each, JSON-ready; ``ratio`` is its time in parts of the first one's."""
    first = next(iter(candidates))
    return [
        {
            "name": name,
            "ap": one.ap,
            "ms": {k: 1000 * v for k, v in Spread.of(seconds[name]).as_dict().items()},
            "ratio": ratio(seconds[name], seconds[first]).as_dict(),
            "parameters": one.parameters,
            "macs": one.macs,
            "bytes": one.bytes,
        }
        for name, one in candidates.items()
    ]


def table(rows: Sequence[Mapping]) -> str:
    """The numbers for a console; quartiles in brackets."""

    def part(value, factor: float, digits: int) -> str:
        return "" if value is None else f"{value * factor:.{digits}f}"

    lines = [
        [
            row["name"],
            part(row["ap"], 1, 1),
            "{median:.1f} ({low:.1f}-{high:.1f})".format(**row["ms"]),
            "{median:.3f} ({low:.3f}-{high:.3f})".format(**row["ratio"]),
            part(row["parameters"], 1e-6, 2),
            part(row["macs"], 1e-9, 2),
            part(row["bytes"], 1e-6, 1),
        ]
        for row in rows
    ]
    first = f"of {rows[0]['name']}" if rows else ""
    header = ["detector", "AP", "ms an image", first, "M parameters", "GMAC", "file MB"]
    return tabulate(lines, header, disable_numparse=True)
