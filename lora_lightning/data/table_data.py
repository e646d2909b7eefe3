"""Data modules whose rows are read from tables with named columns, and divided with like rows on one side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.data.base import TokenizedData
from lora_lightning.data.conditions import Condition
from lora_lightning.data.grouped_splits import GroupedRow, GroupedSplits, fingerprint_of
from lora_lightning.data.splits import Size
from lora_lightning.data.tables import Table, is_hub_name
from lora_lightning.errors import DataError

Row = TypeVar("Row", bound=GroupedRow)


@dataclass(frozen=True, kw_only=True)
class TableSplits(GroupedSplits[Row]):
    """Where the rows of tables come from and how they are divided.

    Args:
        sources: See `GroupedSplits`; also the source of `predict`, whose rows need no target, or None.
        sizes: See `GroupedSplits`.
        seed: See `GroupedSplits`.
        read_table: Reads a source for a split.
        rows_from: Makes rows of a table; is also told whether they must have a target.
        conditions: What every row with a target must meet.

    Raises:
        ConfigError: A size is out of its range, or given for a split that has a source of its own.
    """

    read_table: Callable[[str, str], Table]
    rows_from: Callable[[Table, bool], list[Row]]
    conditions: Sequence[Condition] = ()

    def read(self, split: str, counts: Counter[str]) -> list[Row]:
        """Read the rows of a split's own source, and count them.

        Raises:
            DataError: The source is missing, malformed, or no row is left.
        """
        table = self.read_table(str(self.sources[split]), split)
        num_read = len(table.frame)
        frame = table.frame
        for condition in self.conditions:
            frame = frame[condition.met_by(Table(table.source, frame))]
        counts.update(rows_read=num_read, rows_filtered=num_read - len(frame))
        if frame.empty:
            raise DataError(
                f"{table.source}: none of the {num_read} rows meets {' and '.join(map(str, self.conditions))}."
            )
        return self.rows_from(Table(table.source, frame), True)

    def read_unlabelled(self) -> list[Row] | None:
        """Read the rows to predict, where they have a source of their own.

        Raises:
            DataError: The source is missing or malformed.
        """
        source = self.sources.get("predict")
        return None if source is None else self.rows_from(self.read_table(source, "predict"), False)


class TableData(TokenizedData, Generic[Row]):
    """Reads rows from tables, and encodes them with a tokenizer that a subclass loads.

    Args:
        splits: Where the rows come from and how they are divided.
        **settings: See `TokenizedData`.

    Attributes:
        rows: The rows of the splits (`train`, `val`, `test`, `predict`), in the order of their file.
        counts: What became of the rows: `rows_read`, `rows_filtered` (by conditions), `duplicates_dropped`, `train`,
            `val`, `test`, `unused`, and `leaked` (rows of sources for `val` and `test` that are like one trained on).
    """

    def __init__(self, splits: TableSplits[Row], **settings: Any) -> None:  # noqa: ANN401 - those of TokenizedData
        super().__init__(**settings)
        self.rows: dict[str, list[Row]] = {}
        self._splits = splits

    def prepare_data(self) -> None:
        """Download Hub data sets, in one process."""
        for role, source in self._splits.sources.items():
            if source is not None and is_hub_name(source):
                self._splits.read_table(source, role)

    @property
    def _splits_read(self) -> Collection[str]:
        return self.rows

    def _read(self) -> None:
        rows, counts = self._splits.load()
        self.fingerprint = fingerprint_of(rows)
        unlabelled = self._splits.read_unlabelled()
        if unlabelled is not None or "test" in rows:
            rows["predict"] = rows["test"] if unlabelled is None else unlabelled
        self._check_rows(rows)
        self.rows, self.counts = rows, counts
        rank_zero_info(
            f"Data: {counts['rows_read']} rows read, {counts.get('rows_filtered', 0)} filtered out by where, "
            f"{counts['duplicates_dropped']} duplicates dropped; "
            f"{counts['train']} train, {counts['val']} val, {counts['test']} test, {counts['unused']} not used."
        )

    def _check_rows(self, rows: Mapping[str, list[Row]]) -> None:
        """Refuse rows that do not fit together; a subclass says which."""


def usual_sizes(sources: Mapping[str, str | None], sizes: Mapping[str, Size | None]) -> dict[str, Size | None]:
    """Return the sizes of splits, a tenth for validation and test rows that have neither size nor source.

    Example:
        >>> usual_sizes({"train": "a", "val": None, "test": "b"}, {"train": None, "val": None, "test": None})
        {'train': None, 'val': 0.1, 'test': None}
    """
    return {
        split: 0.1 if size is None and split != "train" and sources[split] is None else size
        for split, size in sizes.items()
    }
