"""The extension examples of CONTRIBUTING.md do what their text says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import kd_models
import yaml

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PYTHON = re.findall(r"```python\n# (my_package/\w+\.py)\n(.*?)```", TEXT, re.DOTALL)
YAML = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1]

# Run apart: the examples add to the registries and to the config of their process.
SCRIPT = """
import sys
import kd_models, torch
from projects.kd import build_training_model, check_config, load_config
from projects.kd.data.register import register_configured

cfg = load_config(sys.argv[1])
assert cfg.KD.MYHEAD.POWER == 2.0
register_configured(cfg)
check_config(cfg)
torch.manual_seed(0)
model = build_training_model(cfg).train()
assert type(model.student).__name__ == "MyDetector"
batch = kd_models.make_batch()
early = kd_models.losses_at(model, batch, iteration=99)
losses = kd_models.losses_at(model, batch, iteration=100)
assert early["loss_kd_my_head"] == 0
assert {"loss_cls", "loss_box_reg"} < set(losses)

student = model.student
teacher = model.teacher.model
total, names = 0.0, model.heads["MyHead"].levels
with torch.no_grad():
    ours, theirs = (x.backbone(x.preprocess_image(batch).tensor) for x in (student, teacher))
for name in names:
    stride, squared = student.backbone.output_shape()[name].stride, []
    for i, image in enumerate(batch):  # cells inside the image
        rows, columns = (-(-side // stride) for side in image["image"].shape[-2:])
        inside = ours[name][i, :, :rows, :columns] - theirs[name][i, :, :rows, :columns]
        squared.append(inside.flatten().square())
    total += torch.cat(squared).mean() / len(names)
found = losses["loss_kd_my_head"].detach()
assert torch.allclose(found, total, rtol=1e-4), (found, total)
found = losses["loss_kd_my_head"]
found.backward()
assert student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
assert all(parameter.grad is None for parameter in teacher.parameters())
print("checked", list(names))
"""


def test_the_example_head_is_short():
    lines = dict(PYTHON)["my_package/my_head.py"].splitlines()
    assert len([line for line in lines if line.strip()]) < 40


def test_examples_train_from_outside_the_repository(tmp_path):
    assert [name for name, _ in PYTHON] == ["my_package/my_head.py", "my_package/my_arch.py"]
    package = tmp_path / "elsewhere" / "my_package"
    package.mkdir(parents=True)
    for name, code in PYTHON:
        (package.parent / name).write_text(code)
    teacher = kd_models.write_teacher(tmp_path)
    # frozen statistics: features do not depend on the mode
    cfg = kd_models.distill_cfg(
        teacher, MODEL__RESNETS__NORM="FrozenBN", MODEL__RETINANET__NUM_CLASSES=6
    )
    values = yaml.safe_load(cfg.dump())
    kd = {**values["KD"], **yaml.safe_load(YAML)["KD"]}
    values["MODEL"]["META_ARCHITECTURE"] = "MyDetector"
    path = tmp_path / "student.yaml"
    path.write_text(yaml.safe_dump({**values, "KD": kd}))
    folders = [str(ROOT), str(ROOT / "tests/support"), str(package.parent)]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "checked ['p3', 'p4', 'p5', 'p6', 'p7']"


def test_named_files_and_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, re.MULTILINE):
        assert f"\n{target}:" in makefile
    for path in re.findall(r"`(projects/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path
