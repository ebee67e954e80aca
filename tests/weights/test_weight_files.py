"""Files of weights as other tools leave them: they load where that is clear, else say one line."""

import os
import pickle
import random
import struct

import kd_models
import numpy as np
import pytest
import torch
import toy_data
from safetensors.torch import save_file
from torch import nn

from projects.kd import check_config, evaluation
from projects.kd.data.loader import load_dataset_dicts
from projects.kd.engine.checkpoint import DistillCheckpointer
from projects.kd.errors import ConfigError
from projects.kd.files import is_zoo_file, may_unpickle, resolve_weights, split_query
from projects.kd.modeling.conditional_detr_weights import read_weights
from projects.kd.modeling.timm_weights import load_timm_weights
from projects.kd.teacher import build_teacher
from projects.kd.weights.files import read_torch_file
from projects.kd.weights.loading import load_detector, load_weights

KEY = "MODEL.WEIGHTS"
WORDS = ("model", "state_dict", "module", "student", "net", "ema", "epoch", "a.b", "module.model")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        self.head = nn.ModuleDict({"cls": nn.Linear(2, 3), "box": nn.Linear(2, 4)})
        self.register_buffer("mask", torch.tensor([0.0, -float("inf")]))


def random_state(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.ones_like(value)
        for name, value in Small().state_dict().items()
    }


def loaded(path, key=KEY):
    """What a fresh model holds after reading a file, or the one line that says why it does not."""
    model = Small()
    try:
        missing = load_detector(model, str(path), key)
    except ConfigError as error:
        assert str(error).startswith(f"{key}: ") and "\n" not in str(error)
        assert len(str(error)) < 600
        return str(error)
    assert missing == []
    return model.state_dict()


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_random_prefixes_and_containers_load(tmp_path):
    state = random_state()
    for seed in range(40):
        choose = random.Random(seed)
        prefix = "".join(f"{choose.choice(WORDS)}." for _ in range(choose.randrange(4)))
        content = {f"{prefix}{name}": value for name, value in state.items()}
        if choose.random() < 0.3:
            content = {name.replace("head.", "head._orig_mod."): v for name, v in content.items()}
        path = tmp_path / f"{seed}.{choose.choice(('pth', 'bin', 'safetensors'))}"
        if choose.random() < 0.25:
            save_file(content, path)
        else:
            for _ in range(choose.randrange(4)):
                content = {choose.choice(WORDS): content}
                content |= {"lr": 0.1, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
            torch.save(content, path, _use_new_zipfile_serialization=choose.random() < 0.7)
        result = loaded(path)
        assert not isinstance(result, str), (seed, result)
        assert same(state, result), seed


def test_random_mixtures_load_the_right_model_or_say_one_line(tmp_path):
    state, other = random_state(1), random_state(2)
    outcomes = set()
    for seed in range(40):
        choose = random.Random(seed)
        names = choose.sample(WORDS, 2)
        first, second = names
        kind = choose.randrange(3)
        if kind == 0:  # two models behind two prefixes
            content = {f"{first}.{k}": v for k, v in state.items()}
            content |= {f"{second}.{k}": v for k, v in other.items()}
        elif kind == 1:  # two entries
            content = {first: state, second: other}
        else:  # the names of no model, and another thing
            content = {first: {f"x{i}": v for i, v in enumerate(state.values())}, second: 3}
        torch.save(content, tmp_path / "mixed.pth")
        result = loaded_or_refused(tmp_path / "mixed.pth")
        outcomes.add((kind, isinstance(result, str)))
        if isinstance(result, str):
            assert kind == 2 or "several models" in result, result
        else:  # by the usual name, of which "model" comes before "state_dict" and "net"
            usual = [name for name in ("model", "state_dict", "net") if name in names]
            right = state if usual[0] == first else other
            assert kind == 1 and same(right, result), seed
    assert outcomes == {(0, True), (1, True), (1, False), (2, True)}


def loaded_or_refused(path):
    model = Small()
    try:
        result = load_weights(model, str(path), KEY)
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)
    return f"lacks {len(result.missing)}; {result}" if result.missing else model.state_dict()


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_is_one_line_and_never_other_values(tmp_path, seed):
    state = random_state()
    torch.save({"model": state}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    choose = random.Random(seed)
    refused = 0
    for _ in range(40):
        data = bytearray(whole)
        kind = choose.randrange(4)
        place = choose.randrange(len(data))
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data[place] ^= 1 << choose.randrange(8)
        elif kind == 2:
            data[place : place + 64] = bytes(len(data[place : place + 64]))
        else:
            data[place:place] = choose.randbytes(7)
        (tmp_path / "damaged.pth").write_bytes(data)
        result = loaded(tmp_path / "damaged.pth")
        if isinstance(result, str):
            refused += 1
        else:
            assert same(state, result)  # what was hit is padding or a date
    assert refused > 20


def test_a_flipped_bit_in_a_tensor_is_named(tmp_path):
    state = random_state()
    torch.save({"model": state}, tmp_path / "w.pth")
    data = bytearray((tmp_path / "w.pth").read_bytes())
    place = data.find(state["head.cls.weight"].numpy().tobytes())
    data[place + 3] ^= 0x40
    (tmp_path / "w.pth").write_bytes(data)
    assert torch.load(tmp_path / "w.pth", weights_only=True)  # torch alone does not notice
    assert "is damaged" in loaded(tmp_path / "w.pth")


def test_a_file_without_checksums_is_read(tmp_path):
    from torch.utils.serialization import config

    config.save.compute_crc32 = False
    try:
        torch.save({"model": random_state()}, tmp_path / "w.pth")
    finally:
        config.save.compute_crc32 = True
    assert same(random_state(), loaded(tmp_path / "w.pth"))


def to_complex(x):
    return torch.complex(x, x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (to_complex, "is complex64, the model has float32"),
        (lambda x: (x * 100).int(), "is int32, the model has float32"),
        (lambda x: x > 0.5, "is bool, the model has float32"),
        (lambda x: x.to_sparse(), "is sparse"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "is quantized"),
        (lambda x: x.to("meta"), "has no data"),
        (lambda x: x * float("nan"), "holds 6 values of 6 that are NaN or infinite: the file is"),
        (lambda x: x.double() * 1e300, "NaN or infinite as float32"),
    ],
)
def test_values_that_cannot_be_meant_are_named(tmp_path, change, words):
    state = random_state()
    state["head.cls.weight"] = change(state["head.cls.weight"])
    torch.save({"model": state}, tmp_path / "w.pth")
    result = loaded(tmp_path / "w.pth")
    assert "head.cls.weight" in result and words in result


