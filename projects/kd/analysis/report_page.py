"""report.html: one page with everything inside it, to be opened from the disk."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping

import jinja2

from .pictures import ap_curves_svg
from .report import TASK_METRICS
from .report_tables import planning_table, result_table

_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates")


def report_page(report: Mapping, pictures: Mapping[str, str]) -> str:
    """The HTML text.

    Args:
        report: what report.json holds.
        pictures: title to a PNG file; they are embedded.
    """
    metrics = TASK_METRICS[report["task"]]
    curves = curves_of(report)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        report=report,
        metric=metrics[0],
        results=result_table(report["rows"], metrics),
        planning=planning_table([*report["starts"], *report["rows"]]),
        curves=ap_curves_svg(curves, metrics[0]) if curves else None,
        pictures={title: _data_url(path) for title, path in pictures.items()},
    )


def curves_of(report: Mapping) -> dict[str, list]:
    """Row to its curve, of all rows if any of them was evaluated twice; else empty."""
    curves = {row["name"]: row["curve"] for row in report["rows"] if row["curve"]}
    return curves if any(len(curve) > 1 for curve in curves.values()) else {}


def _data_url(path: str) -> str:
    with open(path, "rb") as file:
        return "data:image/png;base64," + base64.b64encode(file.read()).decode("ascii")
