"""Conditions on records, such as `confidence >= 0.6`: a column, an operator, a value, and nothing else."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_lightning.errors import ConfigError

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
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
    """One condition; a record whose cell is missing, or is not of the value's kind, does not meet it.

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

    def met_by(self, fields: Mapping[str, Any]) -> bool | None:
        """Return whether a record meets the condition; None if its cell cannot be compared with the value.

        Example:
            >>> Condition("score", ">", 1.0).met_by({"score": "2"})
            True
        """
        cell = fields.get(self.column)
        comparable = None if is_missing(cell) else self._comparable(cell)
        return None if comparable is None else _OPERATORS[self.symbol](comparable, self.value)

    def _comparable(self, cell: object) -> float | str | bool | None:
        if isinstance(self.value, str):
            return str(cell)
        if isinstance(self.value, bool):
            return {"true": True, "false": False}.get(str(cell).lower())
        return number_of(cell)

    @property
    def kind(self) -> str:
        """What cells the condition can be met by, for messages."""
        if isinstance(self.value, str):
            return "a text"
        return "true or false" if isinstance(self.value, bool) else "a number"


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


def is_missing(cell: object) -> bool:
    """Return whether a cell holds nothing: null, NaN, or only white space.

    Example:
        >>> [is_missing(cell) for cell in ("a", " ", None, 0, float("nan"))]
        [False, True, True, False, True]
    """
    if isinstance(cell, str):
        return not cell.strip()
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def number_of(cell: object) -> float | None:
    """Return a cell as a number; None if it is none."""
    if not isinstance(cell, str | int | float):
        return None
    try:
        return float(cell)
    except ValueError:
        return None
