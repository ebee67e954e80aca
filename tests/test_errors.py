"""What an exception says, on one line."""

import pytest

from projects.kd.errors import one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("\n two\n\t lines "), "two lines"),
        (KeyError(), "KeyError"),
        (ValueError("a" * 13), "aaaaaaaaaaaa..."),
        (ValueError("a" * 12), "aaaaaaaaaaaa"),
    ],
)
def test_an_exception_is_one_line_and_not_too_long(error, line):
    assert one_line(error, 12) == line
