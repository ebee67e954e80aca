"""Counts of what is wrong with data, kept with the first place of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Problems:
    """How often each problem occurred, and where first."""

    counts: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, problem: str, place: str | Callable[[], str]) -> None:
        """Count one. A place that is costly to write is given as a function."""
        self.counts[problem] += 1
        if problem not in self.first:
            self.first[problem] = place() if callable(place) else place

    def update(self, other: Problems) -> None:
        """Add what another one counted."""
        self.counts.update(other.counts)
        for problem, place in other.first.items():
            self.first.setdefault(problem, place)

    def __str__(self) -> str:
        """``boxes clipped: 2, boxes left out: 1; first: ...`` in one line."""
        listed = ", ".join(f"{problem}: {count}" for problem, count in self.counts.items())
        return f"{listed}; first: {next(iter(self.first.values()))}" if listed else ""
