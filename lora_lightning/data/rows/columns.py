"""What records must have: columns, and cells that conditions can be applied to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_lightning.data.rows.conditions import Condition, is_missing
from lora_lightning.data.sources import Record
from lora_lightning.errors import DataError
from lora_lightning.paths import nearest


class ColumnWatch:
    """Applies conditions to the records of a source, and refuses columns that none of them has.

    Args:
        source: The source, for messages.
        columns: For each column that is read, the setting that names it.
        conditions: The conditions.
    """

    def __init__(self, source: str, columns: Mapping[str, str], conditions: Sequence[Condition]) -> None:
        self._source, self._conditions = source, conditions
        self._unseen = {**{one.column: "where" for one in conditions}, **columns}
        self._seen: dict[str, None] = {}
        self._compared: set[Condition] = set()
        self._cells: dict[Condition, Any] = {}

    def admits(self, record: Record) -> bool:
        """Return whether a record meets all conditions."""
        if self._unseen:
            self._seen.update(dict.fromkeys(record.fields))
            for column in self._unseen.keys() & record.fields.keys():
                del self._unseen[column]
        answers = [self._answer(condition, record) for condition in self._conditions]
        return all(answers)

    def check(self) -> None:
        """Refuse a column that no record has, and a condition that no cell can be compared with.

        Raises:
            DataError: There is one.
        """
        for column, setting in self._unseen.items():
            raise missing_column(self._source, column, setting, self._seen)
        for condition, cell in self._cells.items():
            if condition not in self._compared:
                raise DataError(
                    f"{self._source}: the condition '{condition}' cannot be met: no cell of the column is "
                    f"{condition.kind} (the first is {str(cell)[:40]!r})."
                )

    def _answer(self, condition: Condition, record: Record) -> bool:
        answer = condition.met_by(record.fields)
        if answer is not None:
            self._compared.add(condition)
            return answer
        cell = record.fields.get(condition.column)
        if not is_missing(cell):
            self._cells.setdefault(condition, cell)
        return False


def missing_column(source: str, column: str, setting: str, columns: Iterable[str]) -> DataError:
    """Return the error for a column that is not there; those that there are stand in the message.

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
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    shown = ", ".join(names[:20]) + more
    return DataError(f"{source} has no column {column!r}, which {setting} names; its columns: {shown}.{hint}")
