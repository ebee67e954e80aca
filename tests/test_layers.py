"""The folders build on each other in one direction: an import never runs up, and none is a circle.

The sources are parsed, nothing is imported.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "projects/kd"

# From the ground up. A module of the top and a folder count alike; those of one line do not import
# each other.
LAYERS = (
    ("errors", "fusing", "seeding", "precision", "moved_configs"),
    ("files", "adapters", "levels", "shared_classes", "stopping", "taps"),
    ("config", "arguments", "context", "detectors"),
    ("weights", "functional", "schedule", "balance"),
    ("predict", "data"),
    ("heads", "modeling", "evaluation"),
    ("building", "foreign", "teacher_form", "teacher_cache", "unlabelled"),
    ("teacher",),
    ("teacher_link",),
    ("teacher_building",),
    ("distiller",),
    ("check", "recipes"),
    ("engine", "deploy"),
    ("analysis",),
    ("commands",),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def modules() -> dict[tuple[str, ...], Path]:
    """Path of each module below the package, ("heads", "icd") for example; folders as they are."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[parts[:-1] if parts[-1] == "__init__" else parts] = path
    return found


def imports(name: tuple[str, ...], path: Path, known) -> set[tuple[str, ...]]:
    """The package's own modules that a module names in imports, at its top or in a function."""
    folder = name if path.name == "__init__.py" else name[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = folder[: len(folder) - node.level + 1]
        elif node.module and node.module.split(".")[:2] == ["projects", "kd"]:
            base = tuple(node.module.split(".")[2:])
        else:
            continue
        base += tuple(node.module.split(".")) if node.level and node.module else ()
        for alias in node.names:
            whole = (*base, alias.name)
            found.add(whole if whole in known else base)
    return found - {name}


KNOWN = modules()
GRAPH = {name: imports(name, path, KNOWN) for name, path in KNOWN.items()}


def test_every_module_of_the_top_and_every_folder_has_a_layer():
    there = {name[0] for name in KNOWN if name}
    assert there == set(HEIGHT), "LAYERS names each module of the top and each folder once"


def test_no_import_runs_up_or_across():
    wrong = [
        f"{'.'.join(name)} imports {'.'.join(other)}"
        for name, others in GRAPH.items()
        for other in others
        if name and other and name[0] != other[0] and HEIGHT[other[0]] >= HEIGHT[name[0]]
    ]
    assert not wrong


def test_no_circles():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {path[path.index(name) :]}"
        if name in done:
            return
        path.append(name)
        for other in GRAPH.get(name, ()):
            # a folder's __init__ imports its modules so that they register
            if other != name[: len(other)]:
                visit(other)
        path.pop()
        done.add(name)

    for name in GRAPH:
        visit(name)


def test_all_but_the_facade_name_modules_where_they_are():
    """``from projects.kd import x`` is for users and commands: below, it would be a circle."""
    through = {name for name, others in GRAPH.items() if name and () in others}
    assert not [name for name in through if name[0] != LAYERS[-1][0]]
