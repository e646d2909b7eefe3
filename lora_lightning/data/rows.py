"""Labelled texts: made from tables, cleaned, and told apart by a fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_lightning.data.conditions import Condition, missing
from lora_lightning.errors import DataError

if TYPE_CHECKING:
    from lora_lightning.data.tables import Table

_INTEGER = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class Rows:
    """Texts and their labels, in the order of their file.

    Args:
        texts: The texts.
        labels: The label of each text, by name; empty for rows without labels.
    """

    texts: list[str]
    labels: list[str]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> Rows:
        """Return the rows at some places."""
        places = list(indices)
        return Rows([self.texts[place] for place in places], [self.labels[place] for place in places])


@dataclass(frozen=True)
class RowCounts:
    """What became of a table's rows.

    Args:
        read: Rows in the table.
        filtered: Rows that did not meet the conditions.
        incomplete: Rows, of those that did, without a text or a label.
    """

    read: int
    filtered: int
    incomplete: int


def rows_from(
    table: Table, text_column: str, label_column: str, conditions: Sequence[Condition] = ()
) -> tuple[Rows, RowCounts]:
    """Take the texts and labels from a table, without the rows that lack one or do not meet the conditions.

    Args:
        table: The table.
        text_column: Name of the column with the texts.
        label_column: Name of the column with the labels: texts, whole numbers, or true and false.
        conditions: Conditions that a row must meet, all of them.

    Returns:
        The rows in the order of the table, and what became of the others.

    Raises:
        DataError: A column is missing or of another kind, or no row is left.
    """
    texts, labels = table.column(text_column, "text_column"), table.column(label_column, "label_column")
    kept = ~(missing(texts) | missing(labels)).to_numpy(dtype=bool)
    meets = np.ones(len(kept), dtype=bool)
    for condition in conditions:
        meets &= condition.met_by(table)
    counts = RowCounts(len(kept), filtered=int((~meets).sum()), incomplete=int((meets & ~kept).sum()))
    kept &= meets
    if not kept.any():
        why = f"no row meets {' and '.join(map(str, conditions))}" if not meets.any() else "none has a text and a label"
        raise DataError(f"{table.source}: none of the {counts.read} rows can be used: {why}.")
    return (
        Rows(
            [text_of(cell, table.source, text_column) for cell in texts[kept].tolist()],
            [_label(cell, table.source, label_column) for cell in labels[kept].tolist()],
        ),
        counts,
    )


def unlabelled_rows(table: Table, text_column: str) -> Rows:
    """Take every text from a table, a missing one as an empty text, so that predictions line up with its rows.

    Raises:
        DataError: The column is missing or of another kind.
    """
    cells = table.column(text_column, "text_column")
    pairs = zip(cells.tolist(), missing(cells).tolist(), strict=True)
    return Rows(["" if gone else text_of(cell, table.source, text_column) for cell, gone in pairs], [])


def drop_duplicates(rows: Rows) -> tuple[Rows, int, int]:
    """Keep the first copy of each text, and no copy of a text that stands there with different labels.

    Which of two labels is right cannot be known, and either choice would teach or test a wrong one.

    Returns:
        The rows kept, the number of further copies dropped, and the number of rows with contradictory labels dropped.

    Example:
        >>> drop_duplicates(Rows(["a", "b", "a", "c", "c"], ["0", "1", "0", "0", "1"]))
        (Rows(texts=['a', 'b'], labels=['0', '1']), 1, 2)
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, text in enumerate(rows.texts):
        places[text].append(place)
    kept, duplicates, contradictory = [], 0, 0
    for copies in places.values():
        if len({rows.labels[place] for place in copies}) > 1:
            contradictory += len(copies)
        else:
            kept.append(copies[0])
            duplicates += len(copies) - 1
    return rows.take(kept), duplicates, contradictory


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


def text_of(cell: object, source: str, column: str) -> str:
    """Return a cell as a text.

    Raises:
        DataError: It holds something else, or a number that is NaN (as which pandas reads an absent cell) or infinite.
    """
    if isinstance(cell, float) and not math.isfinite(cell):
        what = "nothing (NaN)" if math.isnan(cell) else f"the number {cell}"
        raise DataError(f"{source}: the column {column!r} holds {what}; expected texts. Take this row out, or mend it.")
    if isinstance(cell, bool | int | float):
        return str(cell)
    if not isinstance(cell, str):
        raise DataError(
            f"{source}: the column {column!r} holds a {type(cell).__name__} ({str(cell)[:40]!r}); expected texts."
        )
    # Half of a surrogate pair, which JSON can carry, is no character, and tokenizers refuse it.
    return cell if cell.isascii() else cell.encode("utf-8", "replace").decode("utf-8")


def fingerprint(splits: Mapping[str, Rows], label_names: Sequence[str]) -> str:
    """Return the SHA-256 of rows, the splits they are in, and the label names, as 64 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(list(label_names)).encode())
    for split in sorted(splits):
        rows = splits[split]
        for text, label in zip(rows.texts, rows.labels, strict=True):
            digest.update(json.dumps([split, text, label]).encode())
    return digest.hexdigest()


def _label(cell: object, source: str, column: str) -> str:
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # pandas turns whole numbers into floats in a column with gaps
    if isinstance(cell, str | bool | int):
        return str(cell).strip()
    kind = "fractional numbers" if isinstance(cell, float) else f"a {type(cell).__name__}"
    raise DataError(
        f"{source}: the column {column!r} holds {kind} ({str(cell)[:40]!r}); expected one class for each row: "
        "a text, a whole number, or true or false."
    )
