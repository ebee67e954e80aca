"""What changes between a checkpoint and its resume takes effect and is named, or is refused."""

import json
import logging
import os
import random
import shutil

import kd_models
import pytest
import torch
import toy_data
import yaml
from kd_runs import interrupt, run_settings, start
from torch import nn

from projects.kd import evaluation
from projects.kd.commands import train
from projects.kd.engine import checkpoint as checkpoint_module
from projects.kd.engine.checkpoint import DistillCheckpointer
from projects.kd.engine.resume import changed_keys, config_text
from projects.kd.errors import ConfigError, disk_fault, exit_on_user_error

NAME = "noise_resume"


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda cfg, model: {"bbox": {"AP": 1.0}})
    return toy_data.register_noise(tmp_path, NAME)


def cfg_of(tmp_path, folder="run", **changes):
    settings = run_settings(tmp_path, folder, NAME)
    return kd_models.tiny_cfg(**(settings | changes))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of two iterations, interrupted: it is the same for all, each has a copy."""
    folder = tmp_path_factory.mktemp("interrupted")
    toy_data.register_noise(folder, NAME)
    interrupt(start(cfg_of(folder)), at=3)
    return folder / "run"


@pytest.fixture
def run(interrupted, data, tmp_path):
    """The folder of an interrupted run."""
    return shutil.copytree(interrupted, tmp_path / "run")


def resume(tmp_path, caplog, **changes):
    """The resumed trainer, and the lines that name what has changed."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer = start(cfg_of(tmp_path, **changes), resume=True)
    return trainer, [r.getMessage() for r in caplog.records if "--resume" in r.getMessage()]


def test_rates_and_decay_of_the_config_are_in_effect(run, tmp_path, caplog):
    trainer, lines = resume(tmp_path, caplog)
    assert lines == [] and trainer.start_iter == 2
    same = trainer.optimizations["student"].optimizer
    trainer, lines = resume(
        tmp_path, caplog, SOLVER__BASE_LR=0.002, SOLVER__WEIGHT_DECAY=0.003, SOLVER__MOMENTUM=0.5
    )
    changed = trainer.optimizations["student"].optimizer
    for old, new in zip(same.param_groups, changed.param_groups, strict=True):
        assert new["lr"] == pytest.approx(old["lr"] / 10, rel=1e-12)
        assert new["momentum"] == 0.5 and new["weight_decay"] in (0.0, 0.003)
    assert len(lines) == 1 and "SOLVER.BASE_LR 0.02 -> 0.002" in lines[0]
    assert "; SOLVER.WEIGHT_DECAY 0.0001 -> 0.003" in lines[0] and "\n" not in lines[0]
    trainer.train()
    rate = trainer.storage.history("lr").latest()
    assert rate == pytest.approx(0.002 * 0.1)  # after SOLVER.STEPS
    logged = {
        line["iteration"]: line.get("lr") for line in map(json.loads, open(run / "metrics.json"))
    }
    assert logged[5] == rate


