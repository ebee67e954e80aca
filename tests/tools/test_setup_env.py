"""dev/setup_env.py, end to end on tiny packages: no network, no index, no compiler."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

of_the_pinned_set = pytest.mark.skipif(
    sys.version_info[:2] > (3, 12), reason="the pinned set is for Python 3.10 to 3.12"
)

ROOT = Path(__file__).resolve().parents[2]
# Builds an editable wheel of the project with nothing but the standard library.
BACKEND = """
import os, zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    start = "project-1.0.dist-info/"
    files = {
        "project.pth": os.getcwd() + "\\n",
        start + "METADATA": "Metadata-Version: 2.1\\nName: project\\nVersion: 1.0\\n",
        start + "WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    files[start + "RECORD"] = "".join(f"{name},,\\n" for name in files)
    name = "project-1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return name
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "project"
version = "1.0"
"""
ENVIRONMENT_FLAGS = [
    *("--require-hashes", "--no-deps", "--only-binary=:all:", "--python-version", "3.10"),
    *("--implementation", "cp", "--abi", "none", "--target"),
]


def make_wheel(folder: Path, name: str, version: str, module: str, tag: str = "py3-none-any"):
    """A wheel whose only file is ``module/__init__.py``; its sha256."""
    files = {
        f"{module}/__init__.py": f"VERSION = {version!r}\n",
        f"{name}-{version}.dist-info/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        ),
        f"{name}-{version}.dist-info/WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"
        ),
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record += f"{path},sha256={digest.decode()},{len(text)}\n"
    files[f"{name}-{version}.dist-info/RECORD"] = record
    wheel = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def tree(tmp_path):
    """A project folder with dev/setup_env.py and requirements of tiny wheels."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "torch", "2.0", "torch")
    make_wheel(wheels, "torchvision", "0.2", "torchvision")
    make_wheel(wheels, "opencv_python_headless", "4.0", "cv2")
    make_wheel(wheels, "helper", "1.0", "helper")
    sha = make_wheel(wheels, "sal_detectron2", "0.7.2", "detectron2", "cp310-none-any")
    project = tmp_path / "project"
    (project / "dev").mkdir(parents=True)
    (project / "requirements").mkdir()
    for name in ("setup_env.py", "interpreters.py"):
        shutil.copy(ROOT / "dev" / name, project / "dev")
    (project / "backend.py").write_text(BACKEND)
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "own_package.py").write_text("VERSION = 'in place'\n")
    write = (project / "requirements").joinpath
    write("runtime.txt").write_text(
        "# pinned\ntorch==2.0\ntorchvision==0.2\nopencv-python-headless==4.0\n"
    )
    write("dev.txt").write_text("helper==1.0  # for tests\n")
    write("detectron2.txt").write_text(f"sal-detectron2==0.7.2 --hash=sha256:{sha}\n")
    return project


def environment(tree: Path, **changes: str) -> dict:
    keep = ("PATH", "HOME", "LANG", "TMPDIR")
    env = {key: os.environ[key] for key in keep if key in os.environ}
    wheels = str(tree.parent / "wheels")
    env.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=wheels, PIP_CONFIG_FILE=os.devnull)
    env.update(changes)
    return env


def run(tree: Path, *flags: str, python: str = sys.executable, **changes: str):
    return subprocess.run(
        [python, str(tree / "dev" / "setup_env.py"), *flags],
        env=environment(tree, **changes),
        capture_output=True,
        text=True,
        check=False,
    )


def base_interpreter() -> str:
    """The Python behind the one that runs the tests: it has no detectron2 as a rule."""
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    path = Path(sys.base_prefix, "bin", name)
    probe = [str(path), "-c", "import detectron2"]
    if not path.exists():
        pytest.skip(f"no {name} in the base installation")
    if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        pytest.skip("the base interpreter has detectron2 itself")
    return str(path)


def value_in(tree: Path, code: str) -> str:
    python = tree / ".venv" / "bin" / "python"
    return subprocess.check_output([str(python), "-c", code], text=True).strip()


@of_the_pinned_set
def test_installs_everything_then_skips_and_repairs(tree):
    python = base_interpreter()
    first = run(tree, python=python)
    assert first.returncode == 0, first.stderr
    modules = "import torch, torchvision, cv2, helper, detectron2; print(detectron2.VERSION)"
    assert value_in(tree, modules) == "0.7.2"
    assert value_in(tree, "import own_package; print(own_package.VERSION)") == "in place"
    stamp = json.loads((tree / ".venv" / "setup_stamp.json").read_text())
    assert stamp["python"] == sys.version.split()[0]

    second = run(tree, python=python, PIP_FIND_LINKS="/nowhere")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")

    # a changed requirement is installed, without a wheel that fails with pip's own words
    requirements = tree / "requirements" / "dev.txt"
    requirements.write_text("helper==1.1\n")
    failed = run(tree, python=python)
    assert failed.returncode == 1
    assert "helper==1.1" in failed.stderr
    assert failed.stderr.strip().splitlines()[-1].startswith("setup: pip could not install")
    assert "Traceback" not in failed.stderr
    assert not (tree / ".venv" / "setup_stamp.json").exists()

    make_wheel(tree.parent / "wheels", "helper", "1.1", "helper")
    mended = run(tree, python=python)
    assert mended.returncode == 0, mended.stderr
    assert value_in(tree, "import helper; print(helper.VERSION)") == "1.1"

    # an active .venv is set up from the Python it was made with
    requirements.write_text("helper==1.0\n")
    active = run(tree, "--search", python=str(tree / ".venv" / "bin" / "python"))
    assert active.returncode == 0, active.stderr
    assert "keeping" not in active.stdout
    assert value_in(tree, "import helper; print(helper.VERSION)") == "1.0"


