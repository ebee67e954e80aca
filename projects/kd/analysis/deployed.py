"""Size and speed of trained detectors as they are used, without teacher and heads."""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.modeling import build_model

from ..weights.loading import load_detector
from .measure import inference, interleave, torch_threads
from .suites import Run

IMAGES = 4
ROUNDS = 5
THREADS = 1


def measure_deployed(runs: Mapping[str, Run], dataset: str) -> dict[str, dict[str, float]]:
    """Megabytes and milliseconds an image of finished runs' detectors.

    A time is the median over rounds of one image at a time through network and post-processing,
    without reading it from the disk: IMAGES images of the data set at each model's test size. The
    models take turns, on one CPU thread, or on the GPU that their config names.

    Args:
        runs: name to run; a run whose weights are gone is left out.
        dataset: a registered data set.

    Returns:
        Name to "model_mb" (parameters and buffers in 10^6 bytes) and "latency_ms".
    """
    found, actions, device = {}, {}, "cpu"
    records = DatasetCatalog.get(dataset)
    places = np.linspace(0, len(records) - 1, min(IMAGES, len(records))).round().astype(int)
    for name, run in runs.items():
        if not os.path.isfile(run.weights):
            continue
        model = build_model(run.cfg).eval()
        load_detector(model, run.weights, f"the weights of {run.label}", run.cfg.KD.ALLOW_PICKLE)
        mapper = DatasetMapper(run.cfg, is_train=False)
        actions[name] = inference(model, [mapper(records[i]) for i in places])
        size = sum(x.numel() * x.element_size() for x in model.state_dict().values())
        found[name] = {"model_mb": round(size / 1e6, 3)}
        device = run.cfg.MODEL.DEVICE
    with torch_threads(THREADS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.meshgrid")  # detectron2's anchors
        times = interleave(actions, device, rounds=ROUNDS, warm_up=1)
    for name, seconds in times.items():
        each = statistics.median(seconds) / len(places)
        found[name]["latency_ms"] = round(1000 * each, 2)
    return found


def measured_on(run: Run) -> str:
    """What the times of :func:`measure_deployed` were taken on."""
    if run.cfg.MODEL.DEVICE.startswith("cuda"):
        return f"on {torch.cuda.get_device_name()}"
    return f"on {THREADS} CPU thread"
