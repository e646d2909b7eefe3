"""Which files a local source consists of, and what reads each."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_lightning.data.sources.csv_file import read_csv
from lora_lightning.data.sources.dialogues import read_conll, read_dialogues
from lora_lightning.data.sources.json_file import read_json
from lora_lightning.data.sources.record import Found, ReadSettings, Record
from lora_lightning.data.sources.tables import read_parquet
from lora_lightning.data.sources.text import COMPRESSED, kind_of_file, text_lines
from lora_lightning.errors import DataError
from lora_lightning.paths import nearest_in_folder, resolve

_READERS: dict[str, Callable[[Path, str, ReadSettings], Iterator[Found]]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
    ".yml": read_dialogues,
    ".yaml": read_dialogues,
}
SUFFIXES = tuple(_READERS)
"""Ends of the names of files that every data module reads."""
CONLL = (".conll", ".conllu", ".iob", ".iob2", ".bio", ".txt")
"""Ends of the names of files with one word and its tag a line."""
_GLOB = ("*", "?", "[")
_SAVED = ("state.json", "dataset_dict.json")


def is_saved_dataset(source: str) -> bool:
    """Return whether a source is a folder that `datasets` saved."""
    folder = resolve(source)
    return any((folder / name).is_file() for name in _SAVED)


def is_glob(source: str) -> bool:
    """Return whether a source is a pattern for the names of files.

    Example:
        >>> is_glob("data/*.csv"), is_glob("data/a.csv")
        (True, False)
    """
    return any(sign in source for sign in _GLOB) and not resolve(source).exists()


def files_of(source: str, settings: ReadSettings) -> list[tuple[Path, str]]:
    """Return the files that a local source consists of, each with the name that messages give it.

    Args:
        source: A file, a pattern, a folder with files, or one of these inside a package (`pkg://package/folder`).
        settings: How files are read.

    Raises:
        DataError: It is not there, is of an unknown kind, or is empty.
    """
    if is_glob(source):
        found = sorted(glob.glob(str(resolve(source)), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        if not found:
            raise DataError(f"No file matches {source}; {nearest_in_folder(Path(source))}.")
        return [file for name in found for file in files_of(name, settings)]
    path = resolve(source)
    if path.is_dir():
        return _in_folder(path, source)
    if not path.is_file():
        raise DataError(f"{source} does not exist; {nearest_in_folder(path)}.")
    kinds = (*SUFFIXES, *CONLL) if settings.conll else SUFFIXES
    if kind_of_file(path) not in kinds:
        raise DataError(
            f"{source} is of an unknown kind: expected a name that ends in {', '.join(kinds)}, each also with "
            f"{', '.join(COMPRESSED)}, a folder of such files or with one sub-folder of .txt files for each class, or "
            "a Hub data set."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{source} is empty (0 bytes).")
    return [(path, source)]


def read_file(path: Path, name: str, settings: ReadSettings) -> Iterator[Found]:
    """Read the records of a file by its kind.

    Raises:
        DataError: It is malformed.
    """
    of_text = read_conll if settings.conll else _read_text
    read = _READERS.get(kind_of_file(path), of_text)
    return read(path, name, settings)


def _read_text(path: Path, name: str, settings: ReadSettings) -> Iterator[Record]:
    """Read a text whose folder names its class."""
    text = "".join(text_lines(path, name, settings.encoding))
    yield Record(name, 1, "line", {settings.text_column: text, settings.label_column: path.parent.name})


def _in_folder(folder: Path, source: str) -> list[tuple[Path, str]]:
    base = source.rstrip("/")
    files = [file for file in _shown(folder) if kind_of_file(file) in SUFFIXES and file.is_file()]
    if files:
        return [(file, f"{base}/{file.name}") for file in files]
    classes = [kind for kind in _shown(folder) if kind.is_dir()]
    files = [file for kind in classes for file in _shown(kind) if file.suffix == ".txt"]
    texts = [(file, f"{base}/{file.parent.name}/{file.name}") for file in files]
    if not texts:
        raise DataError(
            f"The folder {source} holds no texts: expected one sub-folder for each class with .txt files inside, or "
            f"files that end in {', '.join(SUFFIXES)}; {nearest_in_folder(folder / 'train.csv')}."
        )
    return texts


def _shown(folder: Path) -> list[Path]:
    """Return what stands in a folder in order of names, without hidden files."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
