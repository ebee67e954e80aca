"""The Dockerfile, parsed: rules of hadolint's kind, and that it does what ``make setup`` does."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = {"ARG", "FROM", "SHELL", "RUN", "WORKDIR", "COPY", "USER", "ENV", "CMD"}


def parse(text: str) -> list[tuple[str, str]]:
    """(instruction, what follows) with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, _, rest in found]


def problems(text: str) -> list[str]:
    """What hadolint would say, in short: unpinned bases, caches left in, a root user, ..."""
    steps = parse(text)
    found = [f"unknown instruction {name}" for name, _ in steps if name not in INSTRUCTIONS]
    arguments = dict(rest.split("=", 1) for name, rest in steps if name == "ARG")
    for rest in (rest for name, rest in steps if name == "FROM"):
        image = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], ""), rest)
        _, _, tag = image.partition(":")
        if not tag or tag == "latest":
            found.append(f"FROM {image}: no tag")
    runs = [rest for name, rest in steps if name == "RUN"]
    for run in runs:
        for install in re.findall(r"apt-get install[^&;]*", run):
            if "--no-install-recommends" not in install or not re.search(r"--yes|-y\b", install):
                found.append(f"apt-get install without --yes --no-install-recommends: {install}")
        if "apt-get update" in run and not run.endswith("rm -rf /var/lib/apt/lists/*"):
            found.append("lists of apt stay in the image")
        if re.search(r"\bsudo\b|\bapt \b|\bcd \b", run):
            found.append(f"sudo, apt or cd: {run}")
    if any("|" in re.sub(r"\|\|", "", run) for run in runs) and "pipefail" not in str(steps):
        found.append("a pipe without pipefail")
    users = [rest for name, rest in steps if name == "USER"]
    if not users or users[-1] == "root":
        found.append("the last user is root")
    for name, rest in steps:
        if name == "WORKDIR" and not rest.startswith("/"):
            found.append(f"WORKDIR {rest}: not absolute")
        if name in ("CMD", "SHELL"):
            try:
                json.loads(rest)
            except ValueError:
                found.append(f"{name} {rest}: not in JSON")
    if sum(name == "CMD" for name, _ in steps) != 1:
        found.append("not one CMD")
    return found


TEXT = (ROOT / "Dockerfile").read_text()


def test_nothing_is_wrong_with_it():
    assert problems(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("python:3.11-slim-bookworm", "python", "no tag"),
        (" --no-install-recommends make", " make", "without --yes --no-install-recommends"),
        ("    && rm -rf /var/lib/apt/lists/*\n", "    && true\n", "lists of apt stay"),
        ("USER kd\n", "", "the last user is root"),
        ("USER kd\n", "USER kd\nUSER root\n", "the last user is root"),
        ("WORKDIR /home", "WORKDIR home", "not absolute"),
        ('CMD ["kd-train", "-h"]', "CMD kd-train -h", "not in JSON"),
        ("RUN make setup", "RUN cd x && make setup", "sudo, apt or cd"),
        ("RUN make setup", "MAKE setup", "unknown instruction MAKE"),
    ],
)
def test_the_rules_find_what_they_are_for(old, new, message):
    assert old in TEXT
    assert any(message in line for line in problems(TEXT.replace(old, new)))


def test_it_sets_up_by_make_setup_as_the_last_thing_that_runs():
    steps = parse(TEXT)
    assert [rest for name, rest in steps if name == "RUN"][-1] == "make setup"
    assert steps.index(("USER", "kd")) < steps.index(("RUN", "make setup"))
    program = json.loads(dict(steps)["CMD"])[0]
    assert f'\n{program} = "projects.' in (ROOT / "pyproject.toml").read_text()


def test_the_default_base_has_a_python_that_the_set_up_supports():
    base = dict(parse(TEXT))["ARG"]
    source = ast.parse((ROOT / "dev/setup_env.py").read_text())
    values = {
        node.targets[0].id: node.value
        for node in source.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    supported = ast.literal_eval(values["SUPPORTED"])
    assert re.match(r"BASE=python:(3\.\d+)-slim", base)[1] == supported[0]


def test_the_image_gets_sources_and_no_results():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "output", "datasets/*", "shared"} <= set(ignored)
    for line in (ROOT / ".gitignore").read_text().splitlines():
        if line.endswith("/") and not line.startswith("#") and "__" not in line and "*" not in line:
            assert line.rstrip("/") in ignored, line
    assert ("COPY", "--chown=kd:kd . .") in parse(TEXT)
