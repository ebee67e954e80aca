"""A wheel, installed where nothing of the checkout is, trains from another folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from outside import BASE, IMPORTS, PACKAGE, STUDENT

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = """
import os, projects.kd
from projects.kd.files import shipped_configs
cfg = projects.kd.load_config("configs/shapes/retinanet_student.yaml")
from projects.kd.analysis import report_page, suite_file
suite_file.read_suite("configs/suites/demo.yaml")
print(projects.kd.__file__, shipped_configs(), os.path.isdir(report_page._FOLDER), sep="\\n")
"""

pytestmark = pytest.mark.wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A virtual environment with the wheel; it finds all other packages where this one has them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # so that no build folder is left in the checkout
    names = ("projects", "configs", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    no_network = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", "-q", *no_network, "-w", folder, source], check=True)
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True
    )
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin"


@pytest.fixture
def outside(installed, tmp_path):
    """Runs a program of the environment in a folder with the other package and its configs."""
    shutil.copytree(PACKAGE, tmp_path / "lib" / "my_dots", ignore=shutil.ignore_patterns("__py*"))
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "student.yaml").write_text(STUDENT)

    def run(program, *words):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [installed / program, *map(str, words)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_commands_configs_and_templates_are_in_the_wheel(installed, outside):
    names = "train compare evaluate visualize convert benchmark calibrate demo check-gpu".split()
    names += ["export", "pseudo-label"]
    assert all((installed / f"kd-{name}").is_file() for name in names)
    assert "--config-file" in outside("kd-train", "--help")
    package, configs, templates = outside("python", "-c", SHIPPED).split()
    assert str(ROOT) not in package and "site-packages" in package
    assert Path(configs) == Path(package).parent / "configs"
    assert templates == "True"


def test_ten_iterations_with_a_head_of_another_package(outside, tmp_path):
    wide = ("MODEL.DOT.WIDTH", 12, "OUTPUT_DIR", "teacher", "SOLVER.MAX_ITER", 1)
    outside("kd-train", "--config-file", "base.yaml", *IMPORTS, *wide)
    words = ("KD.TEACHER.WEIGHTS", "teacher/model_final.pth", "SOLVER.MAX_ITER", 10)
    outside("kd-train", "--config-file", "student.yaml", *IMPORTS, *words)
    lines = (tmp_path / "student" / "metrics.json").read_text().splitlines()
    metrics = {key: value for line in lines for key, value in json.loads(line).items()}
    assert metrics["iteration"] == 10 and "loss_kd_score_match" in metrics
    assert (tmp_path / "student" / "model_final.pth").is_file()
