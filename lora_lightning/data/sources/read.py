"""Records of a source of any kind."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from lora_lightning.data.sources.files import SUFFIXES, files_of, is_saved_dataset, read_file
from lora_lightning.data.sources.hub import hub_rows, is_hub_name, saved_rows
from lora_lightning.data.sources.mixture import is_mixture, parts_of
from lora_lightning.data.sources.record import OnBad, ReadSettings, Record, Source, Takes
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
    passed = itertools.count()
    found = False

    def takes() -> bool:
        nonlocal found
        found = True
        return next(passed) % num_shares == mine

    yield from _records(source, settings, role, on_bad or _refuse, takes)
    if not found:
        raise DataError(f"{describe(source)} holds no rows; give a source with at least one.")


def describe(source: Source) -> str:
    """Return how messages name a source.

    Example:
        >>> describe("a.csv"), describe(["a.csv", "b.csv", "c.csv"]), describe([{"text": "a"}])
        ('a.csv', 'a.csv and 2 more', 'a list of 1 rows')
    """
    if isinstance(source, str):
        return source
    if is_mixture(source):
        return " and ".join(describe(part.source) for part in parts_of(source))
    if isinstance(source, list) and source and all(isinstance(one, str) for one in source):
        return source[0] if len(source) == 1 else f"{source[0]} and {len(source) - 1} more"
    if isinstance(source, list):
        return f"a list of {len(source)} rows"
    return f"a {type(source).__name__} of {len(source)} rows" if is_in_memory(source) else repr(source)


def is_in_memory(source: Source) -> bool:
    """Return whether a source is data itself, not the name of some."""
    if is_mixture(source):
        return any(is_in_memory(part.source) for part in parts_of(source))
    is_table = _is_frame(source) or _is_dataset(source)
    return is_table or (isinstance(source, list) and any(isinstance(one, dict) for one in source))


def source_files(source: Source, settings: ReadSettings) -> list[tuple[Path, str]]:
    """Return the files that a source consists of, each with the name that messages give it; none for other sources.

    Raises:
        DataError: One is not there, or is of an unknown kind.
    """
    if is_mixture(source):
        return [file for part in parts_of(source) for file in source_files(part.source, settings)]
    if isinstance(source, list):
        return [file for one in source if isinstance(one, str) for file in source_files(one, settings)]
    is_of_files = isinstance(source, str) and not is_hub_name(source) and not is_saved_dataset(source)
    return files_of(source, settings) if is_of_files else []


def source_fingerprint(source: Source, settings: ReadSettings, role: str = "train") -> str:
    """Return a SHA-256 of what a source holds.

    Raises:
        DataError: It is not there.
    """
    digest = hashlib.sha256()
    files = source_files(source, settings)
    for path, _ in files:
        # The folder of a text names its class.
        digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(_READ_TOGETHER):
                digest.update(block)
    if not files:
        for record in _records(source, settings, role, _refuse, lambda: True):
            digest.update(json.dumps(record.fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def download(source: Source, settings: ReadSettings, role: str = "train") -> None:
    """Fetch a Hub data set, so that later calls find it here.

    Raises:
        DataError: It cannot be had.
    """
    hub_rows(source, settings.subset, role)


def _records(source: Source, settings: ReadSettings, role: str, on_bad: OnBad, takes: Takes) -> Iterator[Record]:
    if isinstance(source, list) and source and all(isinstance(one, str) for one in source):
        for one in source:
            yield from _records(one, settings, role, on_bad, takes)
        return
    table = _table_of(source, settings, role)
    if table is not None:
        yield from (record for record in table if takes())
        return
    for path, name in files_of(source, settings):
        yield from read_file(path, name, settings, on_bad, takes)


def _table_of(source: Source, settings: ReadSettings, role: str) -> Iterator[Record] | None:
    """Return the records of a source that is no file; None for one that is."""
    if _is_frame(source):
        return read_frame(source, describe(source))
    if _is_dataset(source):
        return read_dataset(source, describe(source))
    if isinstance(source, list) and source and all(isinstance(one, dict) for one in source):
        rows = enumerate(source, start=1)
        return (Record(describe(source), number, "row", fields) for number, fields in rows)
    if not isinstance(source, str):
        raise _unknown(source)
    if is_hub_name(source):
        return read_dataset(hub_rows(source, settings.subset, role), source)
    return read_dataset(saved_rows(source, role), source) if is_saved_dataset(source) else None


def _unknown(source: object) -> DataError:
    return DataError(
        f"The source {str(source)[:60]!r} ({type(source).__name__}) is of an unknown kind: expected a file "
        f"({', '.join(SUFFIXES)}), a folder, a list of files, a pattern such as data/*.csv, a Hub data set, a pandas "
        "DataFrame, a datasets.Dataset, or a list of dicts."
    )


def _refuse(error: DataError, text: str) -> None:  # noqa: ARG001 - as OnBad has it
    raise error


def _is_frame(source: object) -> bool:
    return type(source).__module__.split(".")[0] == "pandas" and hasattr(source, "columns")


def _is_dataset(source: object) -> bool:
    return type(source).__module__.split(".")[0] == "datasets" and hasattr(source, "features")
