"""Write files and folders atomically, and identify files by their digest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_HIDDEN = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(tmp|old)")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk."""
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
        path: The file; an existing file is replaced atomically.
        data: Its bytes.
    """
    temporary = hidden_sibling(path, "tmp")
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
    """Yield a temporary sibling of `folder` to fill; it is renamed to `folder` when the block has succeeded.

    An existing folder (or a link to one) is replaced. If the block raises, the temporary folder is removed and the
    existing folder is unchanged. Everything is synced before the rename. Files that a killed process left are removed
    first.

    Args:
        folder: The final path. Missing parents are made, and removed again on failure.

    Yields:
        The temporary folder, empty.
    """
    made = make_parents(folder.parent)
    temporary = hidden_sibling(folder, "tmp")
    try:
        with alone_in(folder.parent) as is_alone:
            if is_alone:
                tidy(folder)
        with writing_in(folder.parent):
            temporary.mkdir()
            yield temporary
            sync_tree(temporary)
            move_into_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        remove_empty(made)
        raise


@contextlib.contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Mark a folder as in use by this process, so that other processes do not remove its temporary files.

    The mark is a shared lock on the folder, which the system releases when the process ends. On a file system without
    locks there is no mark.
    """
    with _locked(folder, exclusive=False):
        yield


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Yield whether no process is `writing_in` a folder, and prevent others from starting to during the block."""
    with _locked(folder, exclusive=True) as is_locked:
        yield is_locked


@contextlib.contextmanager
def _locked(folder: Path, *, exclusive: bool) -> Iterator[bool]:
    if sys.platform == "win32":  # there, files that are open cannot be removed anyway
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
            is_locked = True
        except OSError:  # somebody has the lock, or this file system has none: then leftovers stay
            is_locked = False
        yield is_locked
    finally:
        os.close(handle)


def hidden_sibling(path: Path, kind: str) -> Path:
    """Return an unused name in the same folder, so that a rename never crosses file systems.

    Args:
        path: The path to derive the name from.
        kind: `tmp` for its replacement, `old` for the file or folder that is replaced.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def hidden_siblings(path: Path) -> list[Path]:
    """Return the existing paths that `hidden_sibling` named for a path."""
    found = hidden_entries(path.parent)
    return [entry for entry, name in found.items() if name == path.name]


def hidden_entries(folder: Path) -> dict[Path, str]:
    """Return all paths in a folder that `hidden_sibling` named, with the names that they were derived from."""
    matches = ((entry, _HIDDEN.fullmatch(entry.name)) for entry in sorted(folder.iterdir()))
    return {entry: match[1] for entry, match in matches if match}


def tidy(path: Path) -> None:
    """Restore files that a killed process had moved aside and not replaced, and remove its other files.

    Call it while `alone_in` the folder.
    """
    left = hidden_siblings(path)
    old = [entry for entry in left if entry.suffix == ".old"]
    if old and not path.exists() and not path.is_symlink():
        left.remove(old[-1])
        old[-1].rename(path)
    remove(*left)


def remove(*paths: Path) -> None:
    """Remove files, folders (recursively) and links (not their targets); missing paths are ignored."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder, or only the link if it is one; a missing folder is ignored."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def make_parents(parent: Path) -> list[Path]:
    """Make a folder and its missing parents; return the new ones, the innermost first."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove the folders that `make_parents` made, if they are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def sync_tree(folder: Path) -> None:
    """Sync all files of a folder to disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def move_into_place(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; an existing folder is moved aside first and restored if the rename fails."""
    old = hidden_sibling(folder, "old") if folder.is_symlink() or folder.exists() else None
    if old is not None:
        folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        if old is not None:
            old.rename(folder)
        raise
    sync(folder.parent)
    if old is not None:
        remove_folder(old)
