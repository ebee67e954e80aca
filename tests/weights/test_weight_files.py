"""Files of weights as other tools leave them: they load where that is clear, else say one line."""

import random
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weight_files import KEY, Small, loaded, random_state

from projects.kd.errors import ConfigError
from projects.kd.files import split_query
from projects.kd.weights.loading import load_detector, load_weights

WORDS = ("model", "state_dict", "module", "student", "net", "ema", "epoch", "a.b", "module.model")


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
        (b"\x08\x09\x12\x07pytorch", "ONNX"),
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
