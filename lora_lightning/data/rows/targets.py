"""Targets of texts: one label, several labels, or numbers, from the label cells of a record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.data.notices import warn
from lora_lightning.data.rows.cells import Cell, is_bracketed, is_missing, name_by_number, number_of, parsed_list
from lora_lightning.errors import DataError
from lora_lightning.paths import some_of

PROBLEMS = ("single_label", "multi_label", "regression")
SEPARATORS = (";", "|", ",")
"""What separates the labels in a text, where `label_separator` does not say."""

Target = str | float | list[str] | list[float]

_MAX_LABEL_LENGTH = 200
_MAX_LABELS = 100
_ONE_LABEL = (
    "expected one label: a text, a whole number, or true or false. If a text may have several labels, set `problem: "
    "multi_label`."
)
_EACH_LABEL = "expected each label as a text, a whole number, or true or false. Correct the row, or take it out."
_FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def target_of(
    cells: Sequence[Cell], problem: str, separator: str | None = None, names: Sequence[str] = ()
) -> Target | None:
    """Return the target of a record.

    Args:
        cells: The cells of its label columns. Of several, `multi_label` takes each as 0 or 1 for the label of the
            column's name, and `regression` takes each as one number.
        problem: `single_label`: one cell with a text, a whole number, or true or false. `multi_label`: a list of these,
            or a text with a separator. `regression`: a number, or a text that is one.
        separator: What separates several labels in a text; None takes the one of `;`, `|` and `,` that occurs in it.
        names: The names of the classes, where the settings have them: labels may be their numbers, and of several
            labels also a list with 0 or 1 for each class.

    Returns:
        A label, a list of labels (possibly empty), a number or a list of numbers. None if a cell is missing: None, NaN,
        or an empty text, which for `multi_label` is a row without labels.

    Raises:
        DataError: A cell holds something else than the problem needs.

    Example:
        >>> target_of([Cell("a; b", "label", "a.csv, row 1")], "multi_label")
        ['a', 'b']
        >>> target_of([Cell(1, "toxic", "a.csv, row 1"), Cell("0", "spam", "a.csv, row 1")], "multi_label")
        ['toxic']
    """
    if len(cells) == 1 and problem == "multi_label":
        return _labels_of(cells[0], separator, names)
    if any(cell.is_missing for cell in cells):
        return None
    if problem == "multi_label":
        return [cell.column for cell in cells if _flag_of(cell)]
    if problem == "regression":
        numbers = [_number_of(cell) for cell in cells]
        return numbers if len(numbers) > 1 else numbers[0]
    return name_by_number(_name_of(cells[0], _ONE_LABEL), names)


def _labels_of(cell: Cell, separator: str | None, names: Sequence[str]) -> list[str] | None:
    """Return the labels of a `multi_label` cell without repetitions, in their order."""
    if isinstance(cell.value, str):
        # An empty text, and what stands between two separators, is no label.
        parts = [part for part in _parts_of(cell, separator) if not is_missing(part)]
    elif cell.is_missing:
        return None
    else:
        parts = list(cell.value) if isinstance(cell.value, list | tuple) else [cell.value]
    flags = _flags_of(cell, parts, names)
    if flags is not None:
        return [name for name, applies in zip(names, flags, strict=True) if applies]
    found = [_name_of(one, _EACH_LABEL) for one in cell._replace(value=parts).entries()]
    return list(dict.fromkeys(name_by_number(one, names) for one in found))


def _flags_of(cell: Cell, parts: Sequence[Any], names: Sequence[str]) -> list[bool] | None:
    """Return the flags of a list that holds 0 or 1 for each class; None of a list of labels."""
    flags = [_FLAGS.get(str(part).strip().lower()) for part in parts]
    if len(parts) < 2 or None in flags or _FLAGS.keys() & set(names):
        return None
    if len(parts) == len(names):
        return list(map(bool, flags))
    if len(set(flags)) < len(flags) or any(isinstance(part, float) for part in parts):
        raise cell.refuse(
            f"it looks like 0 or 1 for each of {len(parts)} classes. Set `label_names` to the names of the classes in "
            "this order; else list the labels that apply, each once."
        )
    return None


def _parts_of(cell: Cell, separator: str | None) -> list[Any]:
    """Split a text into labels; a text in brackets is a list written as text."""
    text = cell.value.strip()
    if separator is not None:
        return text.split(separator)
    if is_bracketed(text):
        listed = parsed_list(text)
        if listed is None:
            raise cell.refuse(
                'a text in brackets must be a list, such as ["a", "b"]; else separate the labels by ; or |. If the '
                "brackets belong to a name, set `label_separator`."
            )
        return listed
    found = [one for one in SEPARATORS if one in text]
    if len(found) > 1:
        raise cell.refuse(
            f"{' or '.join(map(repr, found))} may separate the labels. Set `label_separator` to the one that does."
        )
    return text.split(found[0]) if found else [text]


def _name_of(cell: Cell, expected: str) -> str:
    """Return the name of one label."""
    value = cell.value
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas turns whole numbers into floats in a column with gaps
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if cell.is_missing or not isinstance(value, str | int | float) or not is_finite:
        raise cell.refuse(expected)
    name = str(value).strip()
    if len(name) > _MAX_LABEL_LENGTH:
        raise cell.refuse(
            f"a text of {len(name)} characters, and a label has at most {_MAX_LABEL_LENGTH}. `label_column` probably "
            "names the wrong column; name that of the labels."
        )
    return name


def _flag_of(cell: Cell) -> bool:
    """Return whether the label of a column of 0 and 1 applies."""
    flag = _FLAGS.get(str(cell.value).strip().lower())
    if flag is None:
        raise cell.refuse("with several columns in `label_column`, each must hold 0 or 1, or true or false.")
    return flag


def _number_of(cell: Cell) -> float:
    """Return the finite number that a cell holds."""
    number = None if isinstance(cell.value, bool) else number_of(cell.value)
    if number is None or not math.isfinite(number):
        raise cell.refuse(
            "`problem: regression` needs a finite number, such as 3.5 (with a decimal point). Correct the row, or set "
            "`problem: single_label`."
        )
    return number


# Whole data sets.


def check_single_labels(label_counts: Mapping[str, int], source: str, num_rows: int) -> None:
    """Check that the labels of a whole data set look like one class for each text.

    Labels that seem to hold several classes are warned of.

    Args:
        label_counts: How many rows each label has.
        source: Where they come from, for messages.
        num_rows: The number of rows.

    Raises:
        DataError: The labels look like scores; or they hardly ever occur twice: there are more than 100 of them, and
            more than one for each second row.
    """
    some, num_labels = some_of([name[:40] for name in label_counts], 5), len(label_counts)
    if _are_scores(label_counts):
        raise DataError(
            f"{source}: the labels look like scores, not like classes ({some}). Set `problem: regression` to predict "
            "the numbers, or list them in `label_names` if they are classes."
        )
    several = _several_labels(label_counts)
    if several is not None:  # their combinations may be many
        warn(
            f"{source}: labels such as {several!r} look like several labels in one, and each is taken as a class of "
            "its own. Set `problem: multi_label` if they are several."
        )
    elif num_labels > _MAX_LABELS and 2 * num_labels > num_rows:
        raise DataError(
            f"{source}: {num_rows:,} rows have {num_labels:,} different labels ({some}), so that `label_column` "
            "probably names the wrong column. Name the column with the classes, or list them in `label_names`."
        )


def _are_scores(labels: Mapping[str, int]) -> bool:
    """Return whether all labels are numbers, and at least one is written with a decimal point or an exponent."""
    numbers = [number_of(name) for name in labels]
    are_numbers = all(number is not None and math.isfinite(number) for number in numbers)
    return are_numbers and any(not name.lstrip("+-").isdigit() for name in labels)


def _several_labels(labels: Mapping[str, int]) -> str | None:
    """Return a label that looks like several; None if there is none."""
    for separator in SEPARATORS:
        split = {name: [part.strip() for part in name.split(separator)] for name in labels if separator in name}
        joined = {name: parts for name, parts in split.items() if all(parts)}
        # A comma is usual within a name: there, the parts must be labels elsewhere.
        is_usual = separator != "," and sum(labels[name] for name in joined) > 1
        for name, parts in joined.items():
            if is_usual or labels.keys() >= set(parts):
                return name
    return next((name for name in labels if is_bracketed(name) and "," in name), None)
