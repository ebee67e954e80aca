"""Draw the charts of docs/images from their YAML files in docs/data::

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
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110)


def draw_lengths(data: dict, path: Path) -> None:
    """AP over the length of training: a line through the means, a dot for each seed."""
    figure, axes = plt.subplots(figsize=(8.4, 3.6), layout="constrained")
    for row in data["rows"]:
        colour = COLOURS[row["side"]]
        means = [sum(seeds) / len(seeds) for seeds in row["ap"].values()]
        axes.plot(list(row["ap"]), means, color=colour, lw=2.5, marker="o", ms=7, label=row["name"])
        for length, seeds in row["ap"].items():
            if len(seeds) > 1:
                axes.scatter([length] * len(seeds), seeds, s=14, color="black", zorder=4)
            axes.annotate(
                f"{sum(seeds) / len(seeds):.1f}", (length, max(seeds)),
                xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9,
            )  # fmt: skip
    lengths = sorted({length for row in data["rows"] for length in row["ap"]})
    axes.axhline(data["teacher"], color=COLOURS["teacher"], ls="--", lw=1.5)
    axes.annotate(
        f"teacher {data['teacher']:.1f}", (lengths[0], data["teacher"]),
        xytext=(0, -13), textcoords="offset points", fontsize=9, color=COLOURS["teacher"],
    )  # fmt: skip
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set(ylim=(0, 90), xlabel="iterations", ylabel=data["metric"])
    axes.set_title(data["title"], fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(0.02, 0.6), fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    charts = {"results": draw, "few_labels": draw_lengths, "few_labels_start": draw}
    for name, function in charts.items():
        values = yaml.safe_load((ROOT / f"docs/data/{name}.yaml").read_text(encoding="utf-8"))
        function(values, ROOT / f"docs/images/{name}.png")