@pytest.mark.parametrize(
    "changes",
    [
        {"SOLVER__IMS_PER_BATCH": 1},
        {"INPUT__MIN_SIZE_TRAIN": (40,)},
        {"DATASETS__TRAIN": (NAME, NAME + "_more")},
        {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__DTYPE": "bfloat16"},
        {"SOLVER__EMA__ENABLED": True},
        {"SOLVER__STEPS": (4,)},
        {"SEED": 12},
        {"SOLVER__ACCUM_STEPS": 2},
        {"SOLVER__LR_SCHEDULER_NAME": "WarmupPolyLR"},
        {"SOLVER__CLIP_GRADIENTS__ENABLED": True},
    ],
)
def test_other_changes_are_named_and_trained_with(run, tmp_path, caplog, changes):
    toy_data.register_noise(tmp_path, NAME + "_more")
    trainer, lines = resume(tmp_path, caplog, **changes)
    line = next(line for line in lines if "other values than before" in line)
    for key, value in changes.items():
        shown = list(value) if isinstance(value, tuple) else value
        assert f"{key.replace('__', '.')} " in line
        assert f"-> {shown!r}" in line or f"-> {value!r}" in line
    if "SOLVER__AMP__ENABLED" not in changes:  # needs larger maps than these
        trainer.train()
        assert torch.load(run / "model_final.pth", weights_only=True)["iteration"] == 5


def test_every_random_change_of_a_number_is_named(tmp_path):
    cfg = cfg_of(tmp_path)
    text = config_text(cfg)
    numbers = [k for k, v in flat(cfg) if type(v) in (int, float) and k != "VERSION"]
    for seed in range(5):
        chosen = random.Random(seed).sample(numbers, 3)
        other = cfg.clone()
        for key in chosen:
            *path, name = key.split(".")
            node = other
            for part in path:
                node = node[part]
            node[name] += 1
        assert set(changed_keys(text, other)) == set(chosen)
    moved = cfg.clone()
    moved.OUTPUT_DIR = "elsewhere"
    assert changed_keys(text, moved) == {}


def flat(node, path=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def test_what_cannot_take_effect_is_said_and_is_not_in_the_config(run, tmp_path, caplog):
    weights = str(tmp_path / "other.pth")
    trainer, lines = resume(tmp_path, caplog, MODEL__WEIGHTS=weights, SEED=-1)
    assert len(lines) == 1 and "without effect" in lines[0]
    assert f"MODEL.WEIGHTS '' -> '{weights}'" in lines[0] and "SEED 11 -> -1" in lines[0]
    trainer.write_config()
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["MODEL"]["WEIGHTS"] == "" and written["SEED"] == 11
    assert trainer.seed == 11


def test_other_kinds_of_optimizer_are_refused_and_the_config_stays(run, tmp_path):
    config = kd_models.write_config(
        cfg_of(tmp_path, SOLVER__OPTIMIZER="AdamW"), tmp_path / "adamw.yaml"
    )
    (run / "config.yaml").write_text("the config that is used")
    with pytest.raises(ConfigError) as caught:
        train.main(train.parse_arguments(["--config-file", config, "--resume"]))
    message = str(caught.value)
    assert "SOLVER.OPTIMIZER is AdamW, the checkpoint's momenta are of SGD" in message
    assert "SOLVER.OPTIMIZER 'SGD' -> 'AdamW'" in message and "\n" not in message
    assert (run / "config.yaml").read_text() == "the config that is used"


def test_adamw_to_sgd_is_refused(tmp_path):
    adam = {"SOLVER__OPTIMIZER": "AdamW", "SOLVER__BASE_LR": 0.001}
    interrupt(start(cfg_of(tmp_path, **adam)), at=3)
    with pytest.raises(ConfigError, match="is SGD, the checkpoint's momenta are of Adam or AdamW"):
        start(cfg_of(tmp_path), resume=True)


def test_a_finished_run_says_that_nothing_is_left_and_evaluates(tmp_path, caplog):
    start(cfg_of(tmp_path)).train()
    trainer, lines = resume(tmp_path, caplog)
    assert len(lines) == 1 and "6 iterations are done, SOLVER.MAX_ITER is 6" in lines[0]
    (tmp_path / "run/config.yaml").write_text("what was trained with")
    trainer.write_config()
    assert (tmp_path / "run/config.yaml").read_text() == "what was trained with"
    assert trainer.train() == {"bbox": {"AP": 1.0}}
    lines = [json.loads(line) for line in open(tmp_path / "run/metrics.json")]
    assert [line["iteration"] for line in lines] == [5, 6] and lines[1]["bbox/AP"] == 1.0


def test_an_empty_folder_is_said(tmp_path, caplog):
    _, lines = resume(tmp_path, caplog)
    where = tmp_path / "run"
    assert lines == [f"--resume: {where} holds no checkpoint, this starts anew from random weights"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00", b"../model_0000001.pth", b"/etc/passwd", b"a\x00b", b"no.pth", b"."],
)
def test_a_garbled_pointer_is_one_line(run, tmp_path, content):
    (run / "last_checkpoint").write_bytes(content)
    with pytest.raises(ConfigError, match="last_checkpoint names .*model_0000001.pth") as caught:
        start(cfg_of(tmp_path), resume=True)
    assert "\n" not in str(caught.value)
    (run / "last_checkpoint").write_bytes(b" model_0000001.pth\r\n")  # written by hand
    assert start(cfg_of(tmp_path), resume=True).start_iter == 2


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_to_a_checkpoint_is_one_line(run, tmp_path, seed):
    path = run / "model_0000001.pth"
    whole = path.read_bytes()
    choose = random.Random(seed)
    trainer = start(cfg_of(tmp_path))
    for _ in range(6):
        data = bytearray(whole)
        place = choose.randrange(len(data))
        data[place] ^= 0xFF
        path.write_bytes(data if choose.random() < 0.7 else data[:place])
        try:
            trainer.resume_or_load(True)
        except ConfigError as error:
            assert str(error).startswith("--resume: ") and "\n" not in str(error)


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file["trainer"].pop("_trainer"),
        lambda file: file["trainer"]["_trainer"].update(optimizers=3),
        lambda file: file["trainer"].update(running=[]),
        lambda file: file.update(trainer={"iteration": 3}),
        lambda file: file.pop("trainer"),
        lambda file: file.update(trainer=None),
        lambda file: file["trainer"].update(config="a: [1"),
    ],
)
def test_checkpoints_of_another_version_are_one_line(run, tmp_path, change):
    path = run / "model_0000001.pth"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(ConfigError, match="^--resume: ") as caught:
        start(cfg_of(tmp_path), resume=True)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_its_config_resumes_with_a_word(run, tmp_path, caplog):
    path = run / "model_0000001.pth"
    content = torch.load(path, weights_only=True)
    del content["trainer"]["config"]
    torch.save(content, path)
    trainer, lines = resume(tmp_path, caplog)
    assert trainer.start_iter == 2 and len(lines) == 1 and "older version" in lines[0]


