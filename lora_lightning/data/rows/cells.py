"""Cells of records, read as texts and numbers or refused, and the labels that they hold."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_lightning.data.sources import Record
from lora_lightning.errors import DataError
from lora_lightning.paths import nearest, some_of

_INTEGER = re.compile(r"[+-]?\d+")


class Cell(NamedTuple):
    """What a record holds in a column.

    Args:
        value: The value; None if the record does not have the column.
        column: Name of the column.
        place: Location of the record, as messages begin.
    """

    value: Any
    column: str
    place: str

    @property
    def is_missing(self) -> bool:
        """Whether it is missing; see `is_missing`."""
        return is_missing(self.value)

    def entries(self) -> list[Cell]:
        """Return each entry of a list as a cell of its own."""
        return [Cell(one, f"{self.column}[{index}]", self.place) for index, one in enumerate(self.value)]

    def refuse(self, expected: str) -> DataError:
        """Return the error with the location of the cell, its value, and what was expected."""
        return DataError(f"{self.place}: the column {self.column!r} holds {repr(self.value)[:60]}; {expected}")


def cell_of(record: Record, column: str, setting: str) -> Cell:
    """Return a cell that every record must have.

    Args:
        record: The record.
        column: Its column.
        setting: The setting that names the column.

    Raises:
        DataError: The record has no such column.
    """
    if column not in record.fields:
        raise missing_column(record.place, column, setting, record.fields)
    return Cell(record.fields[column], column, record.place)


def missing_column(source: str, column: str, setting: str, columns: Iterable[str]) -> DataError:
    """Return the error for a column that is not there.

    Args:
        source: The source.
        column: The column.
        setting: The setting that names it.
        columns: The columns that there are.
    """
    names = list(map(str, columns))
    near = nearest(column, names, count=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        hint = " It looks as if another separator is used: set separator."
    return DataError(
        f"{source} has no column {column!r}, which {setting} names; its columns: {some_of(names, 20)}.{hint}"
    )


def is_missing(value: object) -> bool:
    """Return whether a value is nothing: null, NaN, or only white space.

    Example:
        >>> [is_missing(value) for value in ("a", " ", None, 0, float("nan"))]
        [False, True, True, False, True]
    """
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value: object) -> bool:
    """Return whether nothing would be lost with a value: it is missing, or an empty list or object.

    Example:
        >>> [is_empty(value) for value in ("", [], {}, None, 0, False)]
        [True, True, True, True, False, False]
    """
    return is_missing(value) or (isinstance(value, list | dict) and not value)


def text_of(cell: Cell) -> str:
    """Return a cell as a text.

    Raises:
        DataError: It holds something else, or a number that is NaN or infinite.
    """
    value = cell.value
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if not isinstance(value, str) and not is_number:
        raise cell.refuse("expected a text. Correct this row, or take it out.")
    text = str(value)
    # JSON can hold half of a surrogate pair, which is not a character and which tokenizers refuse.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def number_of(value: object) -> float | None:
    """Return the number that a value is or spells, infinity for one too large; None if it is not a number.

    Example:
        >>> [number_of(value) for value in (3, " 4.5 ", "1e-3", True, "good", "1_000")]
        [3.0, 4.5, 0.001, 1.0, None, None]
    """
    if isinstance(value, str) and "_" in value:  # only in Python are these digits
        return None
    try:
        return float(value)  # type: ignore[arg-type]  # what float does not take is refused below
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def is_bracketed(text: str) -> bool:
    """Return whether a text is in the brackets of a list."""
    return text.startswith("[") and text.endswith("]")


def parsed_list(text: str) -> list[Any] | None:
    """Return the list that a text in JSON or Python syntax represents; None if it is not a list.

    Example:
        >>> parsed_list('["a", 1]'), parsed_list("['a' 'b']"), parsed_list("a")
        (['a', 1], None, None)
    """
    found: Any = None
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        try:
            found = json.loads(text)
        except ValueError:
            found = ast.literal_eval(text)
            # Python joins neighbouring texts: ['a' 'b'], as numpy writes two, would become one.
            found = found if "".join(repr(found).split()) == "".join(text.split()) else None
    return found if isinstance(found, list) else None


# Labels.


def is_integer(name: str) -> bool:
    """Return whether a label is a whole number."""
    return bool(_INTEGER.fullmatch(name))


def name_by_number(label: str, names: Sequence[str]) -> str:
    """Return the name of a label that is given by its number; any other label as it is.

    Example:
        >>> name_by_number("1", ["neg", "pos"]), name_by_number("2", ["neg", "pos"]), name_by_number("1", ["1", "2"])
        ('pos', '2', '1')
    """
    are_numbers = any(map(is_integer, names))
    is_number = label.isdigit() and int(label) < len(names)
    return names[int(label)] if is_number and not are_numbers else label


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Return the different labels: by number if all are whole numbers, else by alphabet.

    Example:
        >>> sorted_labels(["10", "9", "10"]), sorted_labels(["b", "10", "9"])
        (['9', '10'], ['10', '9', 'b'])
    """
    names = set(labels)
    if all(map(is_integer, names)):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def check_known(
    labels: Mapping[str, tuple[int, str]], names: Sequence[str], source: str, split: str, owner: str, what: str
) -> None:
    """Refuse labels that are not among some names.

    Args:
        labels: How many rows of a source have each label, and where the first of them stands.
        names: The labels that there may be.
        source: The source.
        split: The split that the source is for.
        owner: What has the names, as in "the model does".
        what: What the labels are called.

    Raises:
        DataError: There are others.
    """
    unseen = sorted_labels(labels.keys() - set(names))
    if unseen:
        shown = some_of([f"{name!r} ({labels[name][1]})" for name in unseen])
        known = some_of(list(map(repr, names)), 30)
        raise DataError(
            f"{source} has {what} among its {split} rows that {owner} not have: {shown}; known are {known}. Leave "
            f"these rows out, or train with rows that have these {what}."
        )


def ignored_message(source: str, ignored: Mapping[str, int]) -> str:
    """Return the sentence about fields that nothing reads.

    Example:
        >>> ignored_message("a.jsonl", {"history": 120})
        'a.jsonl: ignored fields: history (120 rows).'
    """
    fields = ", ".join(f"{name} ({count} rows)" for name, count in ignored.items())
    return f"{source}: ignored fields: {fields}."
