"""Files that run code when they are read: every reader asks for KD.ALLOW_PICKLE first."""

import os
import pickle

import kd_models
import pytest
import torch
import toy_data
from torch import nn
from weight_files import KEY, Small, loaded, random_state

from projects.kd import check_config, evaluation
from projects.kd.data.loader import load_dataset_dicts
from projects.kd.engine.checkpoint import DistillCheckpointer
from projects.kd.errors import ConfigError
from projects.kd.files import is_zoo_file, may_unpickle, resolve_weights
from projects.kd.modeling.conditional_detr_weights import read_weights
from projects.kd.modeling.timm_weights import load_timm_weights
from projects.kd.teacher_building import build_teacher
from projects.kd.weights.files import read_torch_file
from projects.kd.weights.loading import load_detector


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


ADDRESSES = (
    "detectron2://../trap.pkl",
    "detectron2://a/../../trap.pkl",
    "detectron2:///../trap.pkl",
    "https://dl.fbaipublicfiles.com/detectron2/../trap.pkl",
    "https://dl.fbaipublicfiles.com/detectron2/a/../../trap.pkl",
    "https://dl.fbaipublicfiles.com/detectron2/./../trap.pkl",
    "https://example.com/trap.pkl",
)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """Pickles that run code, at every place where an address may lead; whether it has run."""
    folder = tmp_path / "ran"
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for place in (
        "cache/trap.pkl",
        "cache/detectron2/a/x",
        "trap.pkl",
        "cache/detectron2/trap.pkl",
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        with open(tmp_path / place, "wb") as file:
            pickle.dump({"model": Trap(folder)}, file)
    for name in ("trap.pth", "trap.pyth", "trap.safetensors", "old.pth"):
        old = name.startswith("old")
        content = {"model": random_state(), "x": Trap(folder)}
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not old)
    yield tmp_path
    assert not folder.exists()


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_that_are_not_plain_are_not_the_zoos(trap, address):
    assert not is_zoo_file(address)
    for name in (address, f"{address}?matching_heuristics=True"):
        assert "KD.ALLOW_PICKLE" in loaded(name)
    with pytest.raises(ConfigError, match=r"^MODEL\.WEIGHTS.*ALLOW_PICKLE"):
        DistillCheckpointer(Small()).resume_or_load(address, resume=False)


def test_the_teachers_weights_ask_too(trap):
    teacher = kd_models.write_config(kd_models.tiny_cfg(), trap / "teacher.yaml")
    for name in (ADDRESSES[0], str(trap / "trap.pth")):
        with pytest.raises(ConfigError, match=r"^KD\.TEACHER\.WEIGHTS.*ALLOW_PICKLE"):
            build_teacher(kd_models.distill_cfg((teacher, name)))


@pytest.mark.parametrize(
    "name", ["trap.pkl", "trap.pth", "trap.pyth", "trap.safetensors", "old.pth"]
)
def test_every_reader_of_weights_asks_before_code_runs(trap, name):
    path = str(trap / name)
    roads = [
        lambda: load_detector(Small(), path, KEY),
        lambda: DistillCheckpointer(Small()).resume_or_load(path, resume=False),
        lambda: DistillCheckpointer(Small()).resume_or_load(path, resume=True),
        lambda: read_torch_file(path, KEY),
        lambda: load_timm_weights(Small(), path),
        lambda: read_weights(path),
    ]
    for road in roads:
        with pytest.raises(ConfigError) as caught:
            road()
        assert "\n" not in str(caught.value)
    run = trap / "run"
    run.mkdir()
    (run / "model_0000001.pth").write_bytes((trap / name).read_bytes())
    (run / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(ConfigError, match="^--resume"):
        DistillCheckpointer(Small(), str(run)).resume_or_load("", resume=True)


def test_proposal_files_ask_like_all_pickles(trap):
    toy_data.register_noise(trap, "noise_proposals")
    files = (str(trap / "trap.pkl"),)
    cfg = kd_models.tiny_cfg(
        "GeneralizedRCNN",
        MODEL__LOAD_PROPOSALS=True,
        DATASETS__TRAIN=("noise_proposals",),
        DATASETS__TEST=("noise_proposals",),
        DATASETS__PROPOSAL_FILES_TRAIN=files,
        DATASETS__PROPOSAL_FILES_TEST=files,
    )
    for road, key in (
        (lambda: check_config(cfg), "PROPOSAL_FILES_TEST"),
        (lambda: load_dataset_dicts(cfg, cfg.DATASETS.TRAIN), "PROPOSAL_FILES_TRAIN"),
        (lambda: evaluation.evaluate(cfg, nn.Identity()), "PROPOSAL_FILES_TEST"),
    ):
        with pytest.raises(ConfigError, match=rf"^DATASETS\.{key}.*KD\.ALLOW_PICKLE"):
            road()


def test_the_zoos_files_have_the_zoos_digest(tmp_path):
    name = "detectron2://COCO-Detection/x_1x/1/model_final_900150.pkl"  # the MD5 of "abc"
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert is_zoo_file(name) and may_unpickle(name, str(path), KEY, False)
    path.write_bytes(b"ab1")
    with pytest.raises(ConfigError, match="not the model zoo's file: its MD5 begins with 68b6a7"):
        may_unpickle(name, str(path), KEY, False)
    assert may_unpickle(name, str(path), KEY, True)
    assert not may_unpickle(str(path), str(path), KEY, False)
    assert resolve_weights(str(path)) == str(path)
