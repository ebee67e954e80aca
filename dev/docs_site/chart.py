"""Draw docs/images/results.png from docs/data/results.yaml::

python dev/docs_site/chart.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import yaml

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"plain": "#90a4ae", "distilled": "#43a047", "teacher": "#1e88e5"}


def draw(data: dict, path: Path) -> None:
    """One line a row: a dot for the plain student, the distilled one and the teacher."""
    rows = data["rows"][::-1]
    figure, axes = plt.subplots(figsize=(8.4, 0.55 * len(rows) + 1.3), layout="constrained")
    for height, row in enumerate(rows):
        axes.plot(
            [row["plain"], row["distilled"]], [height, height], color="#43a047", lw=5, alpha=0.35
        )
        axes.plot(
            [row["distilled"], row["teacher"]], [height, height], color="#b0bec5", lw=1.5, ls=":"
        )
        middle = (row["plain"] + row["distilled"]) / 2
        gain = f"{row['gain']:+.1f}"
        axes.text(middle, height + 0.22, gain, ha="center", fontsize=9, color="#2e7d32")
    for side, colour in COLOURS.items():
        values = [row[side] for row in rows]
        axes.scatter(values, range(len(rows)), s=75, color=colour, zorder=3, label=side)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set(xlim=(0, None), ylim=(-0.6, len(rows) - 0.3), xlabel=data["metric"])
    axes.set_title(data["title"], fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(loc="upper right", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    results = yaml.safe_load((ROOT / "docs/data/results.yaml").read_text(encoding="utf-8"))
    draw(results, ROOT / "docs/images/results.png")
