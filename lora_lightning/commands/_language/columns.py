"""Two texts side by side in a terminal, the right one while it is generated."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

_GAP = " | "


class Columns:
    """Prints a finished text on the left and a growing one on the right, a row as soon as its right half is complete.

    Args:
        left: The finished text.
        width: Characters of a row.
        emit: Called with each row.

    Example:
        >>> columns = Columns("one two", 13, print)
        >>> columns.write("three ")
        >>> columns.write("four five")
        one   | three
        two   | four
        >>> columns.close()
              | five
    """

    def __init__(self, left: str, width: int, emit: Callable[[str], object]) -> None:
        self._half = (width - len(_GAP)) // 2
        self._left = wrap(left.strip(), self._half)
        self._emit = emit
        self._text = ""
        self._num_rows = 0

    def write(self, text: str) -> None:
        """Append to the right text, and print the rows that can no longer change."""
        self._text = (self._text + text).lstrip()
        self._print_rows(wrap(self._text, self._half)[:-1])

    def close(self) -> None:
        """Print the remaining rows of both texts."""
        self._print_rows(wrap(self._text, self._half))
        for row in range(self._num_rows, len(self._left)):
            self._print_row(row, "")

    def _print_rows(self, lines: list[str]) -> None:
        for row in range(self._num_rows, len(lines)):
            self._print_row(row, lines[row])

    def _print_row(self, row: int, right: str) -> None:
        left = self._left[row] if row < len(self._left) else ""
        self._emit(f"{left:<{self._half}}{_GAP}{right}".rstrip())
        self._num_rows = row + 1


def wrap(text: str, width: int) -> list[str]:
    r"""Break a text into lines of at most `width` characters, keeping its own line breaks.

    Example:
        >>> wrap("one two\n\nthree", 5)
        ['one', 'two', '', 'three']
    """
    lines: list[str] = []
    for line in text.splitlines() or [""]:
        lines += textwrap.wrap(line, width) or [""]
    return lines
