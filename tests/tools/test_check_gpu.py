"""kd-check-gpu finds equal steps equal, and names what differs. On the CPU."""

import json
import math

import pytest
import torch
from kd_models import distill_cfg, tiny_cfg, write_config, write_teacher
from toy_data import register_noise

from projects.kd.commands import check_gpu as tool
from projects.kd.errors import ConfigError

ON_CPU = ["--device", "cpu", "--images", "2"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check_gpu")
    teacher = write_teacher(folder, tiny_cfg("RetinaNet"))
    register_noise(folder, "check_gpu_noise")
    cfg = distill_cfg(teacher, "RetinaNet", ("CWD",))
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (64,), 96
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("check_gpu_noise",)
    return write_config(cfg, folder / "student.yaml")


def test_equal_devices_agree_and_bfloat16_is_near(config, tmp_path, capsys):
    output = tmp_path / "numbers.json"
    words = ["--config-file", config, *ON_CPU, "--dtypes", "bfloat16", "--output", str(output)]
    assert tool.main(tool.parse_arguments(words))
    (result,) = json.loads(output.read_text()).values()
    assert set(result["fp32"]["losses"]) == {"loss_cls", "loss_box_reg", "loss_kd_cwd"}
    assert max(result["fp32"]["losses"].values()) == 0.0
    assert abs(result["fp32"]["gradient"]) < 1e-9
    assert 0.0 < max(result["bfloat16"]["losses"].values()) < 0.1
    assert "ok" in capsys.readouterr().out


def test_difference_of_losses_and_gradients():
    ours = {"large": 1.1, "none": 0.0}, torch.tensor([1.0, 0.0], dtype=torch.float64)
    theirs = {"large": 1.0, "none": 1e-4}, torch.tensor([1.0, 1.0], dtype=torch.float64)
    found = tool.compare(ours, theirs)
    assert found["losses"]["large"] == pytest.approx(0.1 / 1.1)
    assert found["losses"]["none"] == pytest.approx(1e-4 / 1.0001e-3)  # of the sum of all
    assert found["gradient"] == pytest.approx(1 - math.sqrt(0.5))


def test_what_is_not_finite_fails():
    gradient = torch.ones(3, dtype=torch.float64)
    found = tool.compare(({"a": math.nan}, gradient * math.inf), ({"a": 1.0}, gradient))
    assert found == {"losses": {"a": math.inf}, "gradient": math.inf}
    lines = tool.failures({"float16": found})
    assert lines == [
        "float16: a differs by inf (limit 0.1)",
        "float16: the gradient differs by inf (limit 0.1)",
    ]


def test_another_loss_on_the_second_device_is_named(config, monkeypatch, capsys):
    step = tool.Pair.step

    def wrong(self, batch, dtype=None):
        losses, gradient = step(self, batch, dtype)
        if wrong.calls:
            losses["loss_kd_cwd"] *= 1.01
        wrong.calls += 1
        return losses, gradient

    wrong.calls = 0
    monkeypatch.setattr(tool.Pair, "step", wrong)
    words = ["--config-file", config, *ON_CPU, "--dtypes"]
    assert not tool.main(tool.parse_arguments(words))
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "student: fp32: loss_kd_cwd differs by 0.0099 (limit 0.001)" in out


def test_bad_input(config, tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device cuda: there is no GPU here"):
            tool.main(tool.parse_arguments(["--config-file", config]))
    plain = write_config(tiny_cfg("RetinaNet"), tmp_path / "plain.yaml")
    with pytest.raises(ConfigError, match="KD.META_ARCHITECTURE of .* is empty"):
        tool.main(tool.parse_arguments(["--config-file", plain, *ON_CPU]))
    monkeypatch.setattr(tool, "CONFIGS", str(tmp_path / "*_student_*.yaml"))  # of a package without
    with pytest.raises(ConfigError, match="there is no .*_student_.*; name the configs"):
        tool.main(tool.parse_arguments(ON_CPU))
