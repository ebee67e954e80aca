"""What a suite shows: gains over each row's baseline, gaps closed, and the closing sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# points by which a teacher has to lead before a share of its lead means something; ours
LEAST_LEAD = 1.0
# two times on one machine are called the same below this ratio; ours
SAME_SPEED = 1.1


def compare_rows(rows: Sequence[dict], metric: str) -> list[dict]:
    """Add to each row what it is beside its baseline and its teacher.

    Args:
        rows: of :func:`~.report.summarise`, with the names "baseline" and "teacher" of
            other rows (or None) and, for rows that learn from a teacher, ``distilled: True``.
        metric: the one that gains are counted in.

    Returns:
        Copies with, where they can be computed,

        * "gain": metric less that of the baseline, in its points;
        * "gap_closed": 100 (row - baseline) / (teacher - baseline), in percent, for distilled rows
          whose teacher leads by LEAST_LEAD points or more;
        * "clear": whether the gain is above twice the pooled sample deviation of row and baseline,
          :func:`pooled_deviation`; None where one of them has a single seed;
        * "below": a distilled row under its baseline;
        * "cost": its time of an iteration beside the baseline's.
    """
    by_name = {row["name"]: row for row in rows}
    compared = []
    for row in rows:
        row = dict(row)
        compared.append(row)
        base = by_name.get(row.get("baseline"))
        if base is None:
            continue
        time, base_time = row.get("seconds_per_iteration"), base.get("seconds_per_iteration")
        if time and base_time:
            row["cost"] = round(time / base_time, 3)
        if row["name"] == base["name"] or row[metric] is None or base[metric] is None:
            continue
        row["gain"] = round(row[metric] - base[metric], 3)
        spread = pooled_deviation(row.get(f"{metric}_seeds", []), base.get(f"{metric}_seeds", []))
        row["clear"] = None if spread is None else row["gain"] > 2 * spread
        if not row.get("distilled"):
            continue
        row["below"] = row["gain"] < 0
        teacher = by_name.get(row.get("teacher"))
        if teacher is not None and teacher[metric] is not None:
            gap = teacher[metric] - base[metric]
            if gap >= LEAST_LEAD:
                row["gap_closed"] = round(100 * row["gain"] / gap, 1)
    return compared


def pooled_deviation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """sqrt(((n1 - 1) s1^2 + (n2 - 1) s2^2) / (n1 + n2 - 2)), s^2 the sample variances.

    None unless both have two values or more.
    """
    if len(first) < 2 or len(second) < 2:
        return None
    squares = 0.0
    for values in (first, second):
        mean = math.fsum(values) / len(values)
        squares += math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (len(first) + len(second) - 2))


def groups(rows: Sequence[Mapping]) -> list[tuple[Mapping, Mapping | None, list[Mapping]]]:
    """(baseline, teacher or None, distilled rows) of rows that were compared, in their order."""
    by_name = {row["name"]: row for row in rows}
    found: dict[tuple, list[Mapping]] = {}
    for row in rows:
        if row.get("distilled") and "gain" in row:
            found.setdefault((row["baseline"], row.get("teacher")), []).append(row)
    return [(by_name[base], by_name.get(teacher), own) for (base, teacher), own in found.items()]


def warnings(rows: Sequence[Mapping], metric: str) -> list[str]:
    """A sentence for each teacher that is not better than the baseline of those it teaches."""
    lines = []
    for base, teacher, _ in groups(rows):
        if teacher is not None and teacher[metric] is not None and teacher[metric] <= base[metric]:
            lines.append(
                f"The teacher '{teacher['name']}' ({metric} {teacher[metric]:.1f}) is not better "
                f"than the baseline '{base['name']}' ({base[metric]:.1f}): it has nothing to teach."
            )
    return lines


def sentences(rows: Sequence[Mapping], metric: str, measured_on: str = "") -> list[str]:
    """In words, for each group: the best distilled row, its gain, its size and speed, the teacher.

    Args:
        rows: of :func:`compare_rows`; "model_mb" and "latency_ms" are told where they are known.
        metric: the one that gains are counted in.
        measured_on: how the time of an image was measured, "1 CPU thread" for example.
    """
    return [_sentence(*group, metric, measured_on) for group in groups(rows)]


def _sentence(base, teacher, distilled, metric, measured_on) -> str:
    best = max(distilled, key=lambda row: row[metric])
    short = best["name"].removeprefix(base["name"]).lstrip("+ ") or best["name"]
    seeds = min(best["seeds"], base["seeds"])
    parts = [
        f"{base['name']} {base[metric]:.1f}, distilled ({short}) {best[metric]:.1f}: "
        f"{best['gain']:+.1f} {metric}" + (f", mean of {seeds} seeds" if seeds > 1 else "")
    ]
    if teacher is not None and teacher[metric] is not None:
        facts = [_size(teacher), _time(teacher)]
        facts = f" ({', '.join(fact for fact in facts if fact)})" if any(facts) else ""
        parts.append(f"{teacher['name']} {teacher[metric]:.1f}{facts}")
    if (cost := _deployed(base, best)) is not None:
        parts.append(cost + (f", {measured_on}" if measured_on else ""))
    text = "; ".join(parts) + "."
    below = [row for row in distilled if row["below"]]
    if below:
        listed = ", ".join(f"{r['name']} {r[metric]:.1f} ({r['gain']:+.1f})" for r in below)
        text += f" Below {base['name']}: {listed}."
    return text


def _deployed(base: Mapping, best: Mapping) -> str | None:
    """Size and speed of a distilled student beside the plain one."""
    if not (_size(base) and _size(best)):
        return None
    same_size = base["model_mb"] == best["model_mb"]
    times = best["latency_ms"], base["latency_ms"]
    same_speed = max(times) < SAME_SPEED * min(times)
    if same_size and same_speed:
        return f"same size ({_size(best)}) and same speed at inference ({_time(best)} an image)"
    size = f"same size ({_size(best)})" if same_size else f"{_size(best)} for {_size(base)}"
    if same_speed:
        return f"{size}, same speed at inference ({_time(best)} an image)"
    return f"{size}, {_time(best)} an image at inference for {_time(base)}"


def _size(row: Mapping) -> str:
    return f"{row['model_mb']:.1f} MB" if row.get("model_mb") else ""


def _time(row: Mapping) -> str:
    time = row.get("latency_ms")
    return f"{time:.1f} ms" if time else ""
