"""Tables of a report, for markdown and for its page: results, and what to plan with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .comparison import LEAST_LEAD
from .report import FURTHER, METRICS

CLEAR = (
    "clear: a gain above twice the pooled sample deviation of the row and its baseline, "
    "sqrt(((n1 - 1) s1² + (n2 - 1) s2²) / (n1 + n2 - 2))."
)
ONE_SEED = "No gain can be marked as clear: there is no deviation with one seed."
BELOW = "below: a distilled row that ends under its baseline."
GAP = (
    "gap closed: (row - baseline) / (teacher - baseline), where the teacher leads by "
    f"{LEAST_LEAD:g} point or more."
)
COST = "cost: time of a training iteration beside the baseline's."


@dataclass(frozen=True)
class Cell:
    """Text, and the number that it sorts by (None: no number)."""

    text: str
    value: float | None = None
    mark: str = ""  # "clear" or "below"


@dataclass(frozen=True)
class Table:
    """Column names, lines of cells, and the footnotes that explain them."""

    header: list[str]
    lines: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """As a markdown table with its footnotes."""
        rows = [self.header, *([cell.text for cell in line] for line in self.lines)]
        texts = ["| " + " | ".join(x.replace("|", "\\|") for x in row) + " |" for row in rows]
        texts.insert(1, "|" + "---|" * len(self.header))
        notes = "".join(f"- {note}\n" for note in self.notes)
        return "\n".join(texts) + "\n" + (f"\n{notes}" if notes else "")


def result_table(rows: Sequence[Mapping], metrics: Sequence[str] = METRICS) -> Table:
    """Metrics, gains and costs.

    Args:
        rows: of :func:`~projects.kd.analysis.comparison.compare_rows`.
        metrics: columns; gains are counted in the first.
    """
    columns: list[tuple[str, Callable[[Mapping], Cell]]] = [("name", lambda row: Cell(row["name"]))]
    columns += [(x, lambda row, x=x: _metric(row, x)) for x in metrics]
    further = [x for x in FURTHER if x not in metrics and any(x in row for row in rows)]
    columns += [(x, _number(x, "{:.1f}")) for x in further]
    columns.append(("seeds", _number("seeds", "{:.0f}")))
    notes = []
    if any("gain" in row for row in rows):
        columns.append(("gain", _gain))
        known = [row["clear"] for row in rows if row.get("clear") is not None]
        notes.append(CLEAR if known else ONE_SEED)
        notes += [BELOW] if any(row.get("below") for row in rows) else []
    if any("gap_closed" in row for row in rows):
        columns.append(("gap closed", _number("gap_closed", "{:.0f} %")))
        notes.append(GAP)
    if any("cost" in row for row in rows):
        columns.append(("cost", _number("cost", "{:.2f}x")))
        notes.append(COST)
    if len({row.get("baseline") for row in rows if "gain" in row}) > 1:
        columns.append(("baseline", lambda row: Cell(row.get("baseline") or "-")))
    return Table([name for name, _ in columns], [[c(row) for _, c in columns] for row in rows],
                 notes)  # fmt: skip


def planning_table(rows: Iterable[Mapping]) -> Table:
    """Time and memory of the runs of each row, and what its model takes at inference."""
    rows = list(rows)
    known = [
        ("iterations", "iterations", 1.0, "{:.0f}"),
        ("runs", "seeds", 1.0, "{:.0f}"),
        ("s an iteration", "seconds_per_iteration", 1.0, "{:.3f}"),
        ("minutes a run", "seconds_per_run", 60.0, "{:.1f}"),
        ("memory, GB", "peak_memory_mb", 1000.0, "{:.1f}"),
        ("GPU memory, GB", "gpu_peak_mb", 1000.0, "{:.1f}"),
        ("model, MB", "model_mb", 1.0, "{:.1f}"),
        ("ms an image", "latency_ms", 1.0, "{:.1f}"),
    ]
    columns: list[tuple[str, Callable[[Mapping], Cell]]] = [("name", lambda row: Cell(row["name"]))]
    columns += [
        (title, _number(key, form, unit))
        for title, key, unit, form in known
        if any(row.get(key) is not None for row in rows)
    ]
    minutes = sum(row.get("seconds_per_run", 0.0) * row.get("seeds", 1) for row in rows) / 60
    notes = [f"All runs together: {minutes:.1f} minutes, one after another."]
    if any(row.get("peak_memory_mb") for row in rows):
        notes.append(
            "memory: most resident memory of the training process, without loader workers."
        )
    return Table([name for name, _ in columns], [[c(row) for _, c in columns] for row in rows],
                 notes)  # fmt: skip


def _number(key: str, form: str, unit: float = 1.0) -> Callable[[Mapping], Cell]:
    def cell(row: Mapping) -> Cell:
        value = row.get(key)
        return Cell("-") if value is None else Cell(form.format(value / unit), value / unit)

    return cell


def _metric(row: Mapping, metric: str) -> Cell:
    if row[metric] is None:
        return Cell("-")
    spread = row.get(f"{metric}_std")
    text = f"{row[metric]:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")
    return Cell(text, row[metric])


def _gain(row: Mapping) -> Cell:
    if "gain" not in row:
        return Cell("")
    mark = "below" if row.get("below") else "clear" if row.get("clear") else ""
    points = round(row["gain"], 1) + 0.0  # no -0.0
    return Cell(f"{points:+.1f} {mark}".strip(), row["gain"], mark)
