"""A sample of a source: its first rows, or rows spread over a long file, and the settings to read it."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_lightning.data.rows.cells import number_of
from lora_lightning.data.sources import ReadSettings, is_hub_name, read_records, source_files
from lora_lightning.data.sources.files import CONLL
from lora_lightning.data.sources.text import kind_of_file, open_bytes
from lora_lightning.errors import DataError
from lora_lightning.paths import resolve

MOST_ROWS = 4000
"""Number of rows in a sample."""
_BLOCK = 1 << 20
_MOST_WORDS = 8
"""Words in the name of a column."""
_USUAL_ENCODING = "utf-8"
_OTHER_ENCODINGS = ("utf-16", "cp1252", "latin-1")
_SEPARATED = {".csv": ",", ".tsv": "\t"}
_SEPARATORS = (";", "\t", "|", ",")
_SPLIT_NAME = re.compile(r"(?<![a-zA-Z])train(?![a-zA-Z])|^train|(?<=[_.-])train", re.IGNORECASE)
_OTHER_SPLITS = {"val": ("val", "valid", "validation", "dev"), "test": ("test",)}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Rows of a source, and the settings to read them.

    Args:
        source: The source, as a config names it.
        settings: How its files are read.
        records: The fields of the rows.
        num_rows: Number of rows of the whole source; an estimate if `is_whole` is false.
        is_whole: Whether all rows of the source are in the sample.
        num_broken: Rows that cannot be read.
        others: Sources of further splits in the same folder, by `val` and `test`.
        notes: Remarks.
    """

    source: str
    settings: ReadSettings
    records: list[Mapping[str, Any]]
    num_rows: int
    is_whole: bool
    num_broken: int
    others: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Names of all fields, in the order in which they appear."""
        return list(dict.fromkeys(name for record in self.records for name in record))

    @property
    def data_settings(self) -> dict[str, Any]:
        """The settings of a data module that differ from its defaults because of the files."""
        found: dict[str, Any] = {}
        if self.settings.encoding != _USUAL_ENCODING:
            found["encoding"] = self.settings.encoding
        if self.settings.separator is not None:
            found["separator"] = self.settings.separator
        return found

    @property
    def kind(self) -> str:
        """The suffix of its first file, empty for a source without files."""
        files = source_files(self.source, self.settings)
        return kind_of_file(files[0][0]) if files else ""


def take_sample(source: str) -> Sample:
    """Read at most `MOST_ROWS` rows of a source, in the encoding and with the separator that fit it.

    Args:
        source: A file, a folder, a pattern or a Hub data set, as a data module takes it.

    Raises:
        DataError: It is missing, of an unknown kind, or cannot be read.
    """
    train, others = _splits_in(source)
    settings = ReadSettings(conll=_has_words(train))
    settings = replace(settings, encoding=_encoding_of(train, settings))
    settings = replace(settings, separator=_separator_of(train, settings))
    records, num_broken, is_whole = _read(train, settings, stride=1)
    num_rows = len(records)
    if not is_whole:
        num_rows = _estimate(train, settings, records)
        stride = num_rows // MOST_ROWS
        # A file may be sorted by its labels, so that its first rows have only one.
        if stride > 1:
            records, num_broken, _ = _read(train, settings, stride=stride)
    _require_names(train, settings, records)
    if not records:
        raise DataError(f"{source}: no row can be read; all {num_broken} are broken.")
    return Sample(
        source=train,
        settings=settings,
        records=records,
        num_rows=num_rows,
        is_whole=is_whole,
        num_broken=num_broken,
        others=others,
    )


def _read(source: str, settings: ReadSettings, stride: int) -> tuple[list[Mapping[str, Any]], int, bool]:
    """Return rows, the number of broken ones, and whether these are all."""
    broken: list[DataError] = []
    found = read_records(source, settings, on_bad=lambda error, _: broken.append(error), share=(0, stride))
    records = [record.fields for record in itertools.islice(found, MOST_ROWS)]
    is_whole = stride == 1 and next(found, None) is None
    if not records and broken:
        raise broken[0]
    return records, len(broken), is_whole


def _estimate(source: str, settings: ReadSettings, records: list[Mapping[str, Any]]) -> int:
    """Estimate the number of rows of a source by the size of its first rows; exact for a source without files."""
    files = source_files(source, settings)
    if not files:
        return sum(1 for _ in read_records(source, settings))
    read = sum(len(str(value).encode()) + 1 for record in records for value in record.values())
    total = sum(path.stat().st_size for path, _ in files)
    return max(round(total * len(records) / max(read, 1)), len(records) + 1)


def _require_names(source: str, settings: ReadSettings, records: list[Mapping[str, Any]]) -> None:
    """Refuse a table whose first line holds a row instead of the names of columns.

    Raises:
        DataError: It does.
    """
    files = source_files(source, settings)
    names = list(records[0]) if records and files and kind_of_file(files[0][0]) in _SEPARATED else []
    odd = next((name for name in names if number_of(name) is not None or len(name.split()) > _MOST_WORDS), None)
    if odd is not None:
        raise DataError(
            f"{source}: the first line should name the columns, and {odd[:40]!r} looks like data. Put a line such as "
            "text,label in front."
        )


# Splits.


def _splits_in(source: str) -> tuple[str, dict[str, str]]:
    """Return the source of the training rows, and those of further splits with such names in the same folder."""
    if is_hub_name(source):
        return source, _splits_of_hub(source)
    path = resolve(source)
    if path.is_dir():
        return _splits_in_folder(path, source)
    if not path.is_file() or not _SPLIT_NAME.search(path.name):
        return source, {}
    folder, slash, _ = source.rpartition("/")
    found = {split: _beside(path, names) for split, names in _OTHER_SPLITS.items()}
    return source, {split: f"{folder}{slash}{name}" for split, name in found.items() if name}


def _splits_in_folder(folder: Path, source: str) -> tuple[str, dict[str, str]]:
    files = sorted(one for one in folder.iterdir() if one.is_file() and kind_of_file(one))
    train = [one for one in files if _SPLIT_NAME.search(one.name)]
    if len(train) != 1:
        return source, {}
    return _splits_in(f"{source.rstrip('/')}/{train[0].name}")


def _beside(path: Path, names: tuple[str, ...]) -> str | None:
    """Return the file beside a training file whose name has one of some words instead of `train`."""
    candidates = [_SPLIT_NAME.sub(name, path.name) for name in names]
    return next((one for one in candidates if path.with_name(one).is_file()), None)


def _splits_of_hub(name: str) -> dict[str, str]:
    """Return the data set again for validation, if it has rows for that."""
    try:
        next(read_records(name, role="val"))
    except DataError:
        return {}
    return {"val": name}


# How files are read.


def _has_words(source: str) -> bool:
    """Return whether a source is files with one word and its tag a line."""
    if is_hub_name(source) or resolve(source).is_dir():
        return False
    return kind_of_file(Path(source)) in CONLL


def _encoding_of(source: str, settings: ReadSettings) -> str:
    """Return the first of the usual encodings in which all files of a source can be decoded."""
    files = [path for path, _ in source_files(source, settings) if kind_of_file(path) != ".parquet"]
    decoded = (one for one in (_USUAL_ENCODING, *_OTHER_ENCODINGS) if all(_decodes(path, one) for path in files))
    return next(decoded, _USUAL_ENCODING)


def _decodes(path: Path, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    with open_bytes(path, str(path)) as file:
        for number, block in enumerate(_blocks(file)):
            has_mark = block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            if number == 0 and encoding == "utf-16" and not has_mark:
                return False
            try:
                decoder.decode(block, final=not block)
            except UnicodeError:
                return False
    return True


def _blocks(file: Any) -> Iterator[bytes]:  # noqa: ANN401 - an open file of bytes
    while block := file.read(_BLOCK):
        yield block
    yield b""


def _separator_of(source: str, settings: ReadSettings) -> str | None:
    """Return the separator of the fields, if it differs from that of the file's suffix."""
    files = source_files(source, settings)
    usual = _SEPARATED.get(kind_of_file(files[0][0])) if files else None
    if usual is None:
        return None
    first = next(read_records(source, settings, on_bad=lambda *_: None), None)
    if first is not None and len(first.fields) > 1:
        return None
    # Of a wrong separator, the names of all columns are the name of one.
    names = next(iter(first.fields)) if first is not None else _first_line(files[0][0], settings.encoding)
    times = {separator: names.count(separator) for separator in _SEPARATORS if separator != usual}
    best = max(times, key=lambda separator: times[separator])
    return best if times[best] else None


def _first_line(path: Path, encoding: str) -> str:
    with open_bytes(path, str(path)) as file:
        return file.readline().decode(encoding, "replace")
