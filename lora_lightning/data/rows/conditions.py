"""Conditions on records, such as `confidence >= 0.6`: a column, an operator, a value, and nothing else."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_lightning.data.rows.cells import is_missing, number_of
from lora_lightning.errors import ConfigError

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_TRUTH = {"true": True, "false": False}
_READ_AS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bool: ("true or false", lambda cell: _TRUTH.get(str(cell).lower())),
    float: ("a number", number_of),
    str: ("a text", str),
}
"""How cells are read for a value of each type: what they must be, and its reader, which returns None for others."""

_CONDITION = re.compile(r"\s*(`[^`]+`|[^\s`'\"<>=!]+)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


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

    @property
    def kind(self) -> str:
        """What cells the condition can be met by, for messages."""
        return _READ_AS[type(self.value)][0]

    def met_by(self, fields: Mapping[str, Any]) -> bool | None:
        """Return whether a record meets the condition; None if its cell cannot be compared with the value.

        Example:
            >>> Condition("score", ">", 1.0).met_by({"score": "2"})
            True
        """
        cell = fields.get(self.column)
        _, read = _READ_AS[type(self.value)]
        comparable = None if is_missing(cell) else read(cell)
        return None if comparable is None else _OPERATORS[self.symbol](comparable, self.value)


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
        raise _unreadable(f"The condition {text!r} in where")
    column, symbol, literal = match[1].strip("`"), match[2], match[3]
    value = _value_of(literal)
    if value is None:
        hint = f" Put a text in quotes: {column} {symbol} '{literal}'." if literal.isidentifier() else ""
        raise _unreadable(f"The value {literal!r} in the condition {text!r}", hint)
    if not isinstance(value, float) and symbol not in ("==", "!="):
        raise ConfigError(f"The condition {text!r} compares by {symbol}, which takes a number without quotes.")
    return Condition(column, symbol, value)


def _value_of(literal: str) -> float | str | bool | None:
    if _QUOTED.fullmatch(literal):
        return literal[1:-1]
    number = number_of(literal)
    if number is not None and math.isfinite(number):
        return number
    return _TRUTH.get(literal.lower())


def _unreadable(what: str, hint: str = "") -> ConfigError:
    return ConfigError(
        f"{what} cannot be read: expected a column, one of {' '.join(_OPERATORS)}, and a number, a quoted text, true "
        f'or false, such as "confidence >= 0.6" or "lang == \'en\'".{hint}'
    )
