"""Formulas of the site as MathML, which browsers draw themselves: no script and no web font."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\(?:\(|\[)(?P<tex>.*?)\\(?:\)|\])\s*</(?P=tag)>',
    re.DOTALL,
)


def with_mathml(page: str) -> tuple[str, list[str]]:
    """Replace the formulas that pymdownx.arithmatex marked in a page's HTML.

    Returns:
        The page, and one line for each formula that could not be converted.
    """
    problems = []

    def formula(match: re.Match) -> str:
        tex = html.unescape(match["tex"]).strip()
        try:
            return convert(tex, display="block" if match["tag"] == "div" else "inline")
        except Exception as error:  # the converter raises many kinds
            problems.append(f"formula '{tex}': {type(error).__name__} {error}")
            return match[0]

    return _FORMULA.sub(formula, page), problems
