"""Values of a record: their location, and how texts, lists and JSON strings are read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_lightning.data.rows.cells import is_empty
from lora_lightning.errors import DataError


@dataclass(frozen=True)
class Context:
    """Location of a value in a record, and the fields of the record that are ignored.

    Args:
        place: Location of the value, as messages begin.
        path: Its path in the record, such as `messages[]`; empty for the record itself.
        ignored: Takes the paths of fields that nothing uses. All contexts of a record share it.
    """

    place: str
    path: str = ""
    ignored: set[str] = field(default_factory=set)

    def inside(self, part: str, name: str) -> Context:
        """Return the context of a part of this value: what messages call it, and its name among the fields."""
        return replace(self, place=f"{self.place}, {part}", path=self._path_of(name))

    def ignore(self, names: Iterable[object]) -> None:
        """Note fields of this value that nothing uses; empty fields do not count."""
        if isinstance(names, Mapping):
            names = [name for name, value in names.items() if not is_empty(value)]
        self.ignored.update(map(self._path_of, names))

    def error(self, message: str) -> DataError:
        """Return an error that begins with the place."""
        return DataError(f"{self.place}: {message}")

    def _path_of(self, name: object) -> str:
        return f"{self.path}.{name}" if self.path else str(name)


def present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that have a value: one of None is absent."""
    return {name: value for name, value in fields.items() if value is not None}


def take_first(fields: dict[str, Any], *names: str) -> Any:  # noqa: ANN401 - whatever the record holds
    """Remove the first of some fields that is present and return its value, or None."""
    name = next((name for name in names if name in fields), "")
    return fields.pop(name, None)


def text_from(value: object, name: str, at: Context) -> str:
    """Return a text; None is an empty one, and a list of text parts is joined.

    Raises:
        DataError: The value, or one of its parts, is not a text.
    """
    if isinstance(value, list):
        parts = enumerate(value, start=1)
        value = "".join(_part(part, at.inside(f"part {number}", f"{name}[]")) for number, part in parts)
    value = "" if value is None else value
    if not isinstance(value, str):
        raise at.error(f"{name} must be a text, got {type(value).__name__} ({shown(value)}).")
    return value


def list_from(value: object, name: str, of: str, at: Context) -> Sequence[Any]:
    """Return a list, also one that is given as JSON, as in a cell of a CSV file; empty for None or a blank text.

    Raises:
        DataError: The value is not a list.
    """
    expected = f"{name} must be a list of {of}"
    value = from_json(value, expected, at) or ()
    if not isinstance(value, list | tuple):
        raise at.error(f"{expected}, got {shown(value)}.")
    return value


def from_json(value: object, expected: str, at: Context) -> Any:  # noqa: ANN401 - whatever the text holds
    """Return what a text holds as JSON, None for a blank one; any other value is returned as it is.

    Raises:
        DataError: The text is not valid JSON; the message begins with what is expected.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise at.error(f"{expected}, got {shown(value)}, which is not valid JSON.") from error


def shown(value: object) -> str:
    """Return the beginning of a value, for messages."""
    return repr(str(value)[:40])


def names_of(fields: Mapping[str, Any]) -> str:
    """Return the names of the fields, for messages."""
    names = ", ".join(list(map(str, fields))[:12])
    return f"the fields {names}" if names else "no fields"


def _part(part: object, at: Context) -> str:
    """Return the text of a content part."""
    left = present(part) if isinstance(part, Mapping) else {}
    kind, text = left.pop("type", "text"), left.pop("text", None)
    media = [name for name in left if name.startswith(("image", "audio", "video", "input_"))]
    if kind != "text" or media or not isinstance(text, str):
        other = kind if kind != "text" else next(iter(media), str(part)[:40])
        raise at.error(
            f"content of the type {other!r} cannot be learnt; expected text parts only, such as "
            '{"type": "text", "text": "..."}.'
        )
    at.ignore(left)
    return text