def test_other_precisions_are_read_and_other_shapes_left_to_the_report(tmp_path):
    state = {k: v.half() if v.is_floating_point() else v for k, v in random_state().items()}
    state["mask"] = torch.tensor([0.0, -float("inf")])
    torch.save({"model": state}, tmp_path / "w.pth")
    assert torch.equal(loaded(tmp_path / "w.pth")["head.cls.bias"], state["head.cls.bias"].float())
    state["extra"] = state["head.box.bias"] = torch.zeros(1).expand(10**13)  # 4 bytes in the file
    torch.save({"model": state}, tmp_path / "w.pth")
    assert load_detector(Small(), str(tmp_path / "w.pth"), KEY) == ["head.box.bias"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"\x1f\x8b\x08junk", "gzip"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"", "truncated"),
    ],
)
def test_what_people_take_for_weights(tmp_path, data, words):
    for name in ("w.pth", "w.pkl", "w.safetensors"):
        (tmp_path / name).write_bytes(data)
        if data or name == "w.pth":
            assert words in loaded(tmp_path / name)


def test_safetensors_by_content_and_torn(tmp_path):
    save_file(random_state(), tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.pth").write_bytes(data)
    assert same(random_state(), loaded(tmp_path / "w.pth"))
    for length in (0, 7, 30, len(data) - 1):
        (tmp_path / "w.safetensors").write_bytes(data[:length])
        assert "truncated" in loaded(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert "truncated" in loaded(tmp_path / "w.safetensors")


def test_torchscript_and_zip_archives_are_named(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "w.pth")
    assert "TorchScript" in loaded(tmp_path / "w.pth")
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    assert "zip archive" in loaded(tmp_path / "w.npz")


def test_home_variables_and_the_query(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KD_PLACE", str(tmp_path))
    torch.save(random_state(), tmp_path / "w.pth")
    torch.save(random_state(), tmp_path / "odd?name.pth")
    for name in ("~/w.pth", "$KD_PLACE/w.pth", "${KD_PLACE}/w.pth", "~/odd?name.pth"):
        assert same(random_state(), loaded(name)), name
    assert same(random_state(), loaded("~/w.pth?matching_heuristics=True"))
    for query in ("matching_heuristics=true", "x=1", "matching_heuristics=True&x=1"):
        assert f"'?{query}'" in loaded(f"~/w.pth?{query}")
    assert split_query("a?b=c") == ("a", "b=c")
    assert "KD_UNSET is not set" in loaded("$KD_UNSET/w.pth")
    assert "is a folder, name a file of weights in it, w.pth" in loaded(tmp_path)


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
