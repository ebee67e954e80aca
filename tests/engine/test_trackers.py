"""Writers of other services: what they are sent, and their own files without a network."""

import json
import logging
import sqlite3

import kd_models
import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from projects.kd.check import _check_writers
from projects.kd.engine import trackers
from projects.kd.engine.trackers import Tracker, build_trackers
from projects.kd.errors import ConfigError


class Kept(Tracker):
    """Keeps what it is sent; a service that never fails, or always."""

    runs: list = []
    fails = False

    def __init__(self, cfg, start_iter, run_id=""):
        super().__init__(start_iter)
        self.run_id, self.sent = run_id or f"run{len(self.runs)}", []
        self.runs.append(self)

    def send(self, iteration, scalars, pictures):
        if self.fails:
            raise RuntimeError("no\nconnection")
        self.sent.append((iteration, scalars, {k: v.tolist() for k, v in pictures.items()}))


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(Kept, "runs", [])
    monkeypatch.setattr(Kept, "fails", False)
    monkeypatch.setitem(trackers._KINDS, "wandb", Kept)
    return Kept


def config(tmp_path, *names, **values):
    return kd_models.tiny_cfg(OUTPUT_DIR=str(tmp_path / "run7"), WRITERS__NAMES=names, **values)


def steps(writer, start, count):
    with EventStorage(start) as storage:
        for i in range(start, start + count):
            storage.iter = i
            storage.put_scalar("loss", float(i), smoothing_hint=False)
            if i == start + 1:
                storage.put_scalar("bbox/AP", 0.5 * i, smoothing_hint=False)
                storage.put_image("detections/0", torch.ones(3, 1, 2))
            writer.write()
            storage.clear_images()
        writer.close()


def test_every_scalar_is_sent_once_with_its_iteration_and_pictures_in_bytes(tmp_path, kept):
    (tmp_path / "run7").mkdir()
    (writer,) = build_trackers(config(tmp_path, "wandb"), 0)
    steps(writer, 0, 3)
    white = [[[255] * 3] * 2]
    assert kept.runs[0].sent == [
        (0, {"loss": 0.0}, {}),
        (1, {"loss": 1.0, "bbox/AP": 0.5}, {"detections/0": white}),
        (2, {"loss": 2.0}, {}),
    ]
    build_trackers(config(tmp_path, "wandb"), 2)  # resumed
    build_trackers(config(tmp_path, "wandb"), 0)  # anew
    assert [run.run_id for run in kept.runs] == ["run0", "run0", "run2"]
    assert json.loads((tmp_path / "run7/writers.json").read_text()) == {"wandb": "run2"}
    (tmp_path / "run7/writers.json").write_text("[")
    with pytest.raises(ConfigError, match=r"--resume: .*writers\.json is damaged"):
        build_trackers(config(tmp_path, "wandb"), 2)


def test_a_service_that_fails_is_said_once_and_training_goes_on(tmp_path, kept, caplog):
    (tmp_path / "run7").mkdir()
    (writer,) = build_trackers(config(tmp_path, "wandb"), 0)
    kept.fails = True
    with caplog.at_level(logging.WARNING):
        steps(writer, 0, 3)
    message = "wandb cannot be written: no connection; training goes on without it"
    assert [record.getMessage() for record in caplog.records] == [message]


def test_what_cannot_start_and_what_is_missing_is_one_line(tmp_path, monkeypatch):
    def refuse(*words):
        raise ValueError("api_key not configured")

    monkeypatch.setitem(trackers._KINDS, "mlflow", refuse)
    with pytest.raises(ConfigError, match="mlflow cannot be started: ValueError: api_key not"):
        build_trackers(config(tmp_path, "mlflow"), 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb is not installed: pip install wandb"):
        _check_writers(config(tmp_path, "wandb"))
    _check_writers(config(tmp_path))
    with pytest.raises(ConfigError, match=r"TEST\.PICTURES\.PERIOD needs a data set"):
        _check_writers(config(tmp_path, TEST__PICTURES__PERIOD=1, DATASETS__TEST=()))


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "run7").mkdir()
    (writer,) = build_trackers(config(tmp_path, "wandb"), 0)
    steps(writer, 0, 3)
    wandb.teardown()  # its own process has written all then
    (file,) = (tmp_path / "run7/wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"bbox/AP" in content and b"detections/0" in content and b"run7" in content
    (picture,) = (tmp_path / "run7/wandb").glob("offline-run-*/files/media/images/**/*.png")
    assert picture.stat().st_size
    before = json.loads((tmp_path / "run7/writers.json").read_text())
    (writer,) = build_trackers(config(tmp_path, "wandb"), 3)
    steps(writer, 3, 2)
    assert json.loads((tmp_path / "run7/writers.json").read_text()) == before


def test_mlflow_in_files(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="the optional package mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run7").mkdir()
    cfg = config(tmp_path, "mlflow", WRITERS__RUN="mine")
    for start in (0, 3):  # resumed
        (writer,) = build_trackers(cfg, start)
        steps(writer, start, 3)
    with sqlite3.connect(tmp_path / "run7/mlflow.db") as store:
        runs = store.execute("select name, status from runs").fetchall()
        metrics = store.execute("select step, value from metrics where key = 'loss'").fetchall()
        aps = store.execute("select step, value from metrics where key = 'bbox/AP'").fetchall()
    assert runs == [("mine", "FINISHED")]
    assert sorted(metrics) == [(i, float(i)) for i in range(6)]
    assert sorted(aps) == [(1, 0.5), (4, 2.0)]
    files = {path.name for path in (tmp_path / "run7").rglob("*") if path.is_file()}
    assert {"config.yaml", "detections_0_0000001.png"} <= files


def test_pictures_of_floats_and_bytes_are_the_same():
    image = torch.rand(3, 4, 5)
    ours = trackers._pixels((255 * image).byte())
    assert np.abs(trackers._pixels(image).astype(int) - ours.astype(int)).max() <= 1
    assert ours.shape == (4, 5, 3)
