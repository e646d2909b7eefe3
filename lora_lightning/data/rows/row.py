"""Rows: a checked record, a stored row, and the view of an encoded row that users get."""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """A checked record.

    Args:
        content: The content of the row in plain types: equal for copies.
        group: What rows share that must stay in one split.
        labels: Names of the classes of the row.
    """

    content: list[Any]
    group: str
    labels: tuple[str, ...] = ()


class StoredRow(NamedTuple):
    """A row as it is read back.

    Args:
        content: Its content.
        place: Its location in its source, as messages begin.
    """

    content: list[Any]
    place: str


class Example(NamedTuple):
    """An encoded row with its text and label in the source.

    Args:
        text: The text of the row; of a language model's row, its decoded tokens.
        ids: Its token ids `[length]`.
        labels: What is learnt of each token `[length]`, -100 where nothing is; of a text with a class, the class's
            index; of a pair, the target's ids; None where the row has no target.
        label: Name of the class, or the tags, the names, the number or the target text; None where there is none.
        source: The file that the row comes from.
        line: Its line in the file, or its row or entry, from 1.
    """

    text: str
    ids: Any
    labels: Any
    label: Any
    source: str
    line: int
