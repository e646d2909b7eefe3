"""Records of sources, and settings for reading files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_lightning.errors import DataError

Source = Any
"""A path, a list of paths, a glob, a Hub name; a `pandas.DataFrame`, a `datasets.Dataset` or a list of dicts."""
OnBad = Callable[[DataError, str], None]
"""Called with the error of a broken record, and its text."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record and its location.

    Args:
        source: Name of the file in messages.
        number: Its line, row or entry, from 1.
        unit: What `number` counts.
        fields: Its fields, in plain types.
    """

    source: str
    number: int
    unit: str
    fields: Mapping[str, Any]

    @property
    def place(self) -> str:
        """Location of the record, as messages begin."""
        return f"{self.source}, {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Broken:
    """A record that cannot be read.

    Args:
        error: The error with its location.
        text: The text of the record.
    """

    error: DataError
    text: str


Found = Record | Broken | Callable[[], Record | Broken]
"""The result of a reader for each record; a function parses the record only if it is called."""


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """Settings for reading sources.

    Args:
        encoding: Encoding of text files.
        separator: What separates the fields of a CSV or TSV file; None means a comma and a tab.
        subset: The configuration of a Hub data set that has several.
        text_column: Column name for the texts of a folder.
        label_column: Column name for the classes of a folder.
        conll: Whether a `.txt` file has one word a line.
        token_column: Number of the column with the words of such a file; None means 0, and 1 in a `.conllu` file.
        tag_column: Number of the column with the tags; None means the last, and 3 in a `.conllu` file.
    """

    encoding: str = "utf-8"
    separator: str | None = None
    subset: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    conll: bool = False
    token_column: int | str | None = None
    tag_column: int | str | None = None
