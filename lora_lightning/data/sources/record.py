"""A record as it stands in its source, and how files are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_lightning.errors import DataError

Source = Any
"""A path, a list of paths, a glob, a Hub name; a `pandas.DataFrame`, a `datasets.Dataset` or a list of dicts."""
OnBad = Callable[[DataError, str], None]
"""Takes the error of a broken record, and its text."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record and where it stands.

    Args:
        source: The file, as messages name it.
        number: Its line, row or entry, from 1.
        unit: Which of these.
        fields: Its fields, in plain types.
    """

    source: str
    number: int
    unit: str
    fields: Mapping[str, Any]

    @property
    def place(self) -> str:
        """Where the record stands, as messages begin."""
        return f"{self.source}, {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Broken:
    """A record that cannot be read.

    Args:
        error: What is wrong with it, and where it stands.
        text: What stands there.
    """

    error: DataError
    text: str


Found = Record | Broken | Callable[[], Record | Broken]
"""What a reader gives for each record in turn; what is parsed only if it is called costs little if it is not wanted."""


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """How sources are read.

    Args:
        encoding: Encoding of text files.
        separator: What separates the fields of a CSV or TSV file; None means a comma and a tab.
        subset: The configuration of a Hub data set that has several.
        text_column: The name that the texts of a folder are given.
        label_column: The name that the classes of a folder are given.
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
