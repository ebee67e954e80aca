"""The page of private names: each exists in the pinned packages, none that is used is missing."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path

import pytest
import torch  # noqa: F401  (torch.ops has to be there)

import projects.kd

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "projects/kd"
PAGE = (ROOT / "docs/reference/private_names.md").read_text()
NAMES = re.findall(r"^\| `([\w.]+)` \|", PAGE, flags=re.MULTILINE)
PINS = "".join((ROOT / f"requirements/{x}.txt").read_text() for x in ("detectron2", "runtime"))
OTHERS = {"detectron2", "fvcore", "iopath", "torch", "torchvision", "yacs", "timm", "pycocotools"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def attributes(tree: ast.AST) -> set[str]:
    """Private attributes that are read or set, of anything."""
    found = (node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return set(filter(is_private, found))


def has(owner: type, name: str) -> bool:
    """A class has it, or its code sets it on ``self``."""
    return name in vars(owner) or re.search(rf"self\.{name}\b", source(owner)) is not None


@functools.cache
def source(owner: type) -> str:
    """The code of a class, "" where it has none in Python."""
    try:
        return inspect.getsource(owner)
    except (OSError, TypeError):
        return ""


def test_the_versions_of_the_page_are_the_pinned_ones():
    found = re.findall(r"(detectron2|fvcore|torch|yacs) (\d[\w.]*\w)", PAGE)
    assert {name for name, _ in found} == {"detectron2", "fvcore", "torch", "yacs"}
    for name, version in found:
        assert re.search(rf"^[\w-]*{name}=={re.escape(version)}\b", PINS, flags=re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_it_exists(name):
    *owner, last = name.split(".")
    for length in range(len(owner), 0, -1):
        try:
            found = importlib.import_module(".".join(owner[:length]))
        except ModuleNotFoundError:
            continue
        break
    for part in owner[length:]:
        found = getattr(found, part)
    assert hasattr(found, last) or any(has(base, last) for base in found.__mro__)


def test_the_page_is_sorted_and_has_each_name_once():
    assert sorted(set(NAMES)) == NAMES


def test_what_is_used_and_not_ours_is_on_the_page():
    used, own = set(), set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        used |= attributes(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                if node.module.split(".")[0] in OTHERS:
                    used |= {alias.name for alias in node.names if is_private(alias.name)}
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                own.add(node.id if isinstance(node, ast.Name) else node.attr)
    standard = {"_exit", "_fields", "_getframe", "_option_string_actions", "_replace"}
    assert used - own - standard <= {name.rpartition(".")[2] for name in NAMES}


def test_what_overrides_or_sets_a_base_class_is_on_the_page():
    listed = {tuple(name.split(".")[-2:]) for name in NAMES}
    missing = set()
    for info in pkgutil.walk_packages(projects.kd.__path__, "projects.kd."):
        if info.name.startswith("projects.kd.commands"):
            continue
        module = importlib.import_module(info.name)
        for cls in vars(module).values():
            if not isinstance(cls, type) or cls.__module__ != module.__name__:
                continue
            bases = [b for b in cls.__mro__ if b.__module__.split(".")[0] in OTHERS]
            if not bases:
                continue
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
            named = (node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
            for name in attributes(tree) | set(filter(is_private, named)):
                owners = [base.__name__ for base in bases if has(base, name)]
                if owners and not any((owner, name) in listed for owner in owners):
                    missing.add(f"{owners[0]}.{name} in {module.__name__}")
    assert not missing
