"""Checkpoints survive kills, stay plain, and say in one line why they do not fit."""

import multiprocessing
import os
import pickle
import shutil
import signal

import kd_models
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from projects.kd.engine import checkpoint as checkpoint_module
from projects.kd.engine.checkpoint import DistillCheckpointer, Heads, output_checkpoint
from projects.kd.engine.hooks import ModelEMA
from projects.kd.errors import ConfigError


class Tiny(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        self.head = nn.Conv2d(2, 3, 1)


class State:
    """A checkpointable that remembers what it was given."""

    def __init__(self, value=0):
        self.value = {"value": value}

    def state_dict(self):
        return self.value

    def load_state_dict(self, state):
        self.value = state


def heads(seed=0, name="CWD"):
    torch.manual_seed(seed)
    return Heads(nn.ModuleDict({name: nn.Linear(2, 2)}))


def checkpointer(folder, seed=0, **kwargs):
    return DistillCheckpointer(Tiny(seed), str(folder), trainer=State(), **kwargs)


def save(folder, iteration, **kwargs):
    writer = checkpointer(folder, seed=iteration, **kwargs)
    writer.checkpointables["trainer"].value = {"value": iteration}
    writer.save(f"model_{iteration:07d}", iteration=iteration)
    return writer.model


def one_line(caught, *parts):
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def same(one, other):
    return all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


def test_a_file_holds_the_plain_model_and_reads_with_weights_only(tmp_path):
    model = save(tmp_path, 9, distill=heads())
    data = torch.load(tmp_path / "model_0000009.pth", weights_only=True)
    assert set(data) == {"model", "trainer", "distill", "iteration"}
    assert set(data["model"]) == set(model.state_dict())
    stock = Tiny(1)
    rest = DetectionCheckpointer(stock).load(str(tmp_path / "model_0000009.pth"))
    assert same(stock, model) and rest["iteration"] == 9


def test_resume_restores_all_and_loading_only_the_model(tmp_path):
    own = heads(3)
    model = save(tmp_path, 9, distill=own)
    back = checkpointer(tmp_path, 1, distill=heads(4))
    assert back.resume_or_load("", resume=True)["iteration"] == 9
    assert same(back.model, model) and back.checkpointables["trainer"].value == {"value": 9}
    assert same(back.checkpointables["distill"].heads, own.heads)
    fresh = checkpointer(tmp_path, 1, distill=heads(4))
    assert fresh.resume_or_load(str(tmp_path / "model_0000009.pth"), resume=False) == {}
    assert same(fresh.model, model) and fresh.checkpointables["trainer"].value == {"value": 0}
    assert same(fresh.checkpointables["distill"].heads, heads(4).heads)


def test_without_a_checkpoint_resume_starts_from_the_weights(tmp_path):
    (tmp_path / "other").mkdir()
    model = save(tmp_path / "other", 9)
    fresh = checkpointer(tmp_path, 1)
    assert fresh.resume_or_load(str(tmp_path / "other/model_0000009.pth"), resume=True) == {}
    assert same(fresh.model, model)


def _die_in_torch_save(data, file):
    file.write(b"PK half of a checkpoint")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_save(folder, moment):
    if moment == "writing":
        checkpoint_module.torch.save = _die_in_torch_save
    elif moment == "renaming":
        checkpoint_module.os.replace = _die
    else:
        DistillCheckpointer.tag_last_checkpoint = _die
    save(folder, 19)


@pytest.mark.parametrize("moment", ["writing", "renaming", "pointing"])
def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path, moment):
    model = save(tmp_path, 9)
    process = multiprocessing.get_context("fork").Process(
        target=_killed_save, args=(tmp_path, moment)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    back = checkpointer(tmp_path, 1)
    assert back.resume_or_load("", resume=True)["iteration"] == 9
    assert same(back.model, model)
    save(tmp_path, 29)
    assert not list(tmp_path.glob(".*partial"))
    assert checkpointer(tmp_path).resume_or_load("", resume=True)["iteration"] == 29


def test_first_checkpoint_without_its_pointer_is_found(tmp_path):
    model = save(tmp_path, 9)
    (tmp_path / "last_checkpoint").unlink()
    back = checkpointer(tmp_path, 1)
    assert back.resume_or_load("", resume=True)["iteration"] == 9
    assert same(back.model, model)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_last_checkpoint_names_the_one_before(tmp_path, damage):
    save(tmp_path, 9)
    save(tmp_path, 19)
    os.utime(tmp_path / "model_0000009.pth", (1, 1))
    shutil.copy(tmp_path / "model_0000009.pth", tmp_path / "unrelated.pth")
    last = tmp_path / "model_0000019.pth"
    whole = last.read_bytes()
    last.unlink() if damage == "missing" else last.write_bytes(
        whole[: len(whole) // 2] if damage == "truncated" else b""
    )
    back = checkpointer(tmp_path, 1)
    with pytest.raises(ConfigError) as caught:
        back.resume_or_load("", resume=True)
    one_line(caught, "last_checkpoint", "model_0000019.pth", "model_0000009.pth", "truncated")
    assert back.last_good().endswith("model_0000009.pth")


def test_truncated_weights_are_named(tmp_path):
    save(tmp_path, 9)
    path = tmp_path / "model_0000009.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError) as caught:
        checkpointer(tmp_path / "new").resume_or_load(str(path), resume=True)
    one_line(caught, "MODEL.WEIGHTS", "model_0000009.pth", "truncated")


def test_another_architecture_is_refused():
    retina = kd_models.build(kd_models.tiny_cfg("RetinaNet"))
    rcnn = kd_models.build(kd_models.tiny_cfg("GeneralizedRCNN"))
    wide = kd_models.build(kd_models.tiny_cfg(MODEL__RESNETS__STEM_OUT_CHANNELS=16))
    assert _matching_error(wide, retina) is None  # only the stem differs
    message = _matching_error(retina, {"encoder.weight": torch.zeros(2)})
    assert "MODEL.WEIGHTS" in message and "another architecture" in message
    assert "0 of its 1 entries fit, which are encoder.weight (1)" in message
    # same backbone: fine-tuning from another kind of detector is allowed
    assert _matching_error(retina, rcnn) is None


def _matching_error(model, source):
    state = source if isinstance(source, dict) else source.state_dict()
    loader = DistillCheckpointer(model)
    loader._name = "weights.pth"
    try:
        loader._load_model({"model": dict(state)})
    except ConfigError as error:
        return str(error)
    return None


def test_deeper_backbone_of_the_same_kind_is_refused():
    basic = kd_models.build(kd_models.tiny_cfg())
    bottleneck = kd_models.build(
        kd_models.tiny_cfg(MODEL__RESNETS__DEPTH=50, MODEL__RESNETS__RES2_OUT_CHANNELS=256)
    )
    assert "another architecture" in _matching_error(basic, bottleneck)


def test_another_number_of_classes_loads_but_does_not_resume(tmp_path):
    source = kd_models.build(kd_models.tiny_cfg(), seed=1)
    DistillCheckpointer(source, str(tmp_path), trainer=State()).save("model_final", iteration=3)
    target = kd_models.build(kd_models.tiny_cfg(MODEL__RETINANET__NUM_CLASSES=5), seed=2)
    loader = DistillCheckpointer(target, str(tmp_path), trainer=State())
    loader.resume_or_load(str(tmp_path / "model_final.pth"), resume=False)
    assert torch.equal(target.backbone.fpn_lateral3.weight, source.backbone.fpn_lateral3.weight)
    with pytest.raises(ConfigError) as caught:
        loader.resume_or_load("", resume=True)
    one_line(caught, "--resume", "cls_score")


def imagenet_pickle(folder):
    """Bare backbone weights as in detectron2's ImageNet files."""
    source = kd_models.build(kd_models.tiny_cfg(), seed=5)
    state = {k: v.numpy() for k, v in source.backbone.bottom_up.state_dict().items()}
    state["stem.fc.weight"] = state["stem.conv1.weight"]
    path = folder / "R-18.pkl"
    with open(path, "wb") as file:
        pickle.dump({"model": state, "__author__": "x", "matching_heuristics": True}, file)
    return str(path), source


def test_backbone_only_pickle_needs_trust_and_fills_the_backbone(tmp_path):
    path, source = imagenet_pickle(tmp_path)
    model = kd_models.build(kd_models.tiny_cfg(), seed=6)
    with pytest.raises(ConfigError) as caught:
        DistillCheckpointer(model).resume_or_load(path, resume=False)
    one_line(caught, "R-18.pkl", "runs code", "KD.ALLOW_PICKLE")
    DistillCheckpointer(model, allow_pickle=True).resume_or_load(path, resume=False)
    assert same(model.backbone.bottom_up, source.backbone.bottom_up)


def test_bare_backbone_file_needs_the_query(tmp_path):
    source = kd_models.build(kd_models.tiny_cfg(), seed=5)
    path = str(tmp_path / "backbone.pth")
    torch.save(source.backbone.bottom_up.state_dict(), path)
    model = kd_models.build(kd_models.tiny_cfg(), seed=6)
    with pytest.raises(ConfigError) as caught:
        DistillCheckpointer(model).resume_or_load(path, resume=False)
    one_line(caught, "0 of its", "?matching_heuristics=True")
    DistillCheckpointer(model).resume_or_load(path + "?matching_heuristics=True", resume=False)
    assert same(model.backbone.bottom_up, source.backbone.bottom_up)


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["KD_TEST_PAYLOAD"],)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_TEST_PAYLOAD", str(tmp_path / "ran"))
    torch.save({"model": Tiny().state_dict(), "extra": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(ConfigError) as caught:
        checkpointer(tmp_path / "new").resume_or_load(str(tmp_path / "bad.pth"), resume=False)
    one_line(caught, "bad.pth", "KD.ALLOW_PICKLE")
    assert not (tmp_path / "ran").exists()


def test_missing_heads_are_an_error_unless_allowed(tmp_path):
    save(tmp_path, 9)
    with pytest.raises(ConfigError) as caught:
        checkpointer(tmp_path, 1, distill=heads()).resume_or_load("", resume=True)
    one_line(caught, "distill", "KD.ALLOW_MISSING_DISTILL")
    allowed = checkpointer(tmp_path, 1, distill=heads(4), allow_missing_distill=True)
    assert allowed.resume_or_load("", resume=True)["iteration"] == 9
    assert same(allowed.checkpointables["distill"].heads, heads(4).heads)


def test_other_heads_are_an_error(tmp_path):
    save(tmp_path, 9, distill=heads(name="FGFI"))
    with pytest.raises(ConfigError) as caught:
        checkpointer(tmp_path, 1, distill=heads()).resume_or_load("", resume=True)
    one_line(caught, "KD.HEADS", "FGFI")


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    save(tmp_path, 9)
    old = (tmp_path / "model_0000009.pth").read_bytes()

    def full(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", full)
    with pytest.raises(ConfigError) as caught:
        save(tmp_path, 9)
    one_line(caught, "OUTPUT_DIR", "No space left")
    assert (tmp_path / "model_0000009.pth").read_bytes() == old
    assert not list(tmp_path.glob(".*"))


def test_averaged_weights_are_evaluated_on_request(tmp_path):
    model = Tiny(1)
    ema = ModelEMA(model, 0.75)
    ema.start()
    first = model.head.weight.detach().clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        model.backbone[1].running_mean.add_(2.0)
    ema.update()
    assert torch.allclose(ema.average["head.weight"], 0.75 * first + 0.25 * (first + 1.0))
    assert torch.equal(ema.average["backbone.1.running_mean"], torch.full((2,), 2.0))
    DistillCheckpointer(model, str(tmp_path), ema=ema).save("model_final", iteration=1)
    path = str(tmp_path / "model_final.pth")
    averaged, plain = Tiny(2), Tiny(2)
    DistillCheckpointer(averaged, use_ema=True).resume_or_load(path, resume=False)
    DistillCheckpointer(plain).resume_or_load(path, resume=False)
    assert torch.equal(averaged.head.weight, ema.average["head.weight"])
    assert torch.equal(plain.head.weight, model.head.weight)
    with ema.applied():
        assert torch.equal(model.head.weight, averaged.head.weight)
    assert torch.equal(model.head.weight, plain.head.weight)
    save(tmp_path, 9)
    with pytest.raises(ConfigError, match="SOLVER.EMA.EVAL_ONLY"):
        DistillCheckpointer(averaged, use_ema=True).resume_or_load(
            str(tmp_path / "model_0000009.pth"), resume=False
        )


def test_output_folder_with_a_checkpoint_is_noticed(tmp_path):
    assert output_checkpoint(str(tmp_path / "none")) == ""
    (tmp_path / "teacher.pth").touch()
    assert output_checkpoint(str(tmp_path)) == ""
    save(tmp_path, 9)
    assert output_checkpoint(str(tmp_path)) == "model_0000009.pth"
