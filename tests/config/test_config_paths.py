"""What a config's place decides: relative names in it, lists of bases, OUTPUT_DIR."""

from __future__ import annotations

import os

import pytest

from projects.kd import load_config
from projects.kd.config.config_paths import default_output
from projects.kd.errors import ConfigError
from projects.kd.files import resolve_config, resolve_weights

TEACHER = 'KD:\n  TEACHER: {CONFIG_FILE: "teacher.yaml", WEIGHTS: "runs/t.pth"}\n'


def test_names_are_looked_for_beside_the_file_that_holds_them(tmp_path, monkeypatch):
    here, elsewhere = tmp_path / "configs" / "mine", tmp_path / "elsewhere"
    here.mkdir(parents=True)
    elsewhere.mkdir()
    (here / "student.yaml").write_text(TEACHER)
    child = elsewhere / "child.yaml"
    child.write_text('_BASE_: "../configs/mine/student.yaml"\n')
    monkeypatch.chdir(tmp_path)
    # nothing is there: the names stay, and the messages name both places
    node = load_config("configs/mine/student.yaml").KD.TEACHER
    assert (node.CONFIG_FILE, node.WEIGHTS) == ("teacher.yaml", "runs/t.pth")
    both = f"neither in the config's folder {here} nor in the working directory {tmp_path}"
    with pytest.raises(ConfigError, match=both):
        resolve_config(node.CONFIG_FILE, "KD.TEACHER.CONFIG_FILE")
    with pytest.raises(ConfigError, match=both):
        resolve_weights(node.WEIGHTS, "KD.TEACHER.WEIGHTS")
    # in the working directory
    (tmp_path / "teacher.yaml").write_text("VERSION: 2\n")
    assert load_config("configs/mine/student.yaml").KD.TEACHER.CONFIG_FILE == "teacher.yaml"
    # beside the file goes first, and counts for who builds on it
    (here / "teacher.yaml").write_text("VERSION: 2\n")
    (here / "runs").mkdir()
    (here / "runs" / "t.pth").write_bytes(b"x")
    node = load_config("configs/mine/student.yaml").KD.TEACHER
    assert node.CONFIG_FILE == os.path.join("configs", "mine", "teacher.yaml")
    assert node.WEIGHTS == os.path.join("configs", "mine", "runs", "t.pth")
    node = load_config(str(child)).KD.TEACHER
    assert os.path.samefile(node.CONFIG_FILE, here / "teacher.yaml")


def test_the_later_of_several_bases_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: 1\nSOLVER: {MAX_ITER: 5, GAMMA: 0.5}\n")
    (tmp_path / "b.yaml").write_text("SOLVER: {MAX_ITER: 6}\n")
    (tmp_path / "c.yaml").write_text('_BASE_: ["a.yaml", "b.yaml"]\nSEED: 7\n')
    cfg = load_config(str(tmp_path / "c.yaml"))
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.GAMMA) == (7, 6, 0.5)


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("configs/shapes/gfl_student.yaml", "output/shapes/gfl_student"),
        ("/a/configs/b/configs/c/d.yaml", "output/c/d"),
        ("/a/configs/d.e.yaml", "output/d.e"),
        ("/a/b/mine.yaml", "output/mine"),
    ],
)
def test_output_goes_by_the_place(path, folder):
    assert default_output(path) == folder
