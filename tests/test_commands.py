"""Every command of README, GETTING_STARTED and the documentation is one that exists.

Each is read as a shell would and given to its own program, which stops when its flags are parsed.
Its config is loaded then, and its suite, rows and methods are looked up: so a renamed tool, a flag
that is gone, a config or suite that moved, and an unknown key, row or method are found without
running anything. The conversions run, on data as small as can be.
"""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from projects.kd import IMITATION_HEAD_REGISTRY, add_kd_config, load_config
from projects.kd.analysis.suites import read_suite, select_rows
from projects.kd.config.config_files import check_override
from projects.kd.errors import ConfigError
from projects.kd.recipes.methods import method_names

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "GETTING_STARTED.md", "CONTRIBUTING.md", "MODEL_ZOO.md")
    ),
    ROOT / "datasets/README.md",
    ROOT / "configs/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SHELL = ("export", "cd", "source", "git", "pip")  # what is not ours
INDENTED = re.compile(r"    (?:python|kd-\w+|make) ")
# What stands for something of the reader's; and files that only exist after a run.
STANDS_FOR = re.compile(r"\.\.\.|^(CONFIG|STUDENT|TEACHER|FOLDER|FILE)$")


def commands(text: str) -> list[str]:
    """The commands of a page: those of fenced blocks of a shell, and of indented blocks."""
    blocks, fence = [], None
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fence = line.strip("` ") if fence is None else None
        elif fence in ("bash", "sh") or (blocks and blocks[-1].endswith("\\")):
            blocks.append(line)
        elif fence is None and INDENTED.match(line):
            blocks.append(line)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


ALL = [(page, line) for page in PAGES for line in commands(page.read_text(encoding="utf-8"))]


