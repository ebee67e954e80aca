"""Flags of scripts: one line for every mistake, before any work."""

import argparse
import random

import pytest

from projects.kd.arguments import Parser, image_size, number, output_file, output_folder, whole
from projects.kd.errors import ConfigError


def parser():
    result = Parser("text")
    result.add_argument("--count", type=whole(1), default=3)
    result.add_argument("--share", type=number(0, 1), default=0.5)
    result.add_argument("--size", type=image_size(32), default=(64, 64))
    result.add_argument("--json", type=output_file, default="")
    result.add_argument("--folder", type=output_folder)
    result.add_argument("opts", nargs=argparse.REMAINDER)
    return result


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "--count: is 0, it must be at least 1"),
        (["--count", "1.5"], "--count: '1.5' is not a whole number"),
        (["--share", "nan"], r"--share: is nan, it must lie in \[0, 1\]"),
        (["--share", "x"], "--share: 'x' is not a number"),
        (["--size", "64"], "--size: '64' is not HxW"),
        (["--size", "64x8"], "--size: is 8, it must be at least 32"),
        (["--size", "64xa"], "--size: 'a' is not a whole number"),
        (["--json", "/dev/null/x.json"], "--json: '/dev/null': the folder cannot be written"),
        (["--folder", "/dev/null/x"], "--folder: '/dev/null/x': the folder cannot be written"),
        (["--folder", ""], "--folder: is empty: name a folder to write to"),
        (["--cuont=3"], "unrecognized arguments: --cuont=3; did you mean --count?"),
    ],
)
def test_a_mistake_is_one_line(words, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        parser().parse_args(words)


def test_what_is_right_is_read(tmp_path):
    made = tmp_path / "new" / "x.json"
    words = ["--count", "4", "--share", "1", "--size", "32X48", "--json", str(made), "A", "1"]
    args = parser().parse_args(words)
    assert (args.count, args.share, args.size, args.opts) == (4, 1.0, (32, 48), ["A", "1"])
    assert args.json == str(made) and made.parent.is_dir() and not made.exists()
    with pytest.raises(ConfigError, match="is a folder or empty: name a file"):
        parser().parse_args(["--json", str(tmp_path)])
    assert parser().parse_args([]).json == ""


def test_random_words_are_read_or_refused_in_one_line():
    draw = random.Random(3)
    flags = ["--count", "--share", "--size"]
    values = ["", "0", "-1", "7", "1e9", "nan", "-inf", "0x0", "64x64", "x", "1" * 5000, "é", "--"]
    read = 0
    for _ in range(200):
        try:
            args = parser().parse_args([draw.choice(flags), draw.choice(values)])
        except ConfigError as error:
            assert "\n" not in str(error)
            continue
        read += 1
        assert args.count >= 1 and 0 <= args.share <= 1 and min(args.size) >= 32
    assert read > 10
