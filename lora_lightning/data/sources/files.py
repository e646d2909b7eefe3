"""The files of a local source, and their readers."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePath

from lora_lightning.data.notices import warn
from lora_lightning.data.sources.conll import read_conll
from lora_lightning.data.sources.csv_file import read_csv
from lora_lightning.data.sources.dialogues import read_dialogues
from lora_lightning.data.sources.json_file import read_json
from lora_lightning.data.sources.record import Found, ReadSettings, Record
from lora_lightning.data.sources.tables import read_parquet
from lora_lightning.data.sources.text import COMPRESSED, checked, kind_of_file, text_lines
from lora_lightning.errors import DataError, UserError
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
"""Suffixes of files that every data module reads."""
CONLL = (".conll", ".conllu", ".iob", ".iob2", ".bio", ".txt")
"""Suffixes of files with one word and its tag a line."""
_TEXT = ".txt"
_SPLIT = re.compile(r"(train|val|valid|validation|dev|test)(?=[-_.]|$)", re.IGNORECASE)
_PATTERN_SIGNS = ("*", "?", "[")


def is_pattern(source: str) -> bool:
    """Return whether a source is a pattern for the names of files.

    Example:
        >>> is_pattern("data/*.csv"), is_pattern("data/a.csv"), is_pattern("pkg://lora_lightning/*.py")
        (True, False, True)
    """
    if not any(sign in source for sign in _PATTERN_SIGNS):
        return False
    try:
        return not resolve(source).exists()
    except UserError:  # inside a package, where only what exists has a path
        return True


def matching(pattern: str) -> list[str]:
    """Return the files and folders that match a pattern, named like the pattern.

    A folder is omitted if its content also matches, as for `data/**`.

    Raises:
        DataError: There are none.
    """
    parts = pattern.split("/")
    num_fixed = next(n for n in range(len(parts)) if is_pattern("/".join(parts[: n + 1])))
    fixed = "".join(f"{part}/" for part in parts[:num_fixed])
    folder = resolve(fixed)
    pattern_inside = "/".join(parts[num_fixed:])
    found = glob.glob(pattern_inside, root_dir=folder, recursive=True)  # noqa: PTH207 - Path.glob finds hidden files
    read_through = {str(parent) for one in found for parent in PurePath(one).parents}
    names = sorted(fixed + one for one in found if one.rstrip("/") not in read_through)
    _tell_splits([PurePath(name).name for name in names], pattern)
    if not names:
        raise DataError(f"No file matches {pattern}; {nearest_in_folder(folder / parts[-1])}.")
    return names


def files_of(source: str, settings: ReadSettings) -> list[tuple[Path, str]]:
    """Return the files of a local source, each with its name in messages.

    Args:
        source: A file, or a folder with files; either may be inside a package (`pkg://package/folder`).
        settings: How files are read.

    Raises:
        DataError: It is not there, is of an unknown kind, or is empty.
    """
    path = resolve(source)
    if path.is_dir():
        return _in_folder(path, source, settings)
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
    """Read a text file in a folder that is named like its class."""
    text = "".join(checked(text_lines(path, name, settings.encoding)))
    yield Record(name, 1, "line", {settings.text_column: text, settings.label_column: path.parent.name})


def _in_folder(folder: Path, source: str, settings: ReadSettings) -> list[tuple[Path, str]]:
    tagged = CONLL if settings.conll else ()
    files = _files_in(folder, {*SUFFIXES, *tagged} - {_TEXT})
    texts = _files_in(folder, {_TEXT}.intersection(tagged))
    if files and texts:
        # More likely notes, of which each line would pass for a word and its tag.
        warn(
            f"{source} holds {texts[0].name} beside files of other kinds; its .txt files are not read. Where they are "
            "data, give a list of files or a pattern."
        )
    files = files or texts
    if not files:
        sub_folders = [path for path in _shown(folder) if path.is_dir()]
        files = [file for sub_folder in sub_folders for file in _files_in(sub_folder, (_TEXT, *tagged))]
    _tell_unread(folder, source, files, {*SUFFIXES, *tagged, _TEXT})
    _tell_splits([file.name for file in files], source)
    if not files:
        raise DataError(
            f"The folder {source} holds no texts: expected one sub-folder for each class with .txt files inside, or "
            f"files that end in {', '.join(SUFFIXES)}; {nearest_in_folder(folder / 'train.csv')}."
        )
    return [(file, f"{source.rstrip('/')}/{file.relative_to(folder)}") for file in files]


def _tell_unread(folder: Path, source: str, files: list[Path], kinds: Collection[str]) -> None:
    """Warn of data in the sub-folders of a folder that is not read."""
    below = [path for one in _folders_in(folder) for path in [one, *_folders_in(one)]]
    inside = [file for one in below for file in _files_in(one, kinds)]
    unread = sorted({*inside}.difference(files))
    if files and unread:
        warn(
            f"{source} has {len(unread)} files of data in its sub-folders that are not read, such as "
            f"{unread[0].relative_to(folder)}. Where they are wanted, give a list of files or a pattern such as "
            f"{source.rstrip('/')}/**/*{kind_of_file(unread[0])}."
        )


def _tell_splits(names: list[str], source: str) -> None:
    """Warn of files whose names say that they are different splits."""
    found: dict[str, str] = {}
    for name in names:
        match = _SPLIT.match(name)
        if match:
            found.setdefault("val" if match[1].lower() not in ("train", "test") else match[1].lower(), name)
    if len(found) > 1:
        warn(
            f"{source} holds {' and '.join(found.values())}, and all of them are read as rows of one split. Where they "
            "are splits of their own, name each file: as train, val and test."
        )


def _files_in(folder: Path, kinds: Collection[str]) -> list[Path]:
    return [path for path in _shown(folder) if kind_of_file(path) in kinds and path.is_file()]


def _folders_in(folder: Path) -> list[Path]:
    """Return the sub-folders of a folder that are searched."""
    return [path for path in _shown(folder) if path.is_dir() and os.access(path, os.R_OK | os.X_OK)]


def _shown(folder: Path) -> list[Path]:
    """Return the content of a folder in order of names, without hidden files."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
