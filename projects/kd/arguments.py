"""Flags of scripts: a mistake gives one line; numbers and output paths are checked early."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

from .errors import ConfigError, did_you_mean
from .files import writable_file, writable_folder


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are a :class:`ConfigError`; its help keeps line breaks."""

    def __init__(self, description: str, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, **options)

    def error(self, message: str):
        """Raise the line; an unknown flag gets the nearest ones that there are."""
        fail(self, message)


def fail(parser: argparse.ArgumentParser, message: str):
    """What a parser's ``error`` does in scripts of this project."""
    unknown = re.search(r"(--[\w-]+)", message) if "unrecognized" in message else None
    hint = did_you_mean(unknown[1], parser._option_string_actions) if unknown else ""
    raise ConfigError(message.removeprefix("argument ") + hint)


def whole(least: int = 0) -> Callable[[str], int]:
    """Type of a flag: a whole number of at least ``least``."""

    def read(text: str) -> int:
        with _named(text, "a whole number"):
            value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"is {text}, it must be at least {least}")
        return value

    return read


def number(low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """Type of a flag: a finite number from ``low`` to ``high``."""

    def read(text: str) -> float:
        with _named(text, "a number"):
            value = float(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"is {text}, it must lie in [{low:g}, {high:g}]")
        return value

    return read


def image_size(least: int = 32) -> Callable[[str], tuple[int, int]]:
    """Type of a flag: HxW, (height, width) in pixels of at least ``least`` each."""

    def read(text: str) -> tuple[int, int]:
        parts = text.lower().split("x")
        if len(parts) != 2:
            raise argparse.ArgumentTypeError(f"'{text}' is not HxW, e.g. 512x512")
        height, width = (whole(least)(part) for part in parts)
        return height, width

    return read


def output_file(text: str) -> str:
    """Type of a flag: a file to write, "" for none; its folder is made."""
    return text and _checked(writable_file, text)


def output_folder(text: str) -> str:
    """Type of a flag: a folder to write to; it is made."""
    return _checked(writable_folder, text)


def _checked(check: Callable[[str, str], str], text: str) -> str:
    try:
        return check(text, "")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class _named:
    """Turns the ValueError of a conversion into a line that says what was expected."""

    def __init__(self, text: str, what: str):
        self.text, self.what = text, what

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None and issubclass(kind, ValueError):
            raise argparse.ArgumentTypeError(f"'{self.text}' is not {self.what}") from error
