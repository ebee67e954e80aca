"""A flame picture: nested rectangles whose widths are shares of the time, as SVG."""

from __future__ import annotations

import html
import zlib
from collections.abc import Mapping

_WIDTH, _ROW, _LETTER = 1200.0, 18, 6.6
_LEAST = 0.4  # pixels; narrower rectangles are left out


def flame_svg(stacks: Mapping[tuple[str, ...], float], title: str, unit: str = "ms") -> str:
    """Draw stacks from the top down; a rectangle's tooltip says its name, time and share.

    Args:
        stacks: path of names, outermost first, to the time spent there and not further inside.
        title: above the picture.
        unit: of the times.

    Returns:
        The text of an SVG file.
    """
    sums: dict[tuple[str, ...], float] = {}
    for path, value in stacks.items():
        for depth in range(len(path) + 1):
            sums[path[:depth]] = sums.get(path[:depth], 0.0) + value
    children: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for path in sums:
        if path:
            children.setdefault(path[:-1], []).append(path)
    whole = sums.get((), 0.0) or 1.0
    drawn: list[str] = []

    def draw(path: tuple[str, ...], left: float) -> None:
        width = _WIDTH * sums[path] / whole
        if width < _LEAST:
            return
        if path:
            drawn.append(_rectangle(path, left, width, sums[path], sums[path] / whole, unit))
        for child in sorted(children.get(path, ()), key=lambda p: -sums[p]):
            draw(child, left)
            left += _WIDTH * sums[child] / whole

    draw((), 0.0)
    height = (max(map(len, sums), default=0) + 2) * _ROW
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {height}" '
        f'font-family="monospace" font-size="11">\n'
        f'<text x="2" y="13">{html.escape(title)}: {whole:.4g} {unit}</text>\n'
    )
    return head + "\n".join(drawn) + "\n</svg>\n"


def _rectangle(path, left: float, width: float, value: float, share: float, unit: str) -> str:
    name, y = path[-1], len(path) * _ROW
    hue = zlib.crc32(name.encode()) % 50  # red to yellow, always the same for a name
    letters = int((width - 4) / _LETTER)
    text = name if len(name) <= letters else name[: max(letters - 1, 0)] + "…"
    shown = f'<text x="{left + 2:.2f}" y="{y + 13}">{html.escape(text)}</text>'
    return (
        f"<g><title>{html.escape(name)}: {value:.4g} {unit}, {share:.1%}</title>"
        f'<rect x="{left:.2f}" y="{y}" width="{width:.2f}" height="{_ROW - 1}" '
        f'fill="hsl({hue},80%,70%)"/>{shown if letters > 2 else ""}</g>'
    )
