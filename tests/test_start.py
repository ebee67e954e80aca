"""A command on a CPU starts anew with huge pages, once, with its own arguments and exit status."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from projects import start
from projects.start import TUNABLE, with_huge_pages

ROOT = Path(__file__).resolve().parents[1]

MADVISE = "always [madvise] never"
GLIBC = ("glibc", "2.36")


def test_the_variable_is_added_to_what_is_there():
    assert with_huge_pages({"A": "1"}, MADVISE, GLIBC) == {
        "A": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    given = {"GLIBC_TUNABLES": "glibc.malloc.check=1"}
    made = with_huge_pages(given, MADVISE, GLIBC)
    assert made["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"
    assert given == {"GLIBC_TUNABLES": "glibc.malloc.check=1"}


@pytest.mark.parametrize(
    "environment, setting, libc",
    [
        ({}, "always madvise [never]", GLIBC),
        ({}, "[always] madvise never", GLIBC),  # the system gives them without being asked
        ({}, "", GLIBC),
        ({}, MADVISE, ("glibc", "2.34")),
        ({}, MADVISE, ("", "")),
        ({"KD_HUGE_PAGES": "0"}, MADVISE, GLIBC),
        ({"GLIBC_TUNABLES": f"{TUNABLE}=0"}, MADVISE, GLIBC),  # the user's own word
        ({"GLIBC_TUNABLES": f"{TUNABLE}=1"}, MADVISE, GLIBC),  # started anew before
    ],
)
def test_nothing_is_done(environment, setting, libc):
    assert with_huge_pages(environment, setting, libc) is None


class Started(Exception):
    """The process would have been started anew."""


@pytest.fixture
def anew(monkeypatch):
    """A CPU with huge pages and the device file of a GPU; raises Started with the variable."""

    def execve(program, words, environment):
        raise Started(environment["GLIBC_TUNABLES"])

    monkeypatch.setattr(start.os, "execve", execve)
    monkeypatch.setattr(start.platform, "libc_ver", lambda: GLIBC)
    monkeypatch.setattr(start, "_setting", lambda: MADVISE)
    monkeypatch.setattr(start, "_DEVICES", (__file__,))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("KD_HUGE_PAGES", "1")


def test_torch_has_the_last_word_on_a_gpu(anew, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    start.use_huge_pages()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # hidden, or torch for CPUs
    with pytest.raises(Started, match=f"^{TUNABLE}=1$"):
        start.use_huge_pages()


@pytest.mark.parametrize(
    "file, name",
    [
        ("train_net.py", "kd-train"),
        ("tools/compare.py", "kd-compare"),
        ("tools/benchmark.py", "kd-benchmark"),
    ],
)
def test_these_commands_start_anew(anew, monkeypatch, file, name):
    monkeypatch.setattr(start, "_DEVICES", ())
    monkeypatch.setattr(start.importlib, "import_module", None)  # not before it is decided
    scripts = re.findall(rf'^{name} = "(.+):(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    ((module, function),) = scripts
    for command in (
        lambda: runpy.run_path(str(ROOT / file), run_name="__main__"),
        getattr(sys.modules[module], function),
    ):
        with pytest.raises(Started):
            command()


SCRIPT = """
import os, sys
import projects.start as start
start._setting = lambda: "always [madvise] never"
start.platform.libc_ver = lambda: ("glibc", "2.40")
start._DEVICES = ()
print("pid", os.getpid(), flush=True)
start.use_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], flush=True)
sys.exit(3 if "torch" not in sys.modules else 4)
"""


def run(arguments, **options):
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {"KD_HUGE_PAGES": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def test_a_command_starts_anew_once_as_the_same_process(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(SCRIPT)
    done = run([str(script), "A", "two words"])
    first, second, last = done.stdout.splitlines()
    assert first == second and first.startswith("pid ")
    assert last == "glibc.malloc.hugetlb=1 ['A', 'two words']"
    assert done.returncode == 3


def test_a_program_from_standard_input_is_run_to_its_end():
    done = run(["-", "A"], input=SCRIPT)
    assert done.stdout.splitlines()[1:] == ["None ['A']"]
    assert done.returncode == 3
