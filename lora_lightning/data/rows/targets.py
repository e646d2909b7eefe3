"""Targets of texts: one label, several labels, or numbers, from the label cells of a record."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.errors import ConfigError, DataError

PROBLEMS = ("single_label", "multi_label", "regression")
SEPARATORS = (";", "|", ",")
"""What separates the labels in a text, where `label_separator` does not say."""

Target = str | float | list[str] | list[float]

_MAX_LABEL_LENGTH = 200
_MAX_LABELS = 100
_MAX_SHOWN = 5
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def targets_from(
    fields: Mapping[str, Any], columns: str | Sequence[str], problem: str, separator: str | None, place: str
) -> Target | None:
    """Return the target of a record.

    Args:
        fields: The fields of the record.
        columns: The column with the labels. A list of columns: `multi_label` takes each as 0 or 1 for the label of the
            column's name, `regression` takes each as one number.
        problem: `single_label`, `multi_label` or `regression`.
        separator: See `label_of`.
        place: Where the record stands, for messages.

    Returns:
        A label, a list of labels, a number or a list of numbers; None if a cell is missing.

    Raises:
        ConfigError: Several columns are named for `single_label`.
        DataError: A cell holds something else than the problem needs.

    Example:
        >>> targets_from({"toxic": 1, "spam": "0"}, ["toxic", "spam"], "multi_label", None, "a.csv, row 1")
        ['toxic']
    """
    if isinstance(columns, str):
        return label_of(fields.get(columns), place, columns, problem, separator)
    if problem == "regression":
        numbers = [number_of(fields.get(column), place, column) for column in columns]
        present = [number for number in numbers if number is not None]
        return present if len(present) == len(numbers) else None
    if problem == "multi_label":
        flags = {column: _flag_of(fields.get(column), place, column) for column in columns}
        return None if None in flags.values() else [column for column, flag in flags.items() if flag]
    raise ConfigError(
        f"label_column names several columns ({', '.join(columns)}), which needs `problem: multi_label` (columns of 0 "
        "and 1) or `problem: regression`. Name one column, or set `problem`."
    )


def label_of(
    cell: object, place: str, column: str, problem: str = "single_label", separator: str | None = None
) -> Target | None:
    """Return the target that one cell holds.

    Args:
        cell: The cell.
        place: Where its record stands, for messages.
        column: The name of its column.
        problem: `single_label`: a text, a whole number, or true or false. `multi_label`: a list of these, or a text
            with a separator. `regression`: a number, or a text that is one.
        separator: What separates several labels in a text; None takes the one of `;`, `|` and `,` that occurs in it.

    Returns:
        A label, a list of labels (possibly empty), or a number. None if the cell is missing: None, NaN, or an empty
        text, which for `multi_label` is a row without labels.

    Raises:
        DataError: The cell holds something else.

    Example:
        >>> label_of(1, "a.jsonl, line 1", "label"), label_of("a; b", "a.csv, row 1", "label", "multi_label")
        ('1', ['a', 'b'])
    """
    if problem == "regression":
        return number_of(cell, place, column)
    if problem == "multi_label":
        return _labels_of(cell, place, column, separator)
    if isinstance(cell, list | tuple):
        raise DataError(
            f"{place}: the column {column!r} holds a list ({_short(cell)}); expected one label. If a text may have "
            "several labels, set `problem: multi_label`."
        )
    return _name_of(cell, place, column)


def number_of(cell: object, place: str, column: str) -> float | None:
    """Return the number that a cell of `regression` holds; None if it is missing.

    Raises:
        DataError: The cell holds no finite number.
    """
    if _is_missing(cell):
        return None
    is_number = isinstance(cell, int | float) and not isinstance(cell, bool)
    is_numeric_text = isinstance(cell, str) and _NUMBER.fullmatch(cell.strip()) is not None
    if is_number or is_numeric_text:
        number = _to_float(cell)
        if math.isfinite(number):
            return number
    raise DataError(
        f"{place}: the column {column!r} holds {_short(cell)}, which is no finite number; `problem: regression` needs "
        "one, such as 3.5 (with a decimal point). Correct the row, or set `problem: single_label`."
    )


def check_single_labels(
    label_counts: Mapping[str, int], source: str, label_names_given: bool, num_rows: int | None = None
) -> None:
    """Check that the labels of a whole data set look like one class for each text.

    Labels that seem to hold several classes are warned of.

    Args:
        label_counts: How many rows each label has.
        source: Where they come from, for messages.
        label_names_given: Whether `label_names` confirms that the labels are classes; then nothing is checked.
        num_rows: The number of rows; None takes the sum of the counts.

    Raises:
        DataError: The labels look like scores, or `check_num_labels` refuses them.
    """
    if label_names_given:
        return
    if _are_scores(label_counts):
        raise DataError(
            f"{source}: the labels look like scores, not like classes ({_some(label_counts)}). Set `problem: "
            "regression` to predict the numbers, or list them in `label_names` if they are classes."
        )
    several = _several_labels(label_counts)
    if several is not None:
        rank_zero_warn(
            f"{source}: labels such as {several!r} look like several labels in one, and each is taken as a class of "
            "its own. Set `problem: multi_label` if they are several."
        )
        return  # combinations of labels may be many
    check_num_labels(label_counts, source, num_rows)


def check_num_labels(label_counts: Mapping[str, int], source: str, num_rows: int | None = None) -> None:
    """Refuse labels that hardly ever occur twice: more than 100 of them, and more than one for each second row.

    Args:
        label_counts: How many rows each label has.
        source: Where they come from, for messages.
        num_rows: The number of rows; None takes the sum of the counts.

    Raises:
        DataError: There are too many labels.
    """
    total = sum(label_counts.values()) if num_rows is None else num_rows
    num_labels = len(label_counts)
    if num_labels > _MAX_LABELS and 2 * num_labels > total:
        raise DataError(
            f"{source}: {total:,} rows have {num_labels:,} different labels ({_some(label_counts)}), so that "
            "`label_column` probably names the wrong column. Name the column with the classes, or list them in "
            "`label_names`."
        )


# Single cells.


def _labels_of(cell: object, place: str, column: str, separator: str | None) -> list[str] | None:
    """Return the labels of a `multi_label` cell without repetitions, in their order."""
    if isinstance(cell, str):
        parts: Sequence[object] = _parts_of(cell.strip(), place, column, separator)
    elif isinstance(cell, list | tuple):
        parts = cell
    elif _is_missing(cell):
        return None
    else:
        parts = [cell]
    names = [_name_of(part, place, column) for part in parts]
    if None in names and not isinstance(cell, str):
        raise DataError(
            f"{place}: the column {column!r} holds a list with an empty label ({_short(cell)}); expected texts, whole "
            "numbers, or true or false. Remove the empty one."
        )
    return list(dict.fromkeys(name for name in names if name is not None))


def _parts_of(text: str, place: str, column: str, separator: str | None) -> Sequence[object]:
    """Split a text into labels; a text in brackets is a list written as text."""
    if separator is not None:
        return text.split(separator)
    if _is_bracketed(text):
        return _parse_list(text, place, column)
    found = [one for one in SEPARATORS if one in text]
    if len(found) > 1:
        raise DataError(
            f"{place}: the column {column!r} holds {_short(text)}, in which {' or '.join(map(repr, found))} may "
            "separate the labels. Set `label_separator` to the one that does."
        )
    return text.split(found[0]) if found else [text]


def _parse_list(text: str, place: str, column: str) -> Sequence[object]:
    """Parse a list as JSON or Python writes it."""
    for parse in (json.loads, ast.literal_eval):
        # Python joins neighbouring texts: "['a' 'b']", as numpy writes two labels, would become one.
        if parse is ast.literal_eval and re.search(r"['\"]\s*['\"]", text.replace("''", "").replace('""', "")):
            break
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list):
            return value
    raise DataError(
        f"{place}: the column {column!r} holds {_short(text)}, which begins like a list and is none; expected JSON "
        'such as ["a", "b"], or labels separated by ; or |. If the brackets belong to a name, set `label_separator`.'
    )


def _name_of(cell: object, place: str, column: str) -> str | None:
    """Return the name of one label; None if it is missing."""
    if _is_missing(cell):
        return None
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # pandas turns whole numbers into floats in a column with gaps
    if not isinstance(cell, str | bool | int | float) or cell in (math.inf, -math.inf):
        raise DataError(
            f"{place}: the column {column!r} holds a {type(cell).__name__} ({_short(cell)}); expected a label: a text, "
            "a whole number, or true or false."
        )
    name = str(cell).strip()
    if len(name) > _MAX_LABEL_LENGTH:
        raise DataError(
            f"{place}: the column {column!r} holds a text of {len(name)} characters ({_short(name)}), and a label has "
            f"at most {_MAX_LABEL_LENGTH}. `label_column` probably names the wrong column; name that of the labels."
        )
    return name


def _flag_of(cell: object, place: str, column: str) -> bool | None:
    """Return whether the label of a column of 0 and 1 applies; None if the cell is missing."""
    if _is_missing(cell):
        return None
    flag = _FLAGS.get(str(cell).strip().lower())
    if flag is None:
        raise DataError(
            f"{place}: the column {column!r} holds {_short(cell)}; with several columns in `label_column`, each must "
            "hold 0 or 1, or true or false."
        )
    return flag


def _is_missing(cell: object) -> bool:
    if isinstance(cell, str):
        return not cell.strip()
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _to_float(cell: object) -> float:
    """Return a number as float; infinity if it is too large for one."""
    try:
        return float(str(cell))
    except OverflowError:
        return math.inf


def _short(cell: object) -> str:
    return repr(cell)[:60]


# Whole data sets.


def _are_scores(labels: Mapping[str, int]) -> bool:
    """Return whether all labels are numbers, and at least one is written with a decimal point or an exponent."""
    are_numbers = all(_NUMBER.fullmatch(name) for name in labels)
    return are_numbers and any(not name.lstrip("+-").isdigit() for name in labels)


def _several_labels(labels: Mapping[str, int]) -> str | None:
    """Return a label that looks like several; None if there is none.

    Its parts are labels elsewhere, or it is a list written as text, or several rows have `;` or `|`.
    """
    num_rows = dict.fromkeys(SEPARATORS, 0)
    for name, count in labels.items():
        if _is_bracketed(name) and "," in name:
            return name
        for separator in SEPARATORS:
            parts = [part.strip() for part in name.split(separator)]
            if len(parts) == 1 or "" in parts:
                continue
            num_rows[separator] += count
            is_sure = separator != "," and num_rows[separator] > 1
            if is_sure or all(part in labels for part in parts):
                return name
    return None


def _is_bracketed(text: str) -> bool:
    return text.startswith("[") and text.endswith("]")


def _some(names: Mapping[str, int]) -> str:
    shown = [name[:40] for name in list(names)[:_MAX_SHOWN]]
    return ", ".join(shown) + (", …" if len(names) > _MAX_SHOWN else "")
