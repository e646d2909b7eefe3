"""Write files and folders so that a reader sees either all of them or nothing, and tell files by their digest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to its disk."""
    if os.name == "nt" and path.is_dir():  # Windows has no handle for a folder to sync
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name in its own folder, sync it, and rename it into place.

    Args:
        path: Where the file goes; a file already there is replaced in one step.
        data: Its bytes.
    """
    temporary = _hidden_sibling(path, "tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Hand out a temporary sibling of `folder` to fill; it takes the name `folder` only once the block has succeeded.

    A folder (or a link to one) already there is replaced. When the block raises, the temporary folder is removed and
    what was there before stays as it was. Everything is synced before the rename.

    Args:
        folder: The final path. Missing parents are made, and removed again on failure.

    Yields:
        The temporary folder, empty.
    """
    made = _make_parents(folder.parent)
    temporary = _hidden_sibling(folder, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        _move_into_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder, or only the link where it is a link to one; a missing one is no error."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _make_parents(parent: Path) -> list[Path]:
    """Make a folder and its missing parents; return the new ones, the innermost first."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def _move_into_place(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; an older folder steps aside first and comes back if the rename fails."""
    if not folder.is_symlink() and not folder.exists():
        temporary.rename(folder)
        return
    old = _hidden_sibling(folder, "old")
    folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    remove_folder(old)


def _hidden_sibling(path: Path, kind: str) -> Path:
    """Return an unused name in the same folder, so that a rename never crosses file systems."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")
