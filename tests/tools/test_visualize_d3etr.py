"""The pictures of D3ETR, on a tiny pair and a data set on the disk."""

import json

import pytest
import torch
from kd_models import build, distill_cfg, tiny_cfg, write_config, write_teacher
from PIL import Image
from toy_data import register_noise

from projects.kd import build_training_model
from projects.kd.commands.visualize import PARTS
from projects.kd.commands.visualize import d3etr as tool
from projects.kd.errors import ConfigError

ARCH = "ConditionalDETR"
DATA = "kd_test_d3etr_pictures"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Config path, and checkpoints of two students."""
    folder = tmp_path_factory.mktemp("pictures")
    register_noise(folder, DATA)
    data = {"DATASETS__TRAIN": (DATA,), "DATASETS__TEST": (DATA,)}
    teacher = write_teacher(folder, tiny_cfg(ARCH, **data))
    cfg = distill_cfg(teacher, ARCH, ("D3ETR",), SEED=1, **data)
    paths = []
    for seed in (3, 4):
        paths.append(str(folder / f"model_{seed}.pth"))
        torch.save({"model": build(tiny_cfg(ARCH), seed).state_dict()}, paths[-1])
    return cfg, write_config(cfg, folder / "student.yaml"), paths


def test_picture_of_an_image(run, tmp_path, capsys):
    _, config, checkpoints = run
    path = str(tmp_path / "out" / "image.png")
    words = ["--config-file", config, "--output", path, "--checkpoint", checkpoints[0]]
    PARTS.call(["d3etr", *words, "--index", "1", "--queries", "2"])
    assert "image 1 of" in capsys.readouterr().out
    assert min(Image.open(path).size) > 300


def test_stability_is_the_share_of_partners_that_change(run, tmp_path, capsys):
    cfg, config, (one, other) = run
    path = str(tmp_path / "stability.png")
    words = ["--config-file", config, "--output", path, "--images", "2"]
    PARTS.call(["d3etr", *words, "--stability", one, one, other])
    same, changed = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert same == [0.0] * 3 and len(changed) == 3
    model = build_training_model(cfg)
    head = model.heads["D3ETR"]
    found = []
    for checkpoint in (one, other):
        tool.load_student(model, checkpoint, "--stability")
        examples = [tool.load_example(cfg, DATA, index) for index in range(2)]
        found.append(
            [tool.partners(head, *tool.decode_both(model, example)) for example in examples]
        )
    for layer in range(3):
        pairs = [
            (a, b)
            for image in range(2)
            for a, b in zip(found[0][image][layer], found[1][image][layer], strict=True)
        ]
        share = sum(a != b for a, b in pairs) / len(pairs)
        assert changed[layer] == pytest.approx(float(share))
    assert max(changed) > 0


def test_bad_input_is_one_line(run, tmp_path):
    cfg, config, checkpoints = run
    words = ["--config-file", config, "--output", str(tmp_path / "x.png")]
    with pytest.raises(ConfigError, match="at least two checkpoints"):
        PARTS.call(["d3etr", *words, "--stability", checkpoints[0]])
    with pytest.raises(ConfigError, match="--index: 99"):
        PARTS.call(["d3etr", *words, "--checkpoint", checkpoints[0], "--index", "99"])
    with pytest.raises(ConfigError, match="has no D3ETR"):
        opts = ["KD.HEADS", "('Mimic',)"]
        PARTS.call(["d3etr", *words, "--checkpoint", checkpoints[0], *opts])