@of_the_pinned_set
def test_importable_detectron2_and_torch_are_kept(tree, tmp_path):
    own = tmp_path / "own"
    subprocess.run([base_interpreter(), "-m", "venv", "--without-pip", str(own)], check=True)
    packages = next(own.glob("lib/python*/site-packages"))
    for name in ("torch", "torchvision", "cv2", "detectron2"):
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text("VERSION = 'own build'\n")
    metadata = packages / "torch-2.5+own.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.5+own\n"
    )
    result = run(tree, "--search", python=str(own / "bin" / "python"))
    assert result.returncode == 0, result.stderr
    line = next(text for text in result.stdout.splitlines() if "keeping" in text)
    assert line.endswith("installing what it lacks: helper==1.0")
    code = "import torch, detectron2, helper; print(torch.VERSION, detectron2.VERSION, {})"
    assert value_in(tree, code.format("helper.VERSION")) == "own build own build 1.0"
    assert value_in(tree, "import own_package; print(own_package.VERSION)") == "in place"


@of_the_pinned_set
def test_a_package_that_cannot_be_imported_is_an_error_without_stamp(tree):
    python = base_interpreter()
    wheels = tree.parent / "wheels"
    (wheels / "opencv_python_headless-4.0-py3-none-any.whl").unlink()
    make_wheel(wheels, "opencv_python_headless", "4.0", "other_name")
    result = run(tree, python=python)
    assert result.returncode == 1
    assert "No module named 'cv2'" in result.stderr
    assert "'import cv2' fails" in result.stderr.strip().splitlines()[-1]
    assert not (tree / ".venv" / "setup_stamp.json").exists()


@pytest.fixture
def other_python(monkeypatch, tree):
    """The script as a module, in an interpreter that says it is Python 3.14."""
    monkeypatch.syspath_prepend(str(tree / "dev"))
    for name in ("setup_env", "interpreters"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import setup_env

    monkeypatch.setattr(setup_env.sys, "version", "3.14.0 (main)")
    yield setup_env
    for name in ("setup_env", "interpreters"):
        sys.modules.pop(name)


def fake_interpreter(folder: Path, name: str, version: str, log: Path):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = "-W" ]; then echo "{version} (fake)"; else echo "$0 $*" > {log}; fi\n'
    )
    path.chmod(0o755)


def test_wrong_python_named_by_the_user_is_one_line(other_python, capsys):
    assert other_python.main([]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "Python 3.14 is not supported, 3.10 to 3.12 are" in lines[0]


def test_wrong_default_python_hands_over_to_one_that_starts(
    other_python, monkeypatch, tmp_path, capsys
):
    folder, log = tmp_path / "bin", tmp_path / "log"
    fake_interpreter(folder, "python3.11", "3.9.1", log)  # does not keep its name's promise
    fake_interpreter(folder, "python3.12", "3.12.4", log)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: _which(folder, name))
    assert other_python.main(["--search"]) == 0
    called = log.read_text().split()
    assert called[0].endswith("python3.12")
    assert called[1].endswith("setup_env.py")
    assert called[2:] == ["--search"]

    # a shim that does not start stands for the one that pyenv installed
    fake_interpreter(folder, "python3.12", "", log)
    installed = tmp_path / "versions/3.12.4/bin"
    installed.mkdir(parents=True)
    fake_interpreter(installed, "python3.12", "3.12.4", log)
    assert other_python.main(["--search"]) == 0
    assert log.read_text().split()[0] == str(installed / "python3.12")

    (installed / "python3.12").unlink()
    assert other_python.main(["--search"]) == 1
    assert "3.14 is not supported" in capsys.readouterr().err


def _which(folder: Path, name: str) -> str | None:
    path = folder / name
    return str(path) if path.exists() else None


def test_foreign_venv_of_another_python_is_not_replaced(other_python, monkeypatch, tree, capsys):
    (tree / ".venv" / "bin").mkdir(parents=True)
    (tree / ".venv" / "bin" / "python").write_text("")
    (tree / ".venv" / "pyvenv.cfg").write_text("version = 3.10.4\n")
    monkeypatch.setattr(other_python.sys, "version", "3.12.1 (main)")
    assert other_python.main([]) == 1
    assert "PYTHON=python3.10" in capsys.readouterr().err
    assert (tree / ".venv" / "pyvenv.cfg").read_text() == "version = 3.10.4\n"


def test_pip_call_for_detectron2_and_its_hash():
    sys.path.insert(0, str(ROOT / "dev"))
    try:
        import setup_env
    finally:
        sys.path.pop(0)
    assert setup_env.DETECTRON2_FLAGS == ENVIRONMENT_FLAGS[:-1]
    text = (ROOT / "requirements" / "detectron2.txt").read_text()
    assert text.split()[0] == "sal-detectron2==0.7.2"
    assert len(text.split("sha256:")[1].split()[0]) == 64


def test_every_requirement_is_pinned_and_no_index_is_named():
    for name in ("runtime", "dev"):
        lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
        pins = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
        assert pins
        for pin in pins:
            package, version = pin.split("==")
            assert package.strip() == package
            assert version[0].isdigit()
    for path in [*(ROOT / "requirements").glob("*.txt"), ROOT / "Makefile", ROOT / ".ci" / "run"]:
        text = path.read_text()
        assert "index-url" not in text
        assert "://" not in text
