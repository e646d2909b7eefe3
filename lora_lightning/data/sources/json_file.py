"""JSON files: one object a line, or one array of objects."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lightning.data.sources.record import OnBad, ReadSettings, Record, Takes
from lora_lightning.data.sources.text import text_lines
from lora_lightning.errors import DataError


def read_json(path: Path, name: str, settings: ReadSettings, on_bad: OnBad, takes: Takes) -> Iterator[Record]:
    """Read the objects of a file; only an array is read as a whole. Lines that are not wanted are not parsed.

    Raises:
        DataError: An array is no valid JSON.
    """
    numbered = enumerate(text_lines(path, name, settings.encoding), start=1)
    filled = ((number, line) for number, line in numbered if line.strip())
    first = next(filled, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        # Empty lines are kept, so that an error has its line.
        text = "\n" * (first[0] - 1) + first[1] + "".join(line for _, line in numbered)
        for number, entry in enumerate(_parse(text, name, 1), start=1):
            if takes():
                yield from _record(entry, name, number, "entry", on_bad)
        return
    for number, line in itertools.chain([first], filled):
        if not takes():
            continue
        try:
            value = _parse(line.strip(), name, number)
        except DataError as error:
            on_bad(error, line)
            continue
        yield from _record(value, name, number, "line", on_bad)


def _record(value: object, name: str, number: int, unit: str, on_bad: OnBad) -> Iterator[Record]:
    if isinstance(value, dict):
        yield Record(name, number, unit, value)
        return
    error = DataError(f'{name}, {unit} {number}: expected an object such as {{"text": ...}}, got {str(value)[:40]!r}.')
    on_bad(error, json.dumps(value))


def _parse(text: str, name: str, line: int) -> Any:  # noqa: ANN401 - whatever stands there
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}, line {line + error.lineno - 1}: this is no valid JSON ({error.msg}, column {error.colno}); "
            "expected one object a line."
        ) from error
    except RecursionError as error:
        raise DataError(f"{name}, line {line}: nested too deeply to be a record.") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{name}, line {line}: this cannot be read as JSON ({error}).") from error
