"""Teachers of other libraries beside each other (KD.TEACHERS), and in suites."""

import foreign_models  # noqa: F401  # registers kd_tiny_frcnn and others
import kd_models
import pytest
import torch
import yaml
from kd_suites import make_suite
from torch import nn

from projects.kd import ConfigError, check_config, load_config
from projects.kd.analysis.suite_lessons import lessons_of
from projects.kd.config.teachers import config_of


def several(tmp_path, stride: int = 16):
    """A student of a detector of torchvision, a transformer of timm and a program."""
    program = torch.jit.trace(nn.Conv2d(3, 5, stride, stride), torch.rand(1, 3, 64, 64))
    program.save(str(tmp_path / "net.ts"))
    said = {"WEIGHTS": "net.ts", "OUTPUTS": {"map": stride}}
    said |= {"PIXEL_MEAN": [9, 9, 9], "PIXEL_STD": [9, 9, 9]}
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(said))
    teachers = {
        "SCRIPT": {"CONFIG_FILE": "torchscript://net.yaml", "HEADS": ["Mimic"]},
        "TV": {
            "CONFIG_FILE": "torchvision://kd_tiny_frcnn",
            "OPTS": ["CLASSES", ["heart", "cat"]],
            "CLASS_MAP": ["by_name"],
            "HEADS": ["CWD"],
        },
        "VIT": {"CONFIG_FILE": "timm://kd_tiny_vit16", "HEADS": ["DSI"], "WEIGHT": 0.5},
    }
    kd = {"META_ARCHITECTURE": "DistillMetaArch", "TEACHER": {"ALLOW_MISSING": True}}
    student = kd_models.tiny_cfg(DATASETS__TEST=(), MODEL__RETINANET__NUM_CLASSES=6)
    kd_models.write_config(student, tmp_path / "plain.yaml")
    text = yaml.safe_dump({"_BASE_": "plain.yaml", "KD": {**kd, "TEACHERS": teachers}})
    (tmp_path / "student.yaml").write_text(text)
    return load_config(str(tmp_path / "student.yaml"))


def test_each_teaches_as_if_it_were_the_only_one(tmp_path):
    cfg = several(tmp_path)
    assert cfg.KD.TEACHERS.SCRIPT.CONFIG_FILE == f"torchscript://{tmp_path}/net.yaml"
    check_config(cfg)
    model = kd_models.build_wrapper(cfg)
    assert list(model.heads) == ["SCRIPT-Mimic", "TV-CWD", "VIT-DSI"]
    assert model.links[1].teacher.names["thing_classes"] == ["heart"]
    batch = kd_models.make_batch(sizes=((64, 64),))
    found = kd_models.losses_at(model, batch)
    links = {link.name: link for link in model.links}
    for name, head, weight in (("SCRIPT", "Mimic", 1), ("TV", "CWD", 1), ("VIT", "DSI", 0.5)):
        alone = kd_models.build_wrapper(config_of(cfg, name))
        for one, other in (
            (alone.teacher.model, links[name].teacher.model),
            (alone.heads[head], model.heads[f"{name}-{head}"]),
            (alone.student, model.student),
        ):
            one.load_state_dict(other.state_dict())
        alone._padding = model._padding  # the canvas is one for all
        expected = kd_models.losses_at(alone, batch)
        key = f"loss_kd_{head.lower()}"
        torch.testing.assert_close(
            found[key.replace("kd_", f"kd_{name.lower()}_")], expected[key] * weight
        )
        assert expected[key] > 0


def test_wrong_ones_are_told_by_their_names(tmp_path):
    cfg = several(tmp_path)
    cfg.KD.TEACHERS.VIT.CONFIG_FILE = "tim://kd_tiny_vit16"
    with pytest.raises(ConfigError, match="KD.TEACHERS.VIT.CONFIG_FILE: .*registered for tim://"):
        check_config(cfg)
    cfg.KD.TEACHERS.VIT.CONFIG_FILE = "timm://kd_tiny_vit17"
    with pytest.raises(ConfigError, match="KD.TEACHERS.VIT.CONFIG_FILE: timm has no model"):
        kd_models.build_wrapper(cfg)
    with pytest.raises(ConfigError, match="KD.TEACHERS.SCRIPT: KD.LEVEL_MAP: .* share no level"):
        kd_models.build_wrapper(several(tmp_path, stride=2))


def test_a_suite_gives_them_no_weights_of_its_rows():
    suite = make_suite()
    opts = ["KD.TEACHER.CONFIG_FILE", "timm://kd_tiny_vit16", "KD.TEACHER.OPTS", "()"]
    suite["rows"].append({**suite["rows"][-1], "name": "student+ViT", "opts": opts})
    assert lessons_of(suite) == {"student+X": {"KD.TEACHER": "teacher"}}