class Parsed(BaseException):
    """What a program was asked for."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.namespace = args


@pytest.fixture(scope="module")
def keys() -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    return cfg


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Function of the words of a command: what its program parsed them to."""
    whole = argparse.ArgumentParser.parse_args

    def stop(parser, args=None, namespace=None):
        raise Parsed(whole(parser, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.chdir(tmp_path)  # some flags make the folder that they name

    def run(words: list[str]) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", words)
        before = list(sys.path)
        try:
            if words[0].endswith(".py"):
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            else:
                module, _, function = scripts()[words[0]].partition(":")
                getattr(importlib.import_module(module), function)()
        except Parsed as parsed:
            return parsed.namespace
        finally:
            sys.path[:] = before
        raise AssertionError("the program did not parse its flags")

    return run


def scripts() -> dict[str, str]:
    """The commands that an installation has."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"^\[project\.scripts\]\n((?:.+\n)+)", text, re.MULTILINE)
    return dict(re.findall(r'^([\w-]+) = "(.+)"', section[1], re.MULTILINE))


def test_commands_are_found():
    names = {page.name for page, _ in ALL}
    assert {"README.md", "GETTING_STARTED.md", "training.md", "icd.md"} <= names
    assert commands("```bash\nA=1 python a.py \\\n  --b  # c\n```\n") == [
        "A=1 python a.py    --b  # c"
    ]
    assert commands("text\n\n    python a.py x \\\n        y\n\nmore\n") == [
        "python a.py x          y"
    ]


@pytest.mark.parametrize(
    ("page", "line"), ALL, ids=[f"{page.stem}:{line[:50]}" for page, line in ALL]
)
def test_command(page, line, parse, keys, capsys):
    words = shlex.split(line, comments=True)
    while words and re.match(r"\w+=", words[0]):  # variables in front
        words.pop(0)
    if not words or words[0] in SHELL:
        return
    if words[0] == "torchrun":
        words = ["python", *words[words.index("train_net.py") :]]
    if words[0] == ".ci/run":
        assert (ROOT / words[0]).stat().st_mode & 0o100
        return
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in words[1:] if "=" not in word]
        assert targets and all(f"\n{target}:" in makefile for target in targets), line
        return
    if words[0] == "python":
        words.pop(0)
    assert words[0].endswith(".py") or words[0] in scripts(), f"{page.name}: {line}"
    for word in words:
        if re.match(r"(configs|tools|datasets|dev)/[\w./+-]+\.(yaml|py)$", word):
            assert (ROOT / word).exists(), f"{page.name}: {word} does not exist"
    if "-h" in words or "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            parse(words)
        return
    try:
        args = parse(
            [word for word in words if not STANDS_FOR.search(word)] if "..." in words else words
        )
    except (SystemExit, ConfigError) as error:
        pytest.fail(f"{page.name}: {line}\n{error} {capsys.readouterr().err}")
    opts = [word for word in getattr(args, "opts", None) or [] if word != "--"]
    if str(getattr(args, "config_file", "")).endswith(".py"):
        load_config(args.config_file, opts)
        return
    assert len(opts) % 2 == 0, f"{page.name}: {opts} are no pairs"
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        check_override(key, value, keys, f"{page.name}: {line}")
    check_names(args, opts)


def check_names(args: argparse.Namespace, opts: list[str]) -> None:
    """ConfigError for a config of ours, a suite, a row or a method that is not what it was."""
    files = getattr(args, "config_file", None) or []
    for file in [files] if isinstance(files, str) else files:
        if re.match("configs/|model_zoo:", file):
            load_config(file, opts)
    if getattr(args, "teacher", ""):
        method_names(args.method or "PKD", [name for name, _ in IMITATION_HEAD_REGISTRY])
    if getattr(args, "suite", ""):
        select_rows(read_suite(args.suite)["rows"], args.only or [])


XML = """<annotation><size><width>40</width><height>30</height></size><object><name>car</name>
<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>21</xmax><ymax>22</ymax></bndbox></object></annotation>"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader stands: photographs with annotations in both formats, and a config."""
    text = (ROOT / "datasets/README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(KD:\n  DATASETS:\n.*?)```", text, re.DOTALL)
    (tmp_path / "my.yaml").write_text(block)
    for name in "ghij":  # two of these are kept for evaluation
        for place in ("photos", "images"):
            (tmp_path / "datasets/mine" / place).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30)).save(tmp_path / f"datasets/mine/{place}/{name}.png")
        for place, suffix, content in (("xml", "xml", XML), ("labels", "txt", "0 .5 .5 .5 .5\n")):
            path = tmp_path / f"datasets/mine/{place}/{name}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
    (tmp_path / "datasets/mine/data.yaml").write_text("names: [car]\n")
    (tmp_path / "mine").symlink_to(tmp_path / "datasets/mine")
    monkeypatch.setenv("MY_DATA", str(tmp_path / "mine"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("my_train", "my_val"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_from_annotations_to_a_picture_as_the_page_of_data_says(folder, monkeypatch):
    def run(beginning):
        (line,) = [x for x in commands(page.read_text()) if x.startswith(f"python {beginning}")]
        _, script, *words = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [script, *words])
        runpy.run_path(str(ROOT / script), run_name="__main__")

    page = ROOT / "datasets/README.md"
    mine = folder / "mine"
    for convert in ("tools/convert.py voc", "tools/convert.py yolo"):
        run(convert)
        made = yaml.safe_load((mine / "train.json").read_text())
        assert [x["name"] for x in made["categories"]] == ["car"]
        (box,) = {tuple(x["bbox"]) for x in made["annotations"]}
        assert box == pytest.approx((1, 2, 20, 20) if "voc" in convert else (10, 7.5, 20, 15))
    assert len(made["images"]) == 4
    run("tools/visualize.py data --config-file my.yaml")
    assert (folder / "sheet.png").stat().st_size > 1000


def test_paths_in_the_text_exist():
    """Files and folders of this repository that pages name between backticks."""
    lost = []
    for page in PAGES:
        for path in re.findall(
            r"`((?:configs|tools|datasets|projects|dev|docs|tests)/[\w./*+-]+)", page.read_text()
        ):
            if not list(ROOT.glob(path.rstrip("/"))) and not made_by_a_run(path):
                lost.append(f"{page.relative_to(ROOT)}: {path}")
    assert not lost


def made_by_a_run(path: str) -> bool:
    """Data sets lie beside their descriptions once they are made."""
    return path.startswith("datasets/") and not path.endswith((".py", ".md"))


def test_links_outside_the_site_lead_somewhere():
    """Links of the pages that the site does not hold (it checks its own), anchors included."""
    lost = []
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs"):
            continue
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            target, _, anchor = link.partition("#")
            if "://" in link:
                continue
            file = (page.parent / target) if target else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                lost.append(f"{page.relative_to(ROOT)}: {link}")
    assert not lost


def anchors(page: Path) -> set[str]:
    """The anchors that headings have in rendered Markdown."""
    titles = re.findall(
        r"^#+ (.+?)(?: \{#[\w-]+\})?$", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_short_pages_stay_short():
    for name in ("README.md", "MODEL_ZOO.md"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 150, name
