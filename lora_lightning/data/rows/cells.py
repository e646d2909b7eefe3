"""Cells of records as texts, and labels in order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_lightning.data.rows.columns import missing_column
from lora_lightning.data.sources import Record
from lora_lightning.errors import DataError

_INTEGER = re.compile(r"[+-]?\d+")


def cell_of(record: Record, column: str, setting: str) -> Any:  # noqa: ANN401 - whatever stands there
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
    return record.fields[column]


def text_of(cell: object, place: str, column: str) -> str:
    """Return a cell as a text.

    Raises:
        DataError: It holds something else, or a number that is NaN or infinite.
    """
    if isinstance(cell, float) and not math.isfinite(cell):
        what = "nothing (NaN)" if math.isnan(cell) else f"the number {cell}"
        raise DataError(f"{place}: the column {column!r} holds {what}; expected texts. Take this row out, or mend it.")
    if isinstance(cell, bool | int | float):
        return str(cell)
    if not isinstance(cell, str):
        raise DataError(
            f"{place}: the column {column!r} holds a {type(cell).__name__} ({str(cell)[:40]!r}); expected texts."
        )
    # Half of a surrogate pair, which JSON can carry, is no character, and tokenizers refuse it.
    return cell if cell.isascii() else cell.encode("utf-8", "replace").decode("utf-8")


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Return the different labels: by number if all are whole numbers, else by alphabet.

    Example:
        >>> sorted_labels(["10", "9", "10"]), sorted_labels(["b", "10", "9"])
        (['9', '10'], ['10', '9', 'b'])
    """
    names = set(labels)
    if all(_INTEGER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def check_known(
    labels: Mapping[str, tuple[int, str]],
    names: Iterable[str],
    source: str,
    rows: str,
    whose: str,
    what: str = "labels",
) -> None:
    """Refuse labels that are not among some names.

    Args:
        labels: How many rows of a source have each label, and where the first of them stands.
        names: The labels that there may be.
        source: The source.
        rows: The split that the source is for.
        whose: Whose labels the names are, as in "the model does".
        what: What the labels are called.

    Raises:
        DataError: There are others.
    """
    known = list(names)
    unseen = sorted_labels(set(labels) - set(known))
    if not unseen:
        return
    shown = ", ".join(f"{name!r} ({labels[name][1]})" for name in unseen[:10])
    more = f" and {len(unseen) - 10} more" if len(unseen) > 10 else ""
    raise DataError(
        f"{source} has {what} among its {rows} rows that {whose} not have: {shown}{more}; known are "
        f"{', '.join(map(repr, known[:30]))}. Leave these rows out, or train with rows that have these {what}."
    )


def ignored_message(source: str, ignored: Mapping[str, int]) -> str:
    """Return the sentence about fields that nothing reads.

    Example:
        >>> ignored_message("a.jsonl", {"history": 120})
        'a.jsonl: ignored fields: history (120 rows).'
    """
    fields = ", ".join(f"{name} ({count} rows)" for name, count in ignored.items())
    return f"{source}: ignored fields: {fields}."
