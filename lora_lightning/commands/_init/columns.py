"""The columns of a sample."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_lightning.data.rows.cells import is_bracketed, is_integer, is_missing, number_of, parsed_list


def words(text: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(text.split())


_FLAGS = {"0", "1", "true", "false", "0.0", "1.0"}
_NO_CONTENT = words(
    "id ids idx index uid uuid guid url link date time datetime timestamp created updated unnamed row user username "
    "author column"
)
"""Words in the names of columns that do not hold a text's class."""
_MOSTLY = 0.9


@dataclass(frozen=True)
class Column:
    """The cells of a column.

    Args:
        name: Its name.
        cells: The value in each row, None if missing; lists that are written as text are lists.
    """

    name: str
    cells: list[Any]

    @cached_property
    def filled(self) -> list[Any]:
        """The cells that hold something."""
        return [cell for cell in self.cells if not is_missing(cell)]

    @cached_property
    def counts(self) -> Counter[str]:
        """Number of occurrences of each value."""
        return Counter(str(cell).strip() for cell in self.filled)

    @property
    def words(self) -> set[str]:
        """The words of its name in small letters."""
        return set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", self.name).lower()))

    @cached_property
    def is_text(self) -> bool:
        """Whether it holds texts other than numbers."""
        texts = [cell for cell in self.filled if isinstance(cell, str)]
        numbers = sum(number_of(text) is not None for text in texts)
        return len(texts) > _MOSTLY * len(self.filled) and numbers < (1 - _MOSTLY) * max(len(texts), 1)

    @cached_property
    def are_numbers(self) -> bool:
        """Whether every cell is a number, or a text that is one."""
        values = [cell for cell in self.filled if not isinstance(cell, bool)]
        return bool(values) and all(
            isinstance(cell, str | int | float) and number_of(cell) is not None for cell in values
        )

    @property
    def are_whole(self) -> bool:
        """Whether every cell is a whole number."""
        return self.are_numbers and all(is_integer(value.removesuffix(".0")) for value in self.counts)

    @property
    def are_flags(self) -> bool:
        """Whether every cell is 0 or 1, or true or false."""
        return bool(self.filled) and {value.lower() for value in self.counts} <= _FLAGS

    @property
    def are_lists(self) -> bool:
        """Whether every cell is a list of texts or numbers."""
        return bool(self.filled) and all(_is_plain_list(cell) for cell in self.filled)

    @property
    def is_content(self) -> bool:
        """Whether its name does not mark it as an index, a date or an address of the row."""
        return not self.words & _NO_CONTENT

    @property
    def mean_length(self) -> float:
        """Characters of a cell, on average."""
        return sum(len(str(cell)) for cell in self.filled) / max(len(self.filled), 1)

    @property
    def mean_words(self) -> float:
        """Words of a cell, on average."""
        return sum(len(str(cell).split()) for cell in self.filled) / max(len(self.filled), 1)

    @property
    def share_different(self) -> float:
        """Different values for each cell that holds something."""
        return len(self.counts) / max(len(self.filled), 1)


def columns_of(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Column]:
    """Return the columns of records that hold something.

    Args:
        records: The fields of rows.
        names: The names of their columns.
    """
    columns = [Column(name, [_unfolded(record.get(name)) for record in records]) for name in names]
    return [column for column in columns if column.filled]


def _unfolded(cell: Any) -> Any:  # noqa: ANN401 - whatever a table holds
    """Return a list that is written as text as a list, any other cell as it is."""
    if isinstance(cell, str) and is_bracketed(cell.strip()):
        listed = parsed_list(cell.strip())
        return cell if listed is None else listed
    return cell


def _is_plain_list(cell: Any) -> bool:  # noqa: ANN401 - whatever a table holds
    return isinstance(cell, list) and all(isinstance(one, str | int | float) for one in cell)
