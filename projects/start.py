"""Where ``kd-train``, ``kd-compare`` and ``kd-benchmark`` start: memory first, then torch.

A step on a CPU allocates and frees its tensors many times. The C library returns their memory to
the system, and each new page costs a fault. glibc (2.35 and newer) asks Linux for huge pages, which
means a five-hundredth of the faults, when ``GLIBC_TUNABLES`` says so. It reads that variable only
when a process starts. Hence :func:`use_huge_pages` restarts the command, once, as the same process.
Results are the same to the bit; docs/costs.md has the times.

This module does not import torch or ``projects.kd``, which would then be loaded twice.
"""

from __future__ import annotations

import glob
import importlib
import os
import platform
import sys
from collections.abc import Mapping

TUNABLE = "glibc.malloc.hugetlb"
SWITCH = "KD_HUGE_PAGES"  # environment variable: 0 = leave the allocator as it is
_SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"
_OLDEST_GLIBC = (2, 35)
# One of these files is there where torch can find a GPU: NVIDIA's, on a Jetson, AMD's, under WSL.
_DEVICES = ("/dev/nvidia*", "/dev/nvhost*", "/dev/kfd", "/dev/dxg")


def train() -> None:
    """``kd-train``, and ``train_net.py`` in a checkout."""
    _command("train")


def compare() -> None:
    """``kd-compare``; every run of the suite inherits the huge pages."""
    _command("compare")


def benchmark() -> None:
    """``kd-benchmark``, with the memory that a training has."""
    _command("benchmark")


def _command(name: str) -> None:
    use_huge_pages()
    importlib.import_module(f"projects.kd.commands.{name}").run()


def use_huge_pages() -> None:
    """Restart this command with huge pages, if it runs on a CPU and the system offers them.

    Call it first: nothing that the process has done or opened is kept. It does nothing if there is
    a GPU, if the system has no such setting, if the program was read from standard input, and in
    the process that it has started.
    """
    if sys.argv[0] in ("", "-"):  # "-": the program came from standard input
        return
    environment = with_huge_pages(os.environ, _setting(), platform.libc_ver())
    if environment is None or _has_gpu():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        return  # it trains as well without them


def with_huge_pages(
    environment: Mapping[str, str], setting: str, libc: tuple[str, str]
) -> dict[str, str] | None:
    """The environment that turns huge pages on; None where nothing is to be done.

    Args:
        environment: of the process; a value that it has for the tunable stays.
        setting: the system's, "always [madvise] never" for example.
        libc: name and version of the C library.
    """
    name, version = libc
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    tunables = environment.get("GLIBC_TUNABLES", "")
    if (
        name != "glibc"
        or numbers < _OLDEST_GLIBC
        or "[madvise]" not in setting
        or environment.get(SWITCH) == "0"
        or TUNABLE in tunables
    ):
        return None
    joined = ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))
    return {**environment, "GLIBC_TUNABLES": joined}


def _has_gpu() -> bool:
    """Whether torch finds a GPU; torch is imported only where a device file says that it may."""
    if not any(glob.glob(pattern) for pattern in _DEVICES):
        return False
    import torch

    return torch.cuda.is_available()


def _setting() -> str:
    try:
        with open(_SETTING) as stream:
            return stream.read()
    except OSError:  # no Linux, or one without them
        return ""
