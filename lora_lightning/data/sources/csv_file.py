"""CSV and TSV files, read as text: cells are not converted."""

from __future__ import annotations

import csv
import itertools
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from lora_lightning.data.notices import warn
from lora_lightning.data.sources.record import Broken, ReadSettings, Record
from lora_lightning.data.sources.tables import named_apart
from lora_lightning.data.sources.text import Undecoded, kind_of_file, text_lines
from lora_lightning.errors import ConfigError, DataError

_Row = tuple[int, list[str]]
"""The line in which a row begins, and its cells."""
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
# A quotation mark that is never closed would otherwise be searched for to the end of the file, from every such mark.
_LONGEST_ROW = 1 << 24


def read_csv(path: Path, name: str, settings: ReadSettings) -> Iterator[Record | Broken]:
    """Read the rows of a file one by one; `number` is the line in which a row begins.

    Raises:
        ConfigError: The separator is not a single character.
        DataError: The file is empty, is not in the encoding, or has a broken line of column names.
    """
    csv.field_size_limit(sys.maxsize)
    separator = settings.separator or _SEPARATORS[kind_of_file(path)]
    if len(separator) != 1 or separator in '"\r\n':
        raise ConfigError(f"separator is {separator!r}: expected one character, such as a comma or a semicolon.")
    rows = _rows(text_lines(path, name, settings.encoding), separator, name)
    columns = _column_names(next(rows, None), name)
    has_warned = False
    for row in rows:
        if isinstance(row, Broken):
            yield row
            continue
        number, cells = row
        place = f"{name}, line {number}"
        if len(cells) > len(columns):
            error = DataError(
                f"{place}: expected {len(columns)} fields, as the first line has, and found {len(cells)}. Check for a "
                "separator that is not in quotation marks."
            )
            yield Broken(error, separator.join(cells))
            continue
        if not has_warned and _hides_rows(cells, separator, len(columns)):
            has_warned = True
            warn(
                f"{place}: a quoted text holds lines that look like rows of their own; check that its quotation mark "
                "is closed where it should be."
            )
        yield Record(name, number, "line", dict(zip(columns, cells, strict=False)))


def _column_names(first: _Row | Broken | None, name: str) -> list[str]:
    if first is None:
        raise DataError(f"{name} is empty: it has not even a line with column names.")
    if isinstance(first, Broken):
        raise first.error
    _, cells = first
    return named_apart([cell.strip() for cell in cells])


def _rows(lines: Iterator[str], separator: str, name: str) -> Iterator[_Row | Broken]:
    """Return the rows; a broken one ends with its first line."""
    ahead = deque[str]()
    of_row: list[str] = []
    number = 1
    reader = csv.reader(_noted(lines, ahead, of_row), delimiter=separator, strict=True)
    while True:
        of_row.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Broken(_malformed(name, number, str(error)), of_row[0])
            number += 1
            ahead.extendleft(reversed(of_row[1:]))
            # A reader that has failed may keep what it has read of the row.
            reader = csv.reader(_noted(lines, ahead, of_row), delimiter=separator, strict=True)
            continue
        if cells is None:
            return
        undecoded = next((line for line in of_row if isinstance(line, Undecoded)), None)
        if undecoded is not None:
            yield Broken(undecoded.error, "".join(of_row))
            number += len(of_row)
            continue
        # A line with a separator, or with an empty field in quotation marks, is a row.
        is_blank = len(cells) < 2 and not "".join(of_row).strip()
        if not is_blank:
            yield number, cells
        number += len(of_row)


def _noted(lines: Iterator[str], ahead: deque[str], of_row: list[str]) -> Iterator[str]:
    """Return the lines read ahead and then the others; collect the lines of the current row in `of_row`."""
    length = 0
    while (line := ahead.popleft() if ahead else next(lines, None)) is not None:
        length = length + len(line) if of_row else len(line)
        of_row.append(line)
        if length > _LONGEST_ROW:
            raise csv.Error("unexpected end of data")
        yield line


def _malformed(name: str, line: int, reason: str) -> DataError:
    if "unexpected end" in reason:
        what = "a quotation mark that opens a field is not closed"
    elif "expected after" in reason:
        what = "text follows the quotation mark that closes a field"
    elif "new-line character" in reason:
        return DataError(
            f"{name}, line {line}: a carriage return stands in a field that is not quoted. Quote such a field, and "
            "let lines end with a line feed."
        )
    else:
        what = reason
    return DataError(
        f"{name}, line {line}: {what}. Write a quotation mark inside a quoted field twice, and quote a field that "
        "holds a separator or begins with a quotation mark."
    )


def _hides_rows(cells: list[str], separator: str, num_columns: int) -> bool:
    """Return whether at least two lines inside a cell have as many separators as a row."""
    inner = itertools.chain.from_iterable(cell.split("\n")[1:] for cell in cells if "\n" in cell)
    return num_columns > 1 and sum(line.count(separator) == num_columns - 1 for line in inner) >= 2
