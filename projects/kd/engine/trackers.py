"""Weights & Biases and MLflow as writers, behind the optional extras ``wandb`` and ``mlflow``.

Both work without a network: ``WANDB_MODE=offline`` writes below OUTPUT_DIR, and without
``MLFLOW_TRACKING_URI`` MLflow's files do too.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

from ..errors import ConfigError
from ..files import replacing
from .writers import Tolerant

IDS = "writers.json"  # of the runs over there, for --resume
_WINDOW = 20


class Tracker(EventWriter):
    """Sends each scalar once, and the pictures; :meth:`send` is what differs.

    Args:
        start_iter: the first iteration of this process.
    """

    def __init__(self, start_iter: int):
        self._last = start_iter - 1

    def write(self) -> None:
        """See detectron2; scalars are the medians that metrics.json has."""
        storage = get_event_storage()
        pictures: dict[int, dict[str, np.ndarray]] = {}
        for name, image, iteration in storage._vis_data:
            pictures.setdefault(iteration, {})[name] = _pixels(image)
        scalars = dict(new_scalars(storage, self._last))
        for iteration in sorted(scalars.keys() | pictures.keys()):
            self.send(iteration, scalars.get(iteration, {}), pictures.get(iteration, {}))
        self._last = max(scalars, default=self._last)

    def send(
        self, iteration: int, scalars: dict[str, float], pictures: dict[str, np.ndarray]
    ) -> None:
        """Scalars and (H, W, 3) uint8 pictures of one iteration."""
        raise TypeError(f"{type(self).__name__} does not define send")


def new_scalars(storage: EventStorage, after: int) -> Iterator[tuple[int, dict[str, float]]]:
    """By iteration, scalars that were put after one; in the order of iterations."""
    found: dict[int, dict[str, float]] = {}
    for name, (value, iteration) in storage.latest_with_smoothing_hint(_WINDOW).items():
        if iteration > after:
            found.setdefault(iteration, {})[name] = value
    yield from sorted(found.items())


def _pixels(image) -> np.ndarray:
    """(3, H, W) of :meth:`EventStorage.put_image` as (H, W, 3) uint8."""
    array = np.asarray(image).transpose(1, 2, 0)
    if array.dtype != np.uint8:
        scale = 255 if array.max(initial=0) <= 1 else 1
        array = (array * scale).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(array)


class WandbWriter(Tracker):
    """Weights & Biases.

    Args:
        cfg: of the run; its values are the run's config.
        start_iter: see :class:`Tracker`.
        run_id: of the run to go on with, "" for a new one.
    """

    def __init__(self, cfg: CfgNode, start_iter: int, run_id: str = ""):
        import wandb

        super().__init__(start_iter)
        self._image = wandb.Image
        self._run = wandb.init(
            project=cfg.WRITERS.PROJECT,
            name=run_name(cfg),
            dir=cfg.OUTPUT_DIR,
            config=yaml.safe_load(cfg.dump()),
            id=run_id or None,
            resume="allow" if run_id else None,
        )
        self.run_id = self._run.id
        # an axis of our own: steps that were lost and are taken again would be dropped
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def send(self, iteration, scalars, pictures) -> None:
        """See :class:`Tracker`."""
        images = {name: self._image(picture) for name, picture in pictures.items()}
        self._run.log({"iteration": iteration, **scalars, **images})

    def close(self) -> None:
        """See detectron2."""
        self._run.finish()


class MlflowWriter(Tracker):
    """MLflow, in OUTPUT_DIR (mlflow.db, mlruns) unless MLFLOW_TRACKING_URI names another place.

    Args:
        cfg: of the run; config.yaml becomes an artifact.
        start_iter: see :class:`Tracker`.
        run_id: of the run to go on with, "" for a new one.
    """

    def __init__(self, cfg: CfgNode, start_iter: int, run_id: str = ""):
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        super().__init__(start_iter)
        self._metric = Metric
        folder = Path(cfg.OUTPUT_DIR).resolve()
        uri, self._place = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:  # MLflow's plain files are no longer taken by its newest versions
            uri, self._place = f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlruns").as_uri()
        self._client = MlflowClient(uri)
        self.run_id = run_id or self._new_run(cfg)
        if run_id:
            self._client.update_run(run_id, status="RUNNING")

    def _new_run(self, cfg: CfgNode) -> str:
        name = cfg.WRITERS.PROJECT
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            number = self._client.create_experiment(name, self._place)
        else:
            number = experiment.experiment_id
        run = self._client.create_run(number, run_name=run_name(cfg))
        self._client.log_text(run.info.run_id, cfg.dump(), "config.yaml")
        return run.info.run_id

    def send(self, iteration, scalars, pictures) -> None:
        """See :class:`Tracker`; values that are not finite are left out."""
        now = int(1000 * time.time())
        metrics = [
            self._metric(_mlflow_name(name), value, now, iteration)
            for name, value in scalars.items()
            if math.isfinite(value)
        ]
        self._client.log_batch(self.run_id, metrics=metrics)
        for name, picture in pictures.items():
            file = f"pictures/{_mlflow_name(name).replace('/', '_')}_{iteration:07d}.png"
            self._client.log_image(self.run_id, picture, artifact_file=file)

    def close(self) -> None:
        """See detectron2."""
        self._client.set_terminated(self.run_id)


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)


def run_name(cfg: CfgNode) -> str:
    """WRITERS.RUN, or the last folder of OUTPUT_DIR."""
    return cfg.WRITERS.RUN or os.path.basename(os.path.abspath(cfg.OUTPUT_DIR))


_KINDS: dict[str, Callable[[CfgNode, int, str], Any]] = {
    "wandb": WandbWriter,
    "mlflow": MlflowWriter,
}


def build_trackers(cfg: CfgNode, start_iter: int) -> list[EventWriter]:
    """The writers of WRITERS.NAMES, started; what fails later is said once, and training goes on.

    Args:
        cfg: of the run.
        start_iter: the first iteration of this process; behind 0 the runs of before are continued.

    Raises:
        ConfigError: one cannot be started.
    """
    path = os.path.join(cfg.OUTPUT_DIR, IDS)
    ids = _read_ids(path) if start_iter else {}
    made = []
    for name in cfg.WRITERS.NAMES:
        try:
            writer = _KINDS[name](cfg, start_iter, ids.get(name, ""))
        except Exception as error:  # of their servers, accounts and settings
            raise ConfigError(
                f"WRITERS.NAMES: {name} cannot be started: {type(error).__name__}: {error}"
            ) from error
        ids[name] = writer.run_id
        tolerant = Tolerant(name, lambda: None, Exception)
        tolerant.writer = writer
        made.append(tolerant)
    if made:
        with replacing(path) as file:
            file.write(json.dumps(ids).encode())
    return made


def _read_ids(path: str) -> dict[str, str]:
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return {str(name): str(value) for name, value in json.load(file).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"--resume: {path} is damaged ({error}); remove it, and WRITERS start new runs"
        ) from error
