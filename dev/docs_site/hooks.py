"""What ``make docs`` makes at build time: generated pages, the list of methods, formulas.

mkdocs calls the functions named ``on_...``. A warning ends the build, as it runs with --strict.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "dev")]

from docs_site.config_keys import head_table, keys_page  # noqa: E402
from docs_site.mathml import with_mathml  # noqa: E402
from docs_site.published import published_page  # noqa: E402

log = logging.getLogger("mkdocs.hooks.site")


def method_pages() -> list[Path]:
    """The pages of docs/methods in the order of their titles."""
    return sorted(
        (path for path in (ROOT / "docs/methods").glob("*.md") if path.stem != "index"),
        key=lambda path: title_and_sentence(path)[0].lower(),
    )


def title_and_sentence(path: Path) -> tuple[str, str]:
    """A method page's title and the paragraph under it."""
    match = re.match(r"# (.+)\n\n((?:[^\n#].*\n)+)", path.read_text(encoding="utf-8"))
    if not match:
        raise SystemExit(f"{path.name}: the first lines are '# Title', an empty one, a sentence")
    return match[1].strip(), " ".join(match[2].split())


def on_config(config):
    """Fill the list of methods in the navigation."""
    for entry in config.nav:
        if "Methods" in entry:
            pages = [f"methods/{path.name}" for path in method_pages()]
            entry["Methods"] = ["methods/index.md", *pages]
    return config


def on_files(files, config):
    """Add the generated pages."""
    for path, text in {
        "reference/keys.md": keys_page(),
        "published.md": published_page(ROOT / "docs/data/published.yaml"),
        "extend.md": extension_guide(),
        "guide/data.md": (ROOT / "datasets/README.md").read_text(encoding="utf-8"),
    }.items():
        files.append(File.generated(config, path, content=text))
    return files


def extension_guide() -> str:
    """The sections of CONTRIBUTING.md about the code and what can be added to it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    begin, end = "## How the code is laid out", "## What a good test is here"
    if begin not in text or end not in text:
        raise SystemExit(f"CONTRIBUTING.md has no section '{begin}' or '{end}'")
    return "# Extend\n\n" + text[text.index(begin) : text.index(end)]


def on_page_markdown(markdown, page, config, files):
    """Fill what pages leave to the code: tables of methods and keys, the list of losses."""
    markdown = re.sub(r"<!-- keys: (\w+) -->", lambda match: head_table(match[1]), markdown)
    return markdown.replace("<!-- methods -->", methods_table()).replace(
        "<!-- losses -->", losses()
    )


def methods_table() -> str:
    """One row a page of docs/methods, for the page that lies beside them."""
    rows = ["| method | what it imitates |", "|---|---|"]
    for path in method_pages():
        title, sentence = title_and_sentence(path)
        rows.append(f"| [{title}]({path.name}) | {sentence} |")
    return "\n".join(rows)


def losses() -> str:
    """mkdocstrings' directives for the public functions of projects/kd/functional named loss."""
    found = []
    for path in sorted((ROOT / "projects/kd/functional").glob("*.py")):
        for name in re.findall(
            r"^def ([a-z]\w*(?:loss|distance))\(", path.read_text(), re.MULTILINE
        ):
            found.append(f"::: projects.kd.functional.{path.stem}.{name}")
    return "\n".join(found)


def on_page_content(html, page, config, files):
    """Formulas become MathML."""
    html, problems = with_mathml(html)
    for problem in problems:
        log.warning("%s: %s", page.file.src_uri, problem)
    return html
