"""Read a table from a local file, a file inside a package, a folder of texts, or a Hub data set."""

from __future__ import annotations

import codecs
import io
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import DataError
from lora_lightning.paths import nearest, nearest_in_folder, resolve

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (*_SEPARATORS, ".jsonl", ".ndjson", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
# The names under which Hub data sets keep the rows for each use, the usual one first.
_HUB_SPLITS = {
    "train": ("train",),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test",),
    "predict": ("test",),
}


@dataclass(frozen=True)
class Table:
    """Rows as they stand in their source.

    Args:
        source: Where they come from, as messages name it.
        frame: The rows; cells of CSV files are strings, and an empty string is a missing value everywhere.
    """

    source: str
    frame: pd.DataFrame

    def column(self, name: str, setting: str) -> pd.Series[Any]:
        """Return a column.

        Args:
            name: Its name.
            setting: The setting that names it, for the message.

        Raises:
            DataError: There is no such column, or more than one; those that there are stand in the message.
        """
        columns = [str(column) for column in self.frame.columns]
        if columns.count(name) == 1:
            return self.frame[name]
        if name in columns:
            raise DataError(f"{self.source} has {columns.count(name)} columns named {name!r}; rename all but one.")
        near = nearest(name, columns, count=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if len(columns) == 1 and re.search(r"[;\t|]", columns[0]):
            hint = " It looks as if another separator is used: set separator."
        shown = ", ".join(columns[:20]) + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")
        raise DataError(f"{self.source} has no column {name!r}, which {setting} names; its columns: {shown}.{hint}")


@dataclass(frozen=True, kw_only=True)
class TableReader:
    """How tables are read.

    Args:
        text_column: The name that the texts of a folder are given.
        label_column: The name that the classes of a folder are given.
        encoding: Encoding of CSV, TSV, JSON and text files.
        separator: What separates the fields of a CSV or TSV file; None means a comma and a tab.
        subset: The configuration of a Hub data set that has several.
    """

    text_column: str = "text"
    label_column: str = "label"
    encoding: str = "utf-8"
    separator: str | None = None
    subset: str | None = None

    def read(self, source: str, role: str = "train") -> Table:
        """Read a table.

        Args:
            source: A path, a `pkg://` path, or the name of a Hub data set.
            role: `train`, `val`, `test` or `predict`: which split of a Hub data set is meant.

        Raises:
            DataError: The source is not there, cannot be read, or is empty.
        """
        frame = self._from_hub(source, role) if is_hub_name(source) else self._from_path(resolve(source), source)
        if frame.empty:
            raise DataError(f"{source} holds no rows; give a file with at least one row for each class.")
        return Table(source, frame)

    def _from_path(self, path: Path, source: str) -> pd.DataFrame:
        if path.is_dir():
            return self._from_folder(path, source)
        if not path.is_file():
            raise DataError(f"{source} does not exist; {nearest_in_folder(path)}.")
        suffix = path.suffix.lower()
        if suffix not in _SUFFIXES:
            raise DataError(
                f"{source} is of an unknown kind: expected a name that ends in {', '.join(_SUFFIXES)}, a folder with "
                "one sub-folder of .txt files for each class, or a Hub data set."
            )
        if path.stat().st_size == 0:
            raise DataError(f"{source} is empty (0 bytes).")
        if suffix == ".parquet":
            return _from_parquet(path, source)
        text = read_text(path, self.encoding, source)
        if suffix in _SEPARATORS:
            return _from_csv(text, self.separator or _SEPARATORS[suffix], source)
        return _from_json(text, source)

    def _from_folder(self, folder: Path, source: str) -> pd.DataFrame:
        import pandas as pd

        files = [
            (file, kind.name)
            for kind in sorted(folder.iterdir())
            if kind.is_dir() and not kind.name.startswith(".")
            for file in sorted(kind.glob("*.txt"))
        ]
        if not files:
            raise DataError(
                f"The folder {source} holds no texts: expected one sub-folder for each class with .txt files inside; "
                f"{nearest_in_folder(folder / 'train.csv')}."
            )
        texts = [read_text(file, self.encoding, str(file)) for file, _ in files]
        return pd.DataFrame({self.text_column: texts, self.label_column: [kind for _, kind in files]})

    def _from_hub(self, name: str, role: str) -> pd.DataFrame:
        import datasets

        rows = hub_rows(name, self.subset, role)
        frame: pd.DataFrame = rows.to_pandas()
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.ClassLabel):
                frame[column] = [_class_name(feature.names, index) for index in frame[column].tolist()]
            elif isinstance(getattr(feature, "feature", None), datasets.ClassLabel):
                names = feature.feature.names
                frame[column] = [[_class_name(names, index) for index in cell] for cell in frame[column].tolist()]
        return frame


def hub_rows(name: str, subset: str | None, role: str) -> Any:  # noqa: ANN401 - a datasets.Dataset
    """Load the rows of a Hub data set that are meant for a role.

    Args:
        name: The data set's name.
        subset: Its configuration, where it has several.
        role: `train`, `val`, `test` or `predict`.

    Raises:
        DataError: It cannot be had, or has no rows for the role.
    """
    import datasets

    try:
        splits = datasets.load_dataset(name, subset)
    except Exception as error:  # every storage and network library below raises its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"{name!r} is neither a file or folder here nor a data set that could be had from the Hub: {reason} "
            f"If a local path was meant: {nearest_in_folder(resolve(name))}."
        ) from error
    found = next((split for split in _HUB_SPLITS[role] if split in splits), None)
    if found is None:
        raise DataError(
            f"The Hub data set {name!r} has no split {_HUB_SPLITS[role][0]!r} to use for {role}; "
            f"it has: {', '.join(splits)}."
        )
    return splits[found]


