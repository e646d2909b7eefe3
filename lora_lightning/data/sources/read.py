"""Records of a source of any kind."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from lora_lightning.data.sources.files import SUFFIXES, files_of, is_pattern, matching, read_file
from lora_lightning.data.sources.hub import hub_rows, is_hub_name, is_saved_dataset, saved_rows
from lora_lightning.data.sources.record import Found, OnBad, ReadSettings, Record, Source
from lora_lightning.data.sources.tables import read_dataset, read_frame
from lora_lightning.errors import DataError

_READ_TOGETHER = 1 << 20
_USUAL = ReadSettings()


def read_records(
    source: Source,
    settings: ReadSettings = _USUAL,
    role: str = "train",
    *,
    on_bad: OnBad | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Record]:
    """Read the records of a source one by one; a file is never held as a whole, unless it is one JSON array or YAML.

    Args:
        source: See `Source`.
        settings: How files are read.
        role: `train`, `val`, `test` or `predict`: which split of a data set is meant.
        on_bad: Takes the error of each broken record and its text, and reading continues behind it; None raises it.
        share: Which of several equal shares of the records is read, and how many there are.

    Raises:
        DataError: The source is not there, is malformed, or is empty.
    """
    mine, num_shares = share
    parts = (_found_in(part, settings, role) for part in _parts(source))
    position = -1
    for position, found in enumerate(itertools.chain.from_iterable(parts)):
        if position % num_shares != mine:
            continue
        record = found() if callable(found) else found
        if isinstance(record, Record):
            yield record
        elif on_bad is None:
            raise record.error
        else:
            on_bad(record.error, record.text)
    if position < 0:
        raise DataError(f"{describe(source)} holds no rows; give a source with at least one.")


def describe(source: Source) -> str:
    """Return how messages name a source.

    Example:
        >>> describe("a.csv"), describe(["a.csv", "b.csv", "c.csv"]), describe([{"text": "a"}])
        ('a.csv', 'a.csv and 2 more', 'a list of 1 rows')
    """
    if isinstance(source, str):
        return source
    if _is_list_of(str, source):
        return source[0] if len(source) == 1 else f"{source[0]} and {len(source) - 1} more"
    if isinstance(source, list):
        return f"a list of {len(source)} rows"
    return f"a {type(source).__name__} of {len(source)} rows" if is_in_memory(source) else repr(source)


def is_in_memory(source: Source) -> bool:
    """Return whether a source is data itself, not the name of some."""
    is_table = _is_frame(source) or _is_dataset(source)
    return is_table or (isinstance(source, list) and any(isinstance(one, dict) for one in source))


def source_files(source: Source, settings: ReadSettings) -> list[tuple[Path, str]]:
    """Return the files that a source consists of, each with the name that messages give it; none for other sources.

    Raises:
        DataError: One is not there, or is of an unknown kind.
    """
    names = [part for part in _parts(source) if isinstance(part, str)]
    local = [name for name in names if not is_hub_name(name) and not is_saved_dataset(name)]
    return [file for name in local for file in files_of(name, settings)]


def source_fingerprint(source: Source, settings: ReadSettings, role: str = "train") -> str:
    """Return a SHA-256 of what a source holds.

    Raises:
        DataError: It is not there.
    """
    digest = hashlib.sha256()
    for part in _parts(source):
        files = source_files(part, settings)
        for path, _ in files:
            # The folder of a text names its class.
            digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(_READ_TOGETHER):
                    digest.update(block)
        if not files:
            for record in read_records(part, settings, role):
                digest.update(json.dumps(record.fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def download(source: Source, settings: ReadSettings, role: str = "train") -> None:
    """Fetch a Hub data set, so that later calls find it here.

    Raises:
        DataError: It cannot be had.
    """
    hub_rows(source, settings.subset, role)


def _parts(source: Source) -> list[Source]:
    """Return the single sources that a list of names or a pattern stands for."""
    if _is_list_of(str, source):
        return [part for one in source for part in _parts(one)]
    if isinstance(source, str) and is_pattern(source):
        return matching(source)
    return [source]


def _found_in(part: Source, settings: ReadSettings, role: str) -> Iterator[Found]:
    """Read a source that is neither a list of names nor a pattern.

    Raises:
        DataError: It is of an unknown kind.
    """
    name = describe(part)
    if _is_frame(part):
        return read_frame(part, name)
    if _is_dataset(part):
        return read_dataset(part, name)
    if _is_list_of(dict, part):
        return (Record(name, number, "row", fields) for number, fields in enumerate(part, start=1))
    if not isinstance(part, str):
        raise DataError(
            f"The source {str(part)[:60]!r} ({type(part).__name__}) is of an unknown kind: expected a file "
            f"({', '.join(SUFFIXES)}), a folder, a list of files, a pattern such as data/*.csv, a Hub data set, a "
            "pandas DataFrame, a datasets.Dataset, or a list of dicts."
        )
    if is_hub_name(part):
        return read_dataset(hub_rows(part, settings.subset, role), name)
    if is_saved_dataset(part):
        return read_dataset(saved_rows(part, role), name)
    files = files_of(part, settings)
    return itertools.chain.from_iterable(read_file(path, name, settings) for path, name in files)


def _is_list_of(kind: type, source: Source) -> bool:
    return isinstance(source, list) and len(source) > 0 and all(isinstance(one, kind) for one in source)


def _is_frame(source: object) -> bool:
    return type(source).__module__.split(".")[0] == "pandas" and hasattr(source, "columns")


def _is_dataset(source: object) -> bool:
    return type(source).__module__.split(".")[0] == "datasets" and hasattr(source, "features")
