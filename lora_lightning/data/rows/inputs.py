"""Rows with the records that they were read from, for files of predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lora_lightning.data.rows.plan import Plan
from lora_lightning.data.rows.pool import SplitRows, kind_of
from lora_lightning.data.sources import Record, describe, read_records
from lora_lightning.errors import DataError


class InputRow(NamedTuple):
    """A row to predict, as it stands in its source.

    Args:
        position: Its position in its source, from 0.
        fields: All fields of its record, including those that nothing reads.
        content: What the data module read of it.
    """

    position: int
    fields: Mapping[str, Any]
    content: list[Any]


def input_rows(rows: SplitRows, plan: Plan, split: str) -> Iterator[InputRow]:
    """Read the source of some rows again and return each row with all fields of its record.

    The rows of a split stand in the order of their source, so that one pass finds all of them.

    Args:
        rows: The rows.
        plan: Where they come from.
        split: Their split.

    Raises:
        DataError: The source has changed in the meantime.
    """
    records = _numbered_records(plan, split if plan.has_own_source(split) else "train")
    for _, stored in rows.batches():
        for row in stored:
            found = next(((position, one) for position, one in records if one.place == row.place), None)
            if found is None:
                raise DataError(f"{row.place}: the row is no longer there; predict again, and leave its file alone.")
            position, record = found
            yield InputRow(position, record.fields, row.content)


def _numbered_records(plan: Plan, split: str) -> Iterator[tuple[int, Record]]:
    """Return the records of a split's own sources with their positions; broken records count but are skipped."""
    num_broken = 0

    def pass_over(error: DataError, text: str) -> None:
        nonlocal num_broken
        del error, text
        num_broken += 1

    num_read = 0
    for source in plan.parts(split):
        for record in read_records(source, plan.settings, kind_of(split), on_bad=pass_over):
            yield num_read + num_broken, record
            num_read += 1


def predicted_message(plan: Plan, num_rows: Mapping[str, int]) -> str:
    """Return the line that says how many rows are going to be predicted.

    Args:
        plan: Where they come from.
        num_rows: Number of rows of each split to predict.
    """
    listed = (f"{count} rows of {describe(plan.sources[split])}" for split, count in num_rows.items())
    return f"Data: {' and '.join(listed)} to predict."
