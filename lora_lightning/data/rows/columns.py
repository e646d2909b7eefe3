"""What records must have: columns, and cells that conditions can be applied to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.data.rows.cells import is_missing, missing_column
from lora_lightning.data.rows.conditions import Condition
from lora_lightning.data.sources import Record
from lora_lightning.errors import DataError


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
        self._not_compared: dict[Condition, Any] = {}  # the first cell of each

    def admits(self, record: Record) -> bool:
        """Return whether a record meets all conditions."""
        if self._unseen:
            self._seen.update(dict.fromkeys(record.fields))
            for column in self._unseen.keys() & record.fields.keys():
                del self._unseen[column]
        answers = [self._answer(condition, record.fields) for condition in self._conditions]
        return all(answers)

    def check(self) -> None:
        """Refuse a column that no record has, and a condition that no cell can be compared with.

        Raises:
            DataError: There is one.
        """
        for column, setting in self._unseen.items():
            raise missing_column(self._source, column, setting, self._seen)
        for condition, cell in self._not_compared.items():
            if condition not in self._compared:
                raise DataError(
                    f"{self._source}: the condition '{condition}' cannot be met: no cell of the column is "
                    f"{condition.kind} (the first is {str(cell)[:40]!r})."
                )

    def _answer(self, condition: Condition, fields: Mapping[str, Any]) -> bool:
        answer, cell = condition.met_by(fields), fields.get(condition.column)
        if answer is not None:
            self._compared.add(condition)
        elif not is_missing(cell):
            self._not_compared.setdefault(condition, cell)
        return bool(answer)