def is_hub_name(source: str) -> bool:
    """Tell whether a source is meant as the name of a Hub data set: `name` or `owner/name`, and nothing local.

    Example:
        >>> is_hub_name("stanfordnlp/imdb"), is_hub_name("data/tweets.csv"), is_hub_name("./tweets")
        (True, False, False)
    """
    if not _HUB_NAME.fullmatch(source) or source.lower().endswith(_SUFFIXES):
        return False
    return not resolve(source).exists()


def read_text(path: Path, encoding: str, source: str) -> str:
    """Read a text file, line ends unchanged.

    Raises:
        DataError: The encoding is unknown, or is not the file's; those to try stand in the message.
    """
    try:
        # A mark that Excel writes in front of UTF-8 would become part of the first column's name.
        codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        raw = path.read_bytes()
        return raw.decode(codec)
    except LookupError:
        raise DataError(f"encoding {encoding!r} is unknown; try utf-8, latin-1, cp1252 or utf-16.") from None
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}.") from error
    except UnicodeError as error:
        place = getattr(error, "start", 0)
        line = raw.count(b"\n", 0, place) + 1
        others = "utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1, cp1252"
        raise DataError(
            f"{source} is not {encoding} (byte {place}, line {line}): set encoding to the file's own; try {others}."
        ) from error


def _from_csv(text: str, separator: str, source: str) -> pd.DataFrame:
    import pandas as pd

    try:
        # Without header=None, pandas takes the first column for an index when rows are longer than the header.
        # Missing values are empty strings only: "NA", "null" and "None" are fine texts and labels.
        frame = pd.read_csv(io.StringIO(text, newline=""), sep=separator, header=None, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        raise DataError(f"{source} is empty: it has not even a line with column names.") from None
    except (pd.errors.ParserError, ValueError) as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise DataError(
            f"{source} is malformed: {reason}. Check for a separator or a quotation mark that is not quoted there."
        ) from error
    names = [str(name).strip() for name in frame.iloc[0]]
    return frame.iloc[1:].reset_index(drop=True).set_axis(names, axis="columns")


def _from_json(text: str, source: str) -> pd.DataFrame:
    """Read one JSON object a line, or one array of objects."""
    import pandas as pd

    if text.lstrip().startswith("["):
        records = _parse_json(text, source)
        for number, record in enumerate(records, start=1):
            _require_object(record, f"{source}, entry {number}")
    else:
        records = []
        # Not splitlines(): it also splits at characters that JSON strings may contain.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                records.append(_parse_json(line, source, number))
                _require_object(records[-1], f"{source}, line {number}")
    return pd.DataFrame(records, dtype=object)


def _parse_json(text: str, source: str, line: int = 1) -> Any:  # noqa: ANN401 - whatever stands there
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}, line {line + error.lineno - 1}: this is no valid JSON ({error.msg}, column {error.colno}); "
            "expected one object a line."
        ) from error
    except RecursionError as error:
        raise DataError(f"{source} is nested too deeply to be a table; expected one object a line.") from error


def _require_object(record: object, place: str) -> None:
    if not isinstance(record, dict):
        raise DataError(f'{place}: expected an object such as {{"text": ..., "label": ...}}, got {str(record)[:40]!r}.')


def _from_parquet(path: Path, source: str) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"{source} cannot be read as Parquet: {reason}") from error


def _class_name(names: list[str], index: float | None) -> str | None:
    """Return the name of a Hub class; None and -1 stand for rows without a label."""
    return names[int(index)] if index is not None and index >= 0 else None
