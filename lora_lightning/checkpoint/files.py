"""Write files and folders so that a reader sees either all of them or nothing, and tell files by their digest."""

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
    """Hand out a temporary sibling of `folder` to fill; it takes the name `folder` only once the block has succeeded.

    A folder (or a link to one) already there is replaced. When the block raises, the temporary folder is removed and
    what was there before stays as it was. Everything is synced before the rename. What a killed process left of an
    earlier try is removed first.

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
    """Announce that this process has temporary files in a folder, so that no other one takes them for leftovers.

    The mark is a shared lock on the folder itself, which goes with the process however it ends. A file system without
    locks gets none.
    """
    with _locked(folder, exclusive=False):
        yield


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Tell whether no process is `writing_in` a folder, and keep others from beginning to while the block runs."""
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
        path: The path that it stands for.
        kind: `tmp` for what is going to take its place, `old` for what stood there.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def hidden_siblings(path: Path) -> list[Path]:
    """Return what `hidden_sibling` named for a path and is still there."""
    found = hidden_entries(path.parent)
    return [entry for entry, name in found.items() if name == path.name]


def hidden_entries(folder: Path) -> dict[Path, str]:
    """Return everything in a folder that `hidden_sibling` named, and the names that it stands for."""
    matches = ((entry, _HIDDEN.fullmatch(entry.name)) for entry in sorted(folder.iterdir()))
    return {entry: match[1] for entry, match in matches if match}


def tidy(path: Path) -> None:
    """Put back what a killed process had moved aside, where nothing has taken its place, and remove what else it left.

    Call it while `alone_in` the folder.
    """
    left = hidden_siblings(path)
    old = [entry for entry in left if entry.suffix == ".old"]
    if old and not path.exists() and not path.is_symlink():
        left.remove(old[-1])
        old[-1].rename(path)
    remove(*left)


def remove(*paths: Path) -> None:
    """Remove files, folders (with all in them) and links (alone); a missing one is no error."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder, or only the link where it is a link to one; a missing one is no error."""
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
    """Remove what `make_parents` made, as far as nothing is in it."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def sync_tree(folder: Path) -> None:
    """Have the system write all of a folder to its disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def move_into_place(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; an older folder steps aside first and comes back if the rename fails."""
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
