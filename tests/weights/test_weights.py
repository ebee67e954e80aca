"""Weights are read without running code, and what cannot be read is said in one line."""

import os
import pickle

import kd_models
import numpy as np
import pytest
import torch
from torch import nn

from projects.kd import ConfigError
from projects.kd.files import is_zoo_file, published_weights, resolve_weights
from projects.kd.weights.files import read_torch_file
from projects.kd.weights.loading import SafeCheckpointer, load_detector

KEY = "MODEL.WEIGHTS"


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def filled(model):
    return {name: torch.full_like(value, 2) for name, value in model.state_dict().items()}


def save_pickle(model, path, extra=None):
    state = {name: value.numpy() for name, value in filled(model).items()}
    with open(path, "wb") as file:
        pickle.dump({"model": state, "__author__": "test", "extra": extra}, file)
    return str(path)


def test_a_clean_file_is_read_whole(model, tmp_path):
    torch.save({"model": filled(model), "iteration": 3}, tmp_path / "good.pth")
    assert load_detector(model, str(tmp_path / "good.pth"), KEY) == []
    assert all((value == 2).all() for value in model.state_dict().values())


def test_a_bare_state_dict_is_read_too(model, tmp_path):
    torch.save(filled(model), tmp_path / "bare.pth")
    assert load_detector(model, str(tmp_path / "bare.pth"), KEY) == []
    assert (model[0].weight == 2).all()


def test_missing_and_misshapen_entries_are_listed(model, tmp_path):
    state = filled(model)
    del state["0.bias"], state["1.num_batches_tracked"]
    state["1.weight"] = torch.zeros(7)
    torch.save({"model": state}, tmp_path / "partial.pth")
    assert load_detector(model, str(tmp_path / "partial.pth"), KEY) == ["0.bias", "1.weight"]


@pytest.mark.parametrize("length", [0, 10, 0.5, -1])
def test_a_truncated_file_is_named(model, tmp_path, length):
    path = tmp_path / "torn.pth"
    torch.save({"model": filled(model)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * length) if isinstance(length, float) else length])
    with pytest.raises(ConfigError, match=rf"^{KEY}: '.*torn\.pth' is truncated") as error:
        load_detector(model, str(path), KEY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"not a checkpoint at all", b"\x80\x02K\x01."])
def test_other_files_are_named(model, tmp_path, data):
    path = tmp_path / "other.pth"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"^{KEY}: '.*other\.pth'"):
        load_detector(model, str(path), KEY)


@pytest.mark.parametrize("content", [[1, 2], {"model": [1]}, {"model": {"a": 1}}, {"epoch": 3}])
def test_a_torch_file_without_a_state_dict_is_named(model, tmp_path, content):
    torch.save(content, tmp_path / "list.pth")
    with pytest.raises(ConfigError, match=rf"^{KEY}: '.*list\.pth' holds no state dict"):
        load_detector(model, str(tmp_path / "list.pth"), KEY)


def test_a_single_tensor_is_no_checkpoint(model, tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(
        ConfigError, match=rf"^{KEY}: '.*tensor\.pth' holds no state dict.*single array"
    ):
        load_detector(model, str(tmp_path / "tensor.pth"), KEY)


def test_code_in_a_pth_file_runs_only_when_allowed(model, tmp_path):
    folder = tmp_path / "made_by_unpickling"
    path = str(tmp_path / "trap.pth")
    torch.save({"model": filled(model), "trap": Trap(folder)}, path)
    with pytest.raises(ConfigError, match=rf"^{KEY}: '.*trap\.pth'.*runs code.*KD\.ALLOW_PICKLE"):
        load_detector(model, path, KEY)
    assert not folder.exists()
    assert load_detector(model, path, KEY, allow_pickle=True) == []
    assert folder.exists() and (model[0].weight == 2).all()


def test_a_pickle_file_is_read_only_when_allowed(model, tmp_path):
    folder = tmp_path / "made_by_unpickling"
    path = save_pickle(model, tmp_path / "weights.pkl", Trap(folder))
    with pytest.raises(ConfigError, match=rf"^{KEY}: '.*weights\.pkl'.*runs code.*ALLOW_PICKLE"):
        load_detector(model, path, KEY)
    assert not folder.exists()
    assert load_detector(model, path, KEY, allow_pickle=True) == []
    assert folder.exists()


def test_numpy_inside_a_pth_file_needs_permission(model, tmp_path):
    path = str(tmp_path / "numpy.pth")
    torch.save({"model": filled(model), "score": np.float64(3.0)}, path)
    with pytest.raises(ConfigError, match="KD.ALLOW_PICKLE"):
        read_torch_file(path, KEY)
    assert read_torch_file(path, KEY, trusted=True)["score"] == 3.0


@pytest.mark.parametrize("allow", [False, True])
def test_a_truncated_pickle_is_named(model, tmp_path, allow, monkeypatch):
    path = tmp_path / "torn.pkl"
    save_pickle(model, path)
    path.write_bytes(path.read_bytes()[:-20])
    expected = "truncated" if allow else "KD.ALLOW_PICKLE"
    with pytest.raises(ConfigError, match=rf"^{KEY}: '.*torn\.pkl'.*{expected}"):
        load_detector(model, str(path), KEY, allow_pickle=allow)


def test_zoo_pickles_are_read_without_asking(model, tmp_path, monkeypatch):
    place = tmp_path / "detectron2" / "test" / "w.pkl"
    place.parent.mkdir(parents=True)
    save_pickle(model, place)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    url = "detectron2://test/w.pkl"
    assert is_zoo_file(url) and not is_zoo_file(str(place))
    assert load_detector(model, url, KEY) == []
    assert (model[0].weight == 2).all()


def test_missing_files_are_named(model):
    with pytest.raises(ConfigError, match=r"^KD\.X: no such file '/nowhere/w\.pth'"):
        load_detector(model, "/nowhere/w.pth", "KD.X")
    with pytest.raises(ConfigError, match=r"^KD\.X: no such file"):
        resolve_weights("~/nowhere/w.pth", "KD.X")


def test_a_failed_load_does_not_block_the_next(model, tmp_path):
    torch.save({"model": filled(model)}, tmp_path / "good.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK")
    checkpointer = SafeCheckpointer(model, key=KEY)
    with pytest.raises(ConfigError):
        checkpointer.load(str(tmp_path / "torn.pth"))
    checkpointer.load(str(tmp_path / "good.pth"))
    assert (model[0].weight == 2).all()


def test_zoo_urls():
    name, start = "model_zoo://COCO-Detection/retinanet_R_101_FPN_3x.yaml", "detectron2://R-101.pkl"
    assert published_weights(name, start) == (
        "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/retinanet_R_101_FPN_3x/"
        "190397697/model_final_971ab9.pkl"
    )
    assert published_weights(name, "own.pth", ["MODEL.WEIGHTS", "own.pth"]) == "own.pth"
    assert published_weights("model_zoo://Base-RetinaNet.yaml", start) == start
    assert published_weights("retinanet.yaml", start) == start


def test_a_detectors_own_file_loads_into_it(tmp_path):
    files = kd_models.write_teacher(tmp_path)
    model = kd_models.build(kd_models.tiny_cfg(), seed=7)
    assert load_detector(model, files[1], KEY) == []
    state = torch.load(files[1], weights_only=True)["model"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