def test_evaluation_refuses_weights_that_leave_parts_random(tmp_path):
    torch.save({"model": {"layer.weight": torch.ones(2, 2)}}, tmp_path / "part.pth")
    DistillCheckpointer(Linear()).load(str(tmp_path / "part.pth"), [])
    with pytest.raises(ConfigError, match=r"random ones: layer\.bias \(1\)"):
        DistillCheckpointer(Linear(), complete=True).load(str(tmp_path / "part.pth"), [])


class FullFile:
    """A file of which the disk takes the first bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_disk_that_fills_up_is_named_and_the_old_checkpoint_stays(run, tmp_path, monkeypatch):
    before = (run / "model_0000001.pth").read_bytes()
    save = torch.save
    for room in (0, 100, 5000, len(before) - 100):

        def full(data, file, room=room):
            save(data, FullFile(file, room))

        monkeypatch.setattr(checkpoint_module.torch, "save", full)
        trainer = start(cfg_of(tmp_path), resume=True)
        with pytest.raises(ConfigError, match="No space left on device; .*model_0000001.pth is wh"):
            trainer.train()
        assert (run / "model_0000001.pth").read_bytes() == before
        assert sorted(x for x in os.listdir(run) if "model" in x) == ["model_0000001.pth"]
    monkeypatch.setattr(checkpoint_module.torch, "save", save)
    assert start(cfg_of(tmp_path), resume=True).start_iter == 2


def test_faults_of_the_disk_are_one_line_wherever_they_come_from(capsys):
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        try:
            raise OSError(30, "Read-only file system", "/out/x.json")
        except OSError as error:
            raise RuntimeError("unexpected pos 3") from error
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: Read-only file system (/out/x.json)")
    assert disk_fault(ValueError()) is None and disk_fault(FileNotFoundError(2, "x")) is None
