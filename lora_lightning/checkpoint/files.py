"""Write files and folders so that a reader sees either all of them or nothing, and tell files by their digest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
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
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
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
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".old"))
    old = aside / folder.name
    folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        old.rename(folder)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def _umask() -> int:
    """Return the process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
