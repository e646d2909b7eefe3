"""Checks of records: columns that must exist, and cells that conditions can be applied to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_lightning.data.rows.cells import is_missing, missing_column
from lora_lightning.data.rows.conditions import Condition
from lora_lightning.data.sources import Record
from lora_lightning.data.sources.text import kind_of_file
from lora_lightning.errors import DataError

_TABLES = (".csv", ".tsv", ".parquet")


class _File(NamedTuple):
    """The columns that no record of a file has had yet, each with the setting that names it, and those that were."""

    unseen: dict[str, str]
    seen: dict[str, None]


class ColumnWatch:
    """Applies conditions to the records of a source, and refuses columns that none of them has.

    Args:
        source: The source, for messages.
        columns: For each column that is read, the setting that names it.
        conditions: The conditions.
    """

    def __init__(self, source: str, columns: Mapping[str, str], conditions: Sequence[Condition]) -> None:
        self._source, self._conditions = source, conditions
        self._columns = {**{one.column: "where" for one in conditions}, **columns}
        self._unseen = dict(self._columns)
        self._seen: dict[str, None] = {}
        self._files: dict[str, _File] = {}
        self._compared: set[Condition] = set()
        self._not_compared: dict[Condition, Any] = {}  # the first cell of each

    def admits(self, record: Record) -> bool:
        """Return whether a record meets all conditions."""
        self._look_into_file(record)
        if self._unseen:
            self._seen.update(dict.fromkeys(record.fields))
            for column in self._unseen.keys() & record.fields.keys():
                del self._unseen[column]
        answers = [self._answer(condition, record.fields) for condition in self._conditions]
        return all(answers)

    def check(self) -> None:
        """Refuse a column that no record has, or no record of one table, and a condition that can compare no cell.

        Raises:
            DataError: There is one.
        """
        for column, setting in self._unseen.items():
            raise missing_column(self._source, column, setting, self._seen)
        for name, file in self._files.items():
            for column, setting in file.unseen.items():
                raise missing_column(name, column, setting, file.seen)
        for condition, cell in self._not_compared.items():
            if condition not in self._compared:
                raise DataError(
                    f"{self._source}: the condition '{condition}' cannot be met: no cell of the column is "
                    f"{condition.kind} (the first is {str(cell)[:40]!r})."
                )

    def _look_into_file(self, record: Record) -> None:
        """Note the columns of a file that is a table, where each record should have all of them."""
        file = self._files.get(record.source)
        if file is None:
            is_table = kind_of_file(Path(record.source)) in _TABLES
            file = self._files[record.source] = _File(dict(self._columns) if is_table else {}, {})
        if file.unseen:
            file.seen.update(dict.fromkeys(record.fields))
            for column in file.unseen.keys() & record.fields.keys():
                del file.unseen[column]

    def _answer(self, condition: Condition, fields: Mapping[str, Any]) -> bool:
        answer, cell = condition.met_by(fields), fields.get(condition.column)
        if answer is not None:
            self._compared.add(condition)
        elif not is_missing(cell):
            self._not_compared.setdefault(condition, cell)
        return bool(answer)
