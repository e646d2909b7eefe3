"""Conditions on rows, such as `confidence >= 0.6`: a column, an operator, a value, and nothing else."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_lightning.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

    from lora_lightning.data.tables import Table

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*(`[^`]+`|[^\s`'\"<>=!]+)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_FORM = (
    "expected a column, one of <= >= == != < >, and a number, a quoted text, true or false, "
    'such as "confidence >= 0.6" or "lang == \'en\'"'
)


@dataclass(frozen=True)
class Condition:
    """One condition; a row whose cell is missing, or is not of the value's kind, does not meet it.

    Args:
        column: Name of the column.
        symbol: The operator as written.
        value: What the cells are compared with; its type says how they are read.
    """

    column: str
    symbol: str
    value: float | str | bool

    def __str__(self) -> str:
        """Write the condition as in a settings file."""
        return f"{self.column} {self.symbol} {self.value!r}"

    def met_by(self, table: Table) -> npt.NDArray[np.bool_]:
        """Tell for each row of a table whether it meets the condition.

        Raises:
            DataError: The column is missing, or none of its cells is of the value's kind.
        """
        cells = table.column(self.column, "where")
        cells = cells[~missing(cells)]
        met = _comparable(cells, self.value)
        if len(cells) and met.empty:
            kind = "true or false" if isinstance(self.value, bool) else "a number"
            raise DataError(
                f"{table.source}: the condition '{self}' cannot be met: no cell of the column is {kind} "
                f"(the first is {str(cells.iloc[0])[:40]!r})."
            )
        met = _OPERATORS[self.symbol](met, self.value)
        return np.asarray(met.reindex(table.frame.index, fill_value=False), dtype=bool)


def parse_condition(text: str) -> Condition:
    """Read a condition as written in a settings file.

    Args:
        text: `column operator value`. A column whose name has spaces or signs stands in backquotes, a text in quotes.

    Raises:
        ConfigError: It is written in another way.

    Example:
        >>> parse_condition("confidence >= 0.6")
        Condition(column='confidence', symbol='>=', value=0.6)
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ConfigError(f"The condition {text!r} in where cannot be read: {_FORM}.")
    column, symbol, literal = match[1].strip("`"), match[2], match[3]
    if _NUMBER.fullmatch(literal):
        return Condition(column, symbol, float(literal))
    quoted = _QUOTED.fullmatch(literal)
    if quoted is None and literal.lower() not in ("true", "false"):
        hint = f" Put a text in quotes: {column} {symbol} '{literal}'." if literal.isidentifier() else ""
        raise ConfigError(f"The value {literal!r} in the condition {text!r} cannot be read: {_FORM}.{hint}")
    if symbol not in ("==", "!="):
        raise ConfigError(f"The condition {text!r} compares by {symbol}, which takes a number without quotes.")
    return Condition(column, symbol, (quoted[1] or quoted[2] or "") if quoted else literal.lower() == "true")


def missing(cells: pd.Series[Any]) -> pd.Series[bool]:
    """Tell for each cell whether it holds nothing: null, NaN, or only white space.

    Example:
        >>> import pandas as pd
        >>> missing(pd.Series(["a", " ", None, 0])).tolist()
        [False, True, True, False]
    """
    return cells.isna() | cells.map(lambda cell: isinstance(cell, str) and not cell.strip()).astype(bool)


def _comparable(cells: pd.Series[Any], value: float | str | bool) -> pd.Series[Any]:
    """Return the cells that are of a value's kind, as that kind."""
    import pandas as pd

    if isinstance(value, str):
        return cells.map(str)
    if isinstance(value, bool):
        words = cells.map(lambda cell: str(cell).lower())
        return words[words.isin(["true", "false"])] == "true"
    return pd.to_numeric(cells, errors="coerce").dropna()
