"""JSON files: one object a line, or one array of objects."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lightning.data.sources.record import Broken, Found, ReadSettings, Record
from lora_lightning.data.sources.text import Undecoded, checked, text_lines
from lora_lightning.errors import DataError


def read_json(path: Path, name: str, settings: ReadSettings) -> Iterator[Found]:
    """Read the objects of a file; only an array is read as a whole. Skipped lines are not parsed.

    Raises:
        DataError: An array is not valid JSON.
    """
    numbered = enumerate(text_lines(path, name, settings.encoding), start=1)
    filled = ((number, line) for number, line in numbered if line.strip())
    first = next(filled, None)
    if first is None:
        return
    number, line = first
    if line.lstrip().startswith("["):
        # Empty lines are kept, so that an error has its line.
        text = "\n" * (number - 1) + "".join(checked(itertools.chain([line], (rest for _, rest in numbered))))
        for entry, value in enumerate(_parse(text, name, 1), start=1):
            yield _record(value, name, entry, "entry")
        return
    for number, line in itertools.chain([first], filled):
        yield functools.partial(_from_line, line, name, number)


def _from_line(line: str, name: str, number: int) -> Record | Broken:
    if isinstance(line, Undecoded):
        return Broken(line.error, line)
    try:
        value = _parse(line.strip(), name, number)
    except DataError as error:
        return Broken(error, line)
    return _record(value, name, number, "line")


def _record(value: object, name: str, number: int, unit: str) -> Record | Broken:
    if isinstance(value, dict):
        return Record(name, number, unit, value)
    error = DataError(f'{name}, {unit} {number}: expected an object such as {{"text": ...}}, got {str(value)[:40]!r}.')
    return Broken(error, json.dumps(value))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; refuse duplicate keys, of which one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object; keep one of them")
    return found


def _parse(text: str, name: str, line: int) -> Any:  # noqa: ANN401 - whatever stands there
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}, line {line + error.lineno - 1}: this is not valid JSON ({error.msg}, column {error.colno}); "
            "expected one object a line."
        ) from error
    except RecursionError as error:
        raise DataError(f"{name}, line {line}: nested too deeply to be a record.") from error
    except ValueError as error:  # a number of thousands of digits, or a key that stands twice
        raise DataError(f"{name}, line {line}: this cannot be read as JSON ({error}).") from error
