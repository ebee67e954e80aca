"""Counts of what is wrong with data, kept with the first place of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Problems:
    """How often each problem occurred, and where first."""

    counts: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, problem: str, place: str) -> None:
        """Count one."""
        self.counts[problem] += 1
        self.first.setdefault(problem, place)

    def update(self, other: Problems) -> None:
        """Add what another one counted."""
        self.counts.update(other.counts)
        for problem, place in other.first.items():
            self.first.setdefault(problem, place)

    def __str__(self) -> str:
        """``2 clipped, 1 left out; first: ...`` in one line."""
        listed = ", ".join(f"{count} {problem}" for problem, count in self.counts.items())
        return f"{listed}; first: {next(iter(self.first.values()))}" if listed else ""
