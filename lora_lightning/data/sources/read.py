"""Records of a source of any kind."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from lora_lightning.data.sources.files import SUFFIXES, files_of, is_pattern, matching, read_file
from lora_lightning.data.sources.hub import hub_rows, is_hub_name, is_saved_dataset, saved_rows
from lora_lightning.data.sources.mixture import is_mixture, parts_of
from lora_lightning.data.sources.record import Found, OnBad, ReadSettings, Record, Source
from lora_lightning.data.sources.tables import numbered, read_dataset, read_frame
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
    """Read the records of a source one by one; only a JSON array or a YAML file is read into memory as a whole.

    Args:
        source: A file, a list of files, a glob, a folder, a Hub data set, or rows in memory.
        settings: How files are read.
        role: The split of a data set to read: `train`, `val`, `test` or `predict`.
        on_bad: Called with the error and the text of each broken record, which is then skipped; None raises the error.
        share: Index of the share of the records to read, and the number of equal shares.

    Raises:
        DataError: The source is not there, is malformed, or is empty.
    """
    mine, num_shares = share
    singles = (_found_in(single, settings, role) for single in _singles(source))
    position = -1
    for position, found in enumerate(itertools.chain.from_iterable(singles)):
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
    """Return the name of a source for messages.

    Example:
        >>> describe("a.csv"), describe(["a.csv", "b.csv", "c.csv"]), describe([{"text": "a"}])
        ('a.csv', 'a.csv and 2 more', 'a list of 1 rows')
    """
    if isinstance(source, str):
        return source
    if is_mixture(source):
        return " and ".join(describe(part.source) for part in parts_of(source))
    if _is_list_of(str, source):
        return source[0] if len(source) == 1 else f"{source[0]} and {len(source) - 1} more"
    if isinstance(source, list):
        return f"a list of {len(source)} rows"
    size = f" of {len(source)} rows" if hasattr(source, "__len__") else ""
    return f"a {type(source).__name__}{size}" if is_in_memory(source) else repr(source)


def is_in_memory(source: Source) -> bool:
    """Return whether a source is data in memory, not a name; also True for invalid sources."""
    if is_mixture(source):
        return any(is_in_memory(part.source) for part in parts_of(source))
    is_named = source is None or isinstance(source, str) or _is_list_of(str, source)
    return not is_named and not (isinstance(source, list) and not source)


def source_files(source: Source, settings: ReadSettings) -> list[tuple[Path, str]]:
    """Return the files of a source, each with its name in messages; none for other sources.

    Raises:
        DataError: One is not there, or is of an unknown kind.
    """
    names = [single for single in _singles(source) if isinstance(single, str)]
    local = [name for name in names if not is_hub_name(name) and not is_saved_dataset(name)]
    return [file for name in local for file in files_of(name, settings)]


def source_fingerprint(source: Source, settings: ReadSettings, role: str = "train") -> str:
    """Return the SHA-256 of the content of a source.

    Raises:
        DataError: It is not there.
    """
    digest = hashlib.sha256()
    for single in _singles(source):
        files = source_files(single, settings)
        for path, _ in files:
            # The folder of a text names its class.
            digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(_READ_TOGETHER):
                    digest.update(block)
        if not files:
            for record in read_records(single, settings, role):
                digest.update(json.dumps(record.fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def download(source: Source, settings: ReadSettings, role: str = "train") -> None:
    """Download a Hub data set, so that later calls find it in the cache.

    Raises:
        DataError: It cannot be loaded.
    """
    hub_rows(source, settings.subset, role)


def _singles(source: Source) -> list[Source]:
    """Return the single sources of a mixture, a list of names or a pattern."""
    if is_mixture(source):
        return [single for part in parts_of(source) for single in _singles(part.source)]
    if _is_list_of(str, source):
        return [single for one in source for single in _singles(one)]
    if isinstance(source, str) and is_pattern(source):
        return matching(source)
    return [source]


def _found_in(single: Source, settings: ReadSettings, role: str) -> Iterator[Found]:
    """Read a source that is neither a mixture, nor a list of names, nor a pattern.

    Raises:
        DataError: It is of an unknown kind.
    """
    name = describe(single)
    if _is_frame(single):
        return read_frame(single, name)
    if _is_dataset(single):
        return read_dataset(single, name)
    if _is_list_of(dict, single):
        return numbered(name, single, drops_nulls=False)
    if not isinstance(single, str):
        raise DataError(
            f"The source {str(single)[:60]!r} ({type(single).__name__}) is of an unknown kind: expected a file "
            f"({', '.join(SUFFIXES)}), a folder, a list of files, a pattern such as data/*.csv, a Hub data set, a "
            "pandas DataFrame, a datasets.Dataset, or a list of dicts."
        )
    if is_hub_name(single):
        return read_dataset(hub_rows(single, settings.subset, role), name)
    if is_saved_dataset(single):
        return read_dataset(saved_rows(single, role), name)
    files = files_of(single, settings)
    return itertools.chain.from_iterable(read_file(path, name, settings) for path, name in files)


def _is_list_of(kind: type, source: Source) -> bool:
    return isinstance(source, list) and len(source) > 0 and all(isinstance(one, kind) for one in source)


def _is_frame(source: object) -> bool:
    return type(source).__module__.split(".")[0] == "pandas" and hasattr(source, "columns")


def _is_dataset(source: object) -> bool:
    is_of_datasets = type(source).__module__.split(".")[0] == "datasets" and hasattr(source, "features")
    return is_of_datasets and hasattr(source, "__len__")  # a stream has no length
