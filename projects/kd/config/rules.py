"""What a config value has to be: small rules that say in words what they ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real


@dataclass(frozen=True)
class Rule:
    """A test of a value, and the words after "it must be".

    Attributes:
        test: whether a value passes; gets values of any type.
        words: e.g. "a number from 0 on".
        names: names among which a wrong one is looked up, for "did you mean".
    """

    test: Callable[[object], bool]
    words: str
    names: Callable[[], Iterable[str]] = tuple


def _is_number(value, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _from_to(low: float, high: float) -> str:
    if math.isfinite(high):
        return f"from {low:g} to {high:g}" if math.isfinite(low) else f"up to {high:g}"
    return f"from {low:g} on" if math.isfinite(low) else ""


def number(low: float = -math.inf, high: float = math.inf) -> Rule:
    """A finite number in [low, high]."""
    words = f"a number {_from_to(low, high)}".strip()
    return Rule(lambda x: _is_number(x) and math.isfinite(x) and low <= x <= high, words)


def above(low: float, high: float = math.inf, infinite: bool = False) -> Rule:
    """A number in (low, high), with ``infinite`` also infinity."""
    limit = f" and below {high:g}" if math.isfinite(high) else ""
    return Rule(
        lambda x: _is_number(x) and low < x and (x < high or (infinite and x == high)),
        f"a number above {low:g}{limit}",
    )


def share(upper: float = 1.0) -> Rule:
    """A number in [0, upper)."""
    return Rule(lambda x: _is_number(x) and 0 <= x < upper, f"a number from 0 to below {upper:g}")


def whole(low: float = 0, high: float = math.inf) -> Rule:
    """A whole number in [low, high]."""
    words = f"a whole number {_from_to(low, high)}"
    return Rule(lambda x: _is_number(x, int) and low <= x <= high, words)


def one_of(*allowed) -> Rule:
    """One of these values."""
    words = "one of " + ", ".join(repr(x) for x in allowed)
    names = tuple(x for x in allowed if isinstance(x, str))
    return Rule(lambda x: type(x) in map(type, allowed) and x in allowed, words, lambda: names)


def registered(registry, *others: str) -> Rule:
    """A name in a registry of detectron2, or one of ``others``."""

    def known() -> list[str]:
        return [*(name for name, _ in registry), *(name for name in others if name)]

    def test(value) -> bool:
        return isinstance(value, str) and (value in registry or value in others)

    return Rule(test, f"registered among {registry._name} (KD.IMPORTS registers more)", known)


def either(rule: Rule, *values, words: str = "") -> Rule:
    """What the rule takes, or one of these values."""
    also = words or " or ".join(repr(x) for x in values)
    return Rule(
        lambda x: rule.test(x) or any(type(x) is type(v) and x == v for v in values),
        f"{rule.words}, or {also}",
        rule.names,
    )


def listed(
    rule: Rule, least: int = 0, most: float = math.inf, rising: bool = False, once: bool = False
) -> Rule:
    """A list (or tuple) of what the rule takes.

    Args:
        rule: of each element.
        least, most: how many.
        rising: each is above the one before.
        once: none stands twice.
    """
    if least == most:
        words = f"a list of {least}, each {rule.words}"
    else:
        words = f"a list{' (not empty)' if least else ''}, each {rule.words}"

    def test(value) -> bool:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            return False
        if not all(rule.test(x) for x in value) or (once and len(set(value)) < len(value)):
            return False
        return not rising or all(a < b for a, b in zip(value, value[1:], strict=False))

    words += (", in rising order" if rising else "") + (", none of them twice" if once else "")
    return Rule(test, words)


def levelled(rule: Rule, least: int = 0) -> Rule:
    """One list for all levels, or a list of lists, one a level (anchors)."""
    flat, nested = listed(rule, 1), listed(listed(rule, 1), max(least, 1))

    def test(value) -> bool:
        empty = isinstance(value, (list, tuple)) and not value
        return (empty and not least) or flat.test(value) or nested.test(value)

    return Rule(test, f"a list for all levels or lists for each, not empty, each {rule.words}")


def entry(*rules: Rule) -> Rule:
    """A list of exactly these, in this order."""
    return Rule(
        lambda x: isinstance(x, (list, tuple))
        and len(x) == len(rules)
        and all(rule.test(item) for rule, item in zip(rules, x, strict=True)),
        "[" + ", ".join(rule.words for rule in rules) + "]",
    )


TEXT = Rule(lambda x: isinstance(x, str), "text")
NAME = Rule(lambda x: isinstance(x, str) and x != "", "text that is not empty")
FLAG = Rule(lambda x: isinstance(x, bool), "True or False")
WEIGHT = number(0)  # factor of a loss
POSITIVE = above(0)
COUNT = whole(1)
FRACTION = number(0, 1)
NAMES = listed(NAME)
LEVELS = listed(NAME, once=True)
SOME_LEVELS = listed(NAME, 1, once=True)
